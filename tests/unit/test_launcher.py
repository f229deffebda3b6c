"""`gai-yolo launch`: its command line, its decisions, and what the nodes leave for each other. Starts no process."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters

from gai_yolo.cli.main import main
from gai_yolo.distributed.network import Endpoint
from gai_yolo.errors import HARDWARE, LEFT, RESTART, Ending
from gai_yolo.launcher.arguments import RENDEZVOUS, LaunchError, Settings, add_arguments, settings_from
from gai_yolo.launcher.command import BACKEND, agent_command, agent_environment, threads_each
from gai_yolo.launcher.rendezvous.channel import GREETING_BYTES
from gai_yolo.launcher.rendezvous.client import is_here
from gai_yolo.launcher.rendezvous.election import LOST_AFTER, OUTVOTED_AFTER, EndpointElection, Look, Target
from gai_yolo.launcher.rendezvous.file_store import FileKeyValueStore
from gai_yolo.launcher.rendezvous.handler import StopStarting, StoreLost, StoreRendezvous, TorchStore
from gai_yolo.launcher.rendezvous.key_values import InMemoryKeyValueStore, KeyValueStore
from gai_yolo.launcher.rendezvous.run_name import JobDone, agree_on_run, claim_run, close_run, numbered, random_name
from gai_yolo.launcher.rendezvous.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, Secret
from gai_yolo.launcher.rendezvous.tcp_store import LIVE_SECONDS, KeyValueServer, TcpKeyValueStore
from gai_yolo.launcher.verdict import (
    CLOSED,
    FAILED,
    IN_VAIN,
    KILLED_AT_ONCE,
    LEAST_VAIN_SECONDS,
    MOST_VAIN_ENDS,
    OBSTRUCTED,
    RENDEZVOUS_LOST,
    TERMINATED,
    End,
    History,
    RestartCounter,
    backoff,
)
from gai_yolo.supervision.outcome import VARIABLE as OUTCOME_VARIABLE
from gai_yolo.supervision.outcome import Outcome, clear_outcome, read_outcome, write_outcome

BY_SIGTERM = -signal.SIGTERM
BY_SIGKILL = -signal.SIGKILL
TEXT = "0123456789abcdef" * 2
SECRET = Secret(TEXT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a script, a module, somebody's file and a run folder for the rendezvous; and a job's secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SECRET_VARIABLE, TEXT)
    (tmp_path / "train.py").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "notes.txt").write_text("dear diary")
    return tmp_path


def settings(*words: str) -> Settings:
    """A command line, understood."""
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers().add_parser("launch"))
    return settings_from(parser.parse_args(["launch", *words]))


@pytest.mark.usefixtures("folder")
def test_command_line_is_understood_with_and_without_the_dashes() -> None:
    """Options of the script that the launcher takes for its own."""
    for dashes in ([], ["--"]):
        found = settings("--nodes", "1:4", "--rendezvous", "a:1,[::1]:2", *dashes, "train.py", "--nodes", "7", "-m")
        assert (found.min_nodes, found.max_nodes) == (1, 4)
        assert found.rendezvous == (Endpoint("a", 1), Endpoint("::1", 2))
        assert (found.script, found.script_arguments, found.module) == ("train.py", ("--nodes", "7", "-m"), False)
    for words in (["-m", "package.train", "-x"], ["--", "-m", "package.train", "-x"]):
        found = settings(*words)
        assert (found.script, found.script_arguments, found.module) == ("package.train", ("-x",), True)


@pytest.mark.usefixtures("folder")
def test_path_and_endpoint_are_told_apart() -> None:
    """A job that waits for a host called `rdzv`, or leaves a file called `node0:29400`."""
    assert settings("--rendezvous", "rdzv", "train.py").rendezvous == Path("rdzv")
    assert settings("--rendezvous", "./a:1", "train.py").rendezvous == Path("a:1")
    assert settings("--rendezvous", "node0:29400", "train.py").rendezvous == (Endpoint("node0", 29400),)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "what to run is missing"),
        ("trian.py", "trian.py: there is no such script"),
        ("-m no_such.module", "-m no_such.module: there is no such module"),
        ("--nodes 4:2 train.py", "--nodes '4:2': give a number from 1"),
        ("--nodes 0 train.py", "--nodes '0'"),
        ("--nodes 1:2:3 train.py", "--nodes '1:2:3'"),
        ("--nodes 2 train.py", "give --rendezvous a shared file or host:port"),
        ("--rendezvous node0:http train.py", "'node0:http': is not host:port"),
        ("--rendezvous node0:70000 train.py", "is not host:port"),
        ("--rendezvous node0:1,node0:1 train.py", "names an endpoint twice"),
        ("--rendezvous no/such/file train.py", "the folder no/such does not exist on this machine"),
        ("--rendezvous package/ train.py", "is a folder; name a file in it, such as package/rendezvous"),
        ("--rendezvous notes.txt train.py", "notes.txt: is a file of another kind"),
        ("--rendezvous-conf keepalive=1 train.py", "--rendezvous-conf keepalive: is none of last_call_timeout"),
        ("--rendezvous-conf read_timeout=0 train.py", "read_timeout=0: give a whole number from 1"),
        ("--processes-per-node two train.py", "--processes-per-node 'two'"),
        ("--job-id a/b train.py", "--job-id 'a/b'"),
        ("--max-restarts -1 train.py", "cannot be negative"),
    ],
)
def test_senseless_command_line_is_refused_in_a_sentence(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback out of torchrun, minutes later and on every node, or a diary that was written over."""
    assert main(["launch", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert Path("notes.txt").read_text() == "dear diary"


@pytest.mark.usefixtures("folder")
def test_agent_is_started_with_what_torchrun_needs() -> None:
    """torchrun's defaults, with which a node that joins blocks the job, and a dead one is noticed late."""
    given = settings("--nodes", "1:4", "--rendezvous", "n0:5", "--rendezvous-conf", "join_timeout=60", "-m", "package.train", "--x", "1")
    command = agent_command(given, "n0:5", "job-1", "n3")
    assert command[-3:] == ["package.train", "--x", "1"]
    assert {"--nnodes=1:4", "--rdzv-endpoint=n0:5", "--rdzv-id=job-1", "--local-addr=n3", "--max-restarts=100", "--module"} < set(command)
    (conf,) = (word.partition("=")[2] for word in command if word.startswith("--rdzv-conf="))
    values = dict(part.split("=") for part in conf.split(","))
    assert values == {key: str(value) for key, value in RENDEZVOUS.items()} | {"store_type": "tcp", "join_timeout": "60"}
    assert "store_type=file" in str(agent_command(given, "/shared/rdzv", "job-1", None))


def test_environment_of_an_operator_does_not_reach_the_agent() -> None:
    """An empty PET_STANDALONE, which Kubernetes' operator sets, and with which torchrun ends."""
    inherited = {"PET_STANDALONE": "", "HOME": "/root", "OMP_NUM_THREADS": "7", SECRET_VARIABLE: TEXT}
    environment = agent_environment(inherited, "job", "/tmp/x", 12, Path("/tmp/secret"))
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment[OUTCOME_VARIABLE] == "/tmp/x"
    assert (environment["HOME"], environment["OMP_NUM_THREADS"]) == ("/root", "7")
    assert "PET_STANDALONE" not in environment
    assert environment[SECRET_FILE_VARIABLE] == "/tmp/secret" and TEXT not in environment.values()
    assert [threads_each(8, processes) for processes in (1, 3, 16)] == [8, 2, 1]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (End(0, 99), 0),
        (End(FAILED, 99, Outcome(Ending.FINISHED, "done")), 0),
        (End(TERMINATED, 5, Outcome(Ending.REFUSED, "no such file")), 2),
        (End(TERMINATED, 5, Outcome(Ending.NO_PROGRESS, "no progress")), 4),
        (End(TERMINATED, 5, Outcome(Ending.INTERRUPTED, "Ctrl-C")), 130),
        (End(TERMINATED, 5, Outcome(Ending.LEFT, "left")), 75),
        (End(CLOSED, 5), 0),
        (End(IN_VAIN, 5), None),
        (End(KILLED_AT_ONCE, 5), None),
        (End(OBSTRUCTED, 5, Outcome(Ending.WAITING, "the disk is full.")), None),
        (End(TERMINATED, 5, Outcome(Ending.WAITING, "the disk is full."), signal.SIGTERM), 143),
        (End(TERMINATED, 5, Outcome(Ending.DIVERGED, "nan")), 2),
        (End(FAILED, 999), None),
        (End(FAILED, 5, Outcome(Ending.PEER_LOST, "a peer was lost")), None),
        (End(RENDEZVOUS_LOST, 5, Outcome(Ending.LEFT, "left")), None),
        (End(BY_SIGKILL, 5, Outcome(Ending.LEFT, "left")), None),
        (End(TERMINATED, 5, Outcome(Ending.LEFT, "left"), moved=True), None),
        (End(TERMINATED, 5, Outcome(Ending.LEFT, "left"), signal.SIGTERM), 75),
        (End(TERMINATED, 5, Outcome(Ending.PEER_LOST, "a peer was lost"), signal.SIGTERM), 143),
        (End(BY_SIGTERM, 5, None, signal.SIGUSR1), 143),
        (End(BY_SIGTERM, 5, None, signal.SIGINT), 130),
        (End(BY_SIGTERM, 5, Outcome(Ending.LEFT, "SIGTERM: left after step 6"), signal.SIGINT), 130),
        (End(0, 5, None, signal.SIGTERM), 0),
    ],
)
def test_end_of_an_agent_means(end: End, code: int | None) -> None:
    """A node that leaves for good because its agent was killed, comes back though it was told to go, or calls a failure a success."""
    assert History().judge(end).exit_code == code


def test_other_state_counts_when_it_comes_twice_in_a_row() -> None:
    """A healthy machine that is given up after one cosmic ray; a broken one that is not."""
    broken, lost = (
        End(TERMINATED, 50, Outcome(Ending.HARDWARE, "rank 1 differs")),
        End(FAILED, 50, Outcome(Ending.PEER_LOST, "a peer was lost")),
    )
    history = History()
    assert [history.judge(end).exit_code for end in (broken, lost, broken, broken)] == [None, None, None, 3]


def test_waits_grow_and_begin_anew_once_an_agent_has_lasted() -> None:
    """A node that hammers a dead rendezvous, or one that waits a minute after every single loss of a long job."""
    assert [backoff(number) for number in (1, 2, 3, 6, 7, 5000)] == [1, 2, 4, 32, 60, 60]
    history = History()
    ends = [End(RENDEZVOUS_LOST, seconds) for seconds in (5, 5, 5, 121, 5)]
    assert [history.judge(end).wait for end in ends] == [1, 2, 4, 1, 2]
    assert history.judge(End(TERMINATED, 5, moved=True)).wait == 0


def until_given_up(history: History, ends: Iterable[End]) -> tuple[int, float] | None:
    """The end after which the launcher gives up, counted from 1, and the seconds until then."""
    passed = 0.0
    for number, end in enumerate(ends, 1):
        verdict = history.judge(end)
        passed += end.seconds
        if verdict.exit_code is not None:
            assert verdict.exit_code == FAILED
            return number, passed
        passed += verdict.wait
    return None


def test_a_script_that_fails_at_once_is_given_up_after_five_times_and_half_a_minute() -> None:
    """Endless starts of what cannot start; a job that is given up because a share had a bad moment, or while its rendezvous host
    reboots."""
    crash, lost, long, typo = End(FAILED, 3), End(RENDEZVOUS_LOST, 3), End(FAILED, 300), End(IN_VAIN, 6)
    said = End(FAILED, 3, Outcome(Ending.FAILED, "failed: KeyError: 7"))
    for end, expected in ((crash, MOST_VAIN_ENDS), (said, MOST_VAIN_ENDS), (End(FAILED, 0.1), MOST_VAIN_ENDS + 1), (typo, 4)):
        number, seconds = until_given_up(History(), repeat(end)) or (0, 0.0)
        assert number == expected and seconds >= LEAST_VAIN_SECONDS
    before = [crash] * (MOST_VAIN_ENDS - 1)
    assert until_given_up(History(), [*before, lost, *before, long, *before]) is None


@pytest.mark.parametrize(
    "end", [End(KILLED_AT_ONCE, 3), End(BY_SIGKILL, 3), End(-signal.SIGBUS, 3)], ids=["workers", "agent", "shared memory is full"]
)
def test_sudden_deaths_never_end_a_job_and_slow_it_down(end: End) -> None:
    """A job that is over for good because a machine was short of memory five times in a row."""
    history = History()
    verdicts = [history.judge(end) for _ in range(50)]
    assert {verdict.exit_code for verdict in verdicts} == {None}
    assert [verdict.wait for verdict in verdicts[:8]] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_what_time_can_mend_is_waited_for_and_said_once() -> None:
    """A job that is over because of a dead node's lock, or a full disk that somebody makes room on; and a line for each try."""
    history = History()
    full, busy = (End(OBSTRUCTED, 12, Outcome(Ending.WAITING, reason)) for reason in ("the disk is full.", "another job is there."))
    verdicts = [history.judge(end) for end in [full] * 9 + [busy] * 2 + [End(FAILED, 3), busy]]
    assert {verdict.exit_code for verdict in verdicts} == {None}
    assert [verdict.wait for verdict in verdicts] == [1, 2, 4, 8, 16, *[30] * 6, 1, 1]
    assert [verdict.reason for verdict in verdicts if verdict.reason] == [
        "waiting: the disk is full. Trying again in 1 s, and so on",
        "waiting: another job is there. Trying again in 30 s, and so on",
        "torchrun ended with code 1; starting again in 1 s",
        "waiting: another job is there. Trying again in 1 s, and so on",
    ]


class Workers:
    """Starts of an agent whose workers end as a test says."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.path = folder / "outcome.json"
        self.exit_codes: Sequence[int] = ()
        self.counter = RestartCounter(self.path, lambda: self.now, lambda: self.exit_codes)

    def run(self, seconds: float, *exit_codes: int, said: Ending | None = None, resized: bool = False) -> int | None:
        """One start; returns what the agent is to do after it."""
        self.counter.begun()
        self.now += seconds
        self.exit_codes = exit_codes
        if said is not None:
            write_outcome(self.path, Outcome(said, ""))
        return self.counter.before(resized)


def test_workers_that_fail_at_once_are_left_to_the_launcher(tmp_path: Path) -> None:
    """A hundred tracebacks of one typo; a node that is given up because others came and went."""
    workers = Workers(tmp_path)
    assert workers.counter.before(resized=False) is None
    assert [workers.run(1, 1) for _ in range(2)] == [None] * 2
    assert workers.run(40, 1) is None
    assert [workers.run(1, 1) for _ in range(2)] == [None] * 2
    assert workers.run(1, 1, resized=True) is None
    assert [workers.run(1, RESTART, said=Ending.PEER_LOST) for _ in range(9)] == [None] * 9
    assert [workers.run(1, 1, said=said) for said in (None, Ending.FAILED, None)] == [None, None, IN_VAIN]


@pytest.mark.parametrize(
    "exit_codes", [(-9,), (-9, 1), (1, -7), (-9, RESTART), (LEFT, -15), (RESTART, -15)], ids=lambda codes: " ".join(map(str, codes))
)
def test_workers_that_are_killed_at_once_slow_the_node_down_and_no_more(exit_codes: tuple[int, ...], tmp_path: Path) -> None:
    """A job that is over for good because its processes were killed while they started, or missed one that was."""
    workers = Workers(tmp_path)
    assert [workers.run(1, *exit_codes) for _ in range(3)] == [None, None, KILLED_AT_ONCE]


def test_workers_that_wait_leave_the_waiting_to_the_launcher(tmp_path: Path) -> None:
    """A hundred starts in a row against a lock; or an agent that is started anew because a loader's disk had the hiccups after hours."""
    workers = Workers(tmp_path)
    assert workers.run(300, RESTART, said=Ending.WAITING) is None
    assert workers.run(12, RESTART, said=Ending.WAITING) == OBSTRUCTED
    assert read_outcome(workers.path) == Outcome(Ending.WAITING, "")
    slow = Workers(tmp_path)
    assert [slow.run(40, RESTART, said=Ending.WAITING) for _ in range(2)] == [None, OBSTRUCTED], (
        "imports from a slow share take half a minute"
    )


def test_last_words_end_the_agent_and_a_departure_on_its_order_does_not(tmp_path: Path) -> None:
    """A refusal that is tried a hundred times; a node that leaves for good because another one has joined."""
    path = tmp_path / "outcome.json"
    for ending, ends in (
        *((ending, True) for ending in (Ending.REFUSED, Ending.NO_PROGRESS, Ending.FINISHED, Ending.HARDWARE)),
        *((ending, False) for ending in (Ending.LEFT, Ending.PEER_LOST, Ending.WAITING)),
    ):
        write_outcome(path, Outcome(ending, "why"))
        assert RestartCounter(path, time.monotonic, list).before(resized=True) == (FAILED if ends else None)
        assert read_outcome(path) == (Outcome(ending, "why") if ends else None)
    path.write_text("{")
    assert read_outcome(path) is None


def test_of_a_nodes_processes_the_first_cause_is_believed(tmp_path: Path) -> None:
    """A bug in the second process that is told as the loss of a peer, for ever."""
    path = tmp_path / "outcome.json"
    write_outcome(tmp_path / "outcome.json.1", Outcome(Ending.FAILED, "KeyError: 7"))
    assert read_outcome(path) == Outcome(Ending.FAILED, "KeyError: 7")
    for ending in (Ending.PEER_LOST, Ending.LEFT):
        write_outcome(path, Outcome(ending, "it is gone"))
        assert read_outcome(path) == Outcome(Ending.FAILED, "KeyError: 7")
    clear_outcome(path)
    assert list(tmp_path.iterdir()) == []
    write_outcome(path, Outcome(Ending.FINISHED, "done"))
    write_outcome(tmp_path / "outcome.json.1", Outcome(Ending.FAILED, "at the very end"))
    assert read_outcome(path) == Outcome(Ending.FINISHED, "done")


@pytest.mark.parametrize(("code", "ending"), [(2, Ending.REFUSED), (HARDWARE, Ending.HARDWARE), (75, Ending.LEFT), (7, Ending.UNKNOWN)])
def test_a_script_of_another_make_may_say_a_code_only(code: int, ending: Ending, tmp_path: Path) -> None:
    """Scripts that told the launcher why they end are not heard any more."""
    (tmp_path / "outcome.json").write_text(f'{{"code": {code}, "reason": "why"}}')
    assert read_outcome(tmp_path / "outcome.json") == Outcome(ending, "why")


class Cluster:
    """Looks of one launcher, second by second."""

    def __init__(self, patience: float = 60.0, endpoints: int = 2) -> None:
        self.attachment = EndpointElection(patience, 0.0)
        self.now = 0.0
        self.failures = [0] * endpoints

    def see(self, *launchers: int | None, times: int = 1) -> Target | None:
        """The numbers of launchers at the endpoints (None: no answer), for so many seconds."""
        for _ in range(times):
            self.now += 1.0
            self.failures = [0 if count is not None else failed + 1 for count, failed in zip(launchers, self.failures, strict=True)]
            looks = [Look(count or 0, failed) for count, failed in zip(launchers, self.failures, strict=True)]
            target = self.attachment.update(looks, self.now)
        return target


def index(target: Target | None) -> int | None:
    """Where it is."""
    return None if target is None else target.index


def test_first_endpoint_is_waited_for_at_the_start_only() -> None:
    """Two halves of a job, because one host was a minute later than the other."""
    cluster = Cluster(patience=60)
    assert cluster.see(None, 0, times=59) is None
    assert index(cluster.see(0, 0)) == 0
    late = Cluster(patience=60)
    assert late.see(None, 0, times=59) is None
    assert index(late.see(None, 0, times=2)) == 1
    assert Cluster(endpoints=1).see(None, times=500) is None


def test_nothing_is_decided_before_every_endpoint_was_looked_at() -> None:
    """A host that is back begins a second job on its own empty store, because it has not seen the first yet."""
    attachment = EndpointElection(60.0, 0.0)
    assert attachment.update([Look(0, 0), None], 30.0) is None
    assert index(attachment.update([Look(0, 0), Look(3, 0)], 31.0)) == 1


def test_host_that_is_back_after_a_moment_lets_the_others_find_it_again() -> None:
    """A newcomer that begins another run on an empty store, a blink before the survivors tell it of theirs."""
    cluster = Cluster()
    assert cluster.see(0, 0) is None
    assert index(cluster.see(2, 0)) == 0


def test_survivors_of_a_lost_endpoint_come_to_the_same_next_one() -> None:
    """A job that ends with its rendezvous host, or goes on in as many pieces as it has nodes."""
    cluster = Cluster(endpoints=3)
    first = cluster.see(3, 0, 0, times=3)
    assert first == Target(0, 1, answers=True)
    assert cluster.see(None, 0, 0, times=LOST_AFTER - 1) == Target(0, 1, answers=False)
    assert cluster.see(None, 0, 0) == Target(1, 2, answers=True)
    later = Cluster(endpoints=3)
    later.see(3, 0, 0, times=3)
    assert index(later.see(None, 0, 1, times=LOST_AFTER)) == 2, "another survivor has gone there already"


def test_endpoint_that_is_back_after_it_was_lost_is_another_one() -> None:
    """An agent that hangs on a connection which nobody holds at the other end."""
    cluster = Cluster(endpoints=1)
    cluster.see(1, times=3)
    assert cluster.see(None, times=10) is None
    assert cluster.see(0) == Target(0, 2, answers=True)


def test_smaller_part_gives_way_when_it_sees_the_other_again() -> None:
    """Two jobs for ever after a network was split for a minute."""
    small, large = Cluster(), Cluster()
    small.see(1, None, times=3)
    large.see(None, 2, times=61)
    assert index(large.see(1, 2, times=10)) == 1
    assert index(small.see(1, 2, times=OUTVOTED_AFTER - 1)) == 0, "launchers on their way are counted twice for a moment"
    assert index(small.see(1, 2)) == 1


def test_of_equal_parts_the_one_at_the_later_endpoint_gives_way() -> None:
    """Two parts that change places for ever."""
    first, second = Cluster(), Cluster()
    first.see(1, None, times=3)
    second.see(None, 1, times=62)
    assert index(first.see(1, 1, times=10)) == 0
    assert index(second.see(1, 1, times=OUTVOTED_AFTER)) == 0


def test_this_machine_is_known_by_its_addresses_or_by_the_name_it_was_given() -> None:
    """A rendezvous that no host serves."""
    assert is_here("localhost", None)
    assert is_here("127.0.0.2", None)
    assert not is_here("192.0.2.7", None), "reserved for documentation"
    assert not is_here("no-such-host.invalid", None)
    assert is_here("node0", "node0")
    assert not is_here("localhost", "node0")


@pytest.fixture
def server() -> Iterator[tuple[KeyValueServer, Endpoint, list[float]]]:
    """A served store, where it is, and the time by its clock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    now = [100.0]
    endpoint = Endpoint("127.0.0.1", port)
    server = KeyValueServer(endpoint, SECRET, clock=lambda: now[0])
    yield server, endpoint, now
    server.close()


Served = tuple[KeyValueServer, Endpoint, list[float]]


@pytest.fixture(params=["file", "tcp", "dictionary"])
def store(request: pytest.FixtureRequest, tmp_path: Path, server: Served) -> KeyValueStore:
    """Every kind of store."""
    if request.param == "tcp":
        return TcpKeyValueStore(server[1], SECRET, 5.0)
    return FileKeyValueStore(tmp_path / "board", SECRET) if request.param == "file" else InMemoryKeyValueStore()


def test_values_are_set_and_swapped(store: KeyValueStore) -> None:
    """Nodes that disagree on who is in the job."""
    anything = bytes(range(256))
    store.write({"a": anything, "torch.rendezvous.run/b": b""})
    assert store.read(["a", "b", "torch.rendezvous.run/b"]) == [anything, None, b""]
    assert (store.add("n", 2), store.add("n", -5)) == (2, -3)
    assert store.swap("s", b"", b"one") == b"one"
    assert store.swap("s", b"", b"two") == b"one"
    assert store.swap("s", b"one", b"two") == b"two"


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_changes_of_several_nodes_do_not_get_lost(kind: str, tmp_path: Path, server: Served) -> None:
    """A barrier that waits for ever for a node which was there."""

    def count() -> None:
        store: KeyValueStore = FileKeyValueStore(tmp_path / "board", SECRET) if kind == "file" else TcpKeyValueStore(server[1], SECRET, 5.0)
        for _ in range(25):
            store.add("n", 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store: KeyValueStore = FileKeyValueStore(tmp_path / "board", SECRET) if kind == "file" else TcpKeyValueStore(server[1], SECRET, 5.0)
    assert store.read(["n"]) == [b"100"]


@pytest.mark.timeout(30)
def test_a_store_ends_while_others_are_asking(server: Served) -> None:
    """Loss: the launcher that serves it hangs for a minute at the job's end, because a connection has not noticed that it is to end."""
    started = threading.Barrier(9)

    def ask() -> None:
        store = TcpKeyValueStore(server[1], SECRET, 5.0)
        started.wait()
        with contextlib.suppress(OSError, EOFError):
            while True:
                store.read(["n"])

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in asking:
        thread.start()
    started.wait()
    time.sleep(0.05)  # in the middle of it
    server[0].close()
    for thread in asking:
        thread.join(10)
    assert not any(thread.is_alive() for thread in asking), "who asked has noticed it"


@pytest.mark.parametrize("bytes_written", [0, 1, 16, 20])
def test_change_that_was_cut_short_has_not_happened(bytes_written: int, tmp_path: Path) -> None:
    """A rendezvous that no node can read any more, because one was killed while it wrote, or the disk was full."""
    path = tmp_path / "board"
    store = FileKeyValueStore(path, SECRET)
    store.write({"a": b"1"})
    store.write({"a": b"2"})
    before = path.read_bytes()
    store.write({"a": b"3"})
    after = path.read_bytes()
    first = next(position for position in range(len(before)) if before[position] != after[position])
    path.write_bytes(before[:first] + after[first : first + bytes_written] + before[first + bytes_written :])
    assert store.read(["a"]) == [b"2"]
    store.write({"a": b"4"})
    assert store.read(["a"]) == [b"4"]


def test_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    """A configuration that a mistyped --rendezvous has overwritten."""
    path = tmp_path / "config.yaml"
    path.write_text("model: n")
    with pytest.raises(OSError, match="is a file of another kind"):
        FileKeyValueStore(path, SECRET).write({"a": b"1"})
    assert path.read_text() == "model: n"


def test_store_does_not_grow_with_the_rounds() -> None:
    """A rendezvous file of gigabytes after a month of spot machines."""
    store = InMemoryKeyValueStore()
    store.write({"torch.rendezvous.run": b"state", "job/run": b"run"})
    for number in range(50):
        store.write({f"torch.rendezvous.run.{number}/{name}": b"x" for name in "abc"})
    assert len(store.content) == 2 + 2 * 3
    assert store.read(["torch.rendezvous.run", "torch.rendezvous.run.49/a", "torch.rendezvous.run.48/a"]).count(None) == 0


def test_launchers_are_counted_while_they_are_heard_of(server: Served) -> None:
    """A dead launcher that others keep waiting for, or a living one that they do not see."""
    server_, endpoint, now = server
    first, second = TcpKeyValueStore(endpoint, SECRET, 5.0), TcpKeyValueStore(endpoint, SECRET, 5.0)
    assert first.launchers("job", "a", goes_by_it=True) == 1
    assert second.launchers("job", "b", goes_by_it=False) == 1, "who only looks is not counted"
    assert second.launchers("job", "b", goes_by_it=True) == 2
    assert second.launchers("other job", "b", goes_by_it=False) == 0
    now[0] += LIVE_SECONDS / 2
    first.launchers("job", "a", goes_by_it=True)
    now[0] += LIVE_SECONDS / 2
    assert server_.launchers("job") == 1
    assert first.launchers("job", "a", goes_by_it=False) == 0


def test_store_that_was_lost_stays_lost(server: Served) -> None:
    """An agent that goes on with an empty store, on which it is no member, and never hears of those who come."""
    _, endpoint, _ = server
    store = TcpKeyValueStore(endpoint, SECRET, 5.0)
    store.write({"a": b"1"})
    store.close()
    with pytest.raises(ConnectionError, match="was lost"):
        store.read(["a"])


def test_server_that_does_not_answer_is_noticed() -> None:
    """A node that hangs for a quarter of an hour on a machine that is gone without a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        TcpKeyValueStore(Endpoint("127.0.0.1", silent.getsockname()[1]), SECRET, 0.2)


def test_server_outlives_what_is_no_request(server: Served) -> None:
    """A port scan that ends a job."""
    _, endpoint, _ = server
    for line in (b"GET / HTTP/1.0\r\n\r\n", b"{}\n", b'{"do": "dance", "job": ""}\n', b"\x16\x03\x01"):
        with socket.create_connection((endpoint.host, endpoint.port), 5.0) as client:
            client.sendall(line)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(GREETING_BYTES + 1) + client.recv(1) != b"", "it greets"
            assert client.recv(100) == b""
    assert TcpKeyValueStore(endpoint, SECRET, 5.0).read(["a"]) == [None]


@pytest.mark.parametrize("names", [numbered("job"), random_name])
def test_nodes_agree_on_a_run_until_it_has_succeeded(names: Callable[[str | None], str]) -> None:
    """A rendezvous file that serves once; a `--fresh` that counts again after every restart."""
    store = InMemoryKeyValueStore()
    first = agree_on_run(store, "job", None, names)
    assert agree_on_run(store, "job", None, names) == agree_on_run(store, "job", first, names) == first
    close_run(store, "job", first)
    with pytest.raises(JobDone):
        agree_on_run(store, "job", first, names)
    second = agree_on_run(store, "job", None, names)
    assert second != first
    assert agree_on_run(store, "job", None, names) == second
    with pytest.raises(JobDone):
        agree_on_run(store, "job", first, names)
    assert agree_on_run(store, "another job", None, names) is not None


def test_run_outlives_its_store() -> None:
    """A rendezvous host's restart that workers take for another job's start."""
    store = InMemoryKeyValueStore()
    claim_run(store, "job", "gai-yolo-1234")
    assert agree_on_run(store, "job", None, random_name) == "gai-yolo-1234"
    assert agree_on_run(InMemoryKeyValueStore(), "job", "gai-yolo-1234", random_name) == "gai-yolo-1234"
    assert [numbered("job")(before) for before in (None, "job-1", "job-41")] == ["job-1", "job-2", "job-42"]


class BrokenStore(InMemoryKeyValueStore):
    """Its host is gone."""

    def write(self, values: Mapping[str, bytes]) -> None:
        """Nobody answers."""
        del values
        raise TimeoutError("timed out")


def test_store_serves_torch_as_one_of_its_own(store: KeyValueStore) -> None:
    """An agent that finds out in the middle of a rendezvous that its store is none."""
    of_python = TorchStore(store, 0.3)
    of_torch: Any = PrefixStore("torch.rendezvous.run.0", of_python)
    of_torch.set("a", "1")
    of_torch.multi_set(["b", "c"], ["2", "3"])
    assert (of_torch.get("a"), of_torch.multi_get(["a", "b", "c"])) == (b"1", [b"1", b"2", b"3"])
    assert (of_torch.add("n", 3), of_torch.check(["a", "b"]), of_torch.check(["a", "z"])) == (3, True, False)
    assert (of_torch.compare_set("s", "", "x"), of_torch.compare_set("s", "y", "z")) == (b"x", b"x")
    with pytest.raises(StoreLost, match="no node has written"):
        of_torch.get("z")
    broken = TorchStore(BrokenStore(), 0.3)
    with pytest.raises(StoreLost, match="timed out"):
        PrefixStore("x", broken).set("a", "1")


@pytest.fixture
def meet(tmp_path: Path) -> Callable[[], StoreRendezvous]:
    """Makes the rendezvous of another agent of a job of one or two nodes, with a shared file."""

    def meet() -> StoreRendezvous:
        conf = {**RENDEZVOUS, "last_call_timeout": 1}
        parameters = RendezvousParameters(BACKEND, str(tmp_path / "board"), "run", 1, 2, "localhost", **conf)
        return StoreRendezvous(parameters, "job", RestartCounter(tmp_path / "outcome.json", time.monotonic, list))

    return meet


@pytest.mark.timeout(60)
def test_failure_of_an_agent_does_not_close_the_job_for_all_nodes(meet: Callable[[], StoreRendezvous]) -> None:
    """One node's crash, after which no node can ever start again; and a wait for a node that has said good-bye."""
    first = meet()
    assert first.next_rendezvous().world_size == 1
    first.shutdown()
    first.leave()
    second = meet()
    began = time.monotonic()
    assert second.next_rendezvous().world_size == 1
    assert time.monotonic() - began < 5.0, "a dead node is waited for 6 s"
    second.set_closed()
    with pytest.raises(RendezvousClosedError):
        meet().next_rendezvous()
    second.leave()


@pytest.mark.timeout(60)
def test_agent_does_not_start_workers_that_have_refused(meet: Callable[[], StoreRendezvous], tmp_path: Path) -> None:
    """A hundred restarts of what a person has to mend, where a worker could not tell its agent."""
    write_outcome(tmp_path / "outcome.json", Outcome(Ending.REFUSED, "no such file"))
    with pytest.raises(StopStarting):
        meet().next_rendezvous()


def test_launch_error_is_a_refusal() -> None:
    """Exit code 2 is what the table says."""
    assert LaunchError("").exit_code == 2
