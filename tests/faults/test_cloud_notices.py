"""Notices of three clouds that come, come late, are withdrawn, or lie."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from gai_yolo.errors import ConfigError
from gai_yolo.log import showing
from gai_yolo.supervision.cloud import watch as metadata
from gai_yolo.supervision.cloud.http import MOST_UNANSWERED, HttpClient
from gai_yolo.supervision.cloud.providers import CloudNotice, Provider
from gai_yolo.supervision.cloud.watch import CloudWatch, machine_vendor
from tests.faults.metadata_servers import FLOOD_BYTES, LIES, SERVERS, AwsServer, AzureServer, GcpServer, Lie, MetadataServer, Reply, Request

POLL = 0.05
PATIENCE = 60.0
"""Seconds that something may take on a machine that is busy with other things."""
SLOW: set[Lie] = {"hang", "drip", "continue"}
"""Lies that last until the question is given up."""
QUICK = [lie for lie in LIES if lie not in SLOW]
LIES_OF_CLOUDS = [(cloud, lie) for cloud in sorted(SERVERS) for lie in LIES if lie not in SLOW or lie == "hang" or cloud == "aws"]
"""How slowly an answer comes has nothing to do with the cloud."""


@pytest.fixture(params=sorted(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[MetadataServer]:
    """The service of each cloud."""
    with SERVERS[request.param]() as server:
        yield server


class Watching:
    """A watch, and what it has said."""

    def __init__(self, server: MetadataServer, auto: bool = False, poll_seconds: float = POLL) -> None:
        self.told: list[str] = []
        self.watch = CloudWatch("auto" if auto else server.provider, server.url, poll_seconds)
        self.server = server

    def until(self, condition: Callable[[CloudNotice | None], bool]) -> CloudNotice | None:
        wait_until(lambda: condition(self.watch.notice()))
        return self.watch.notice()

    def until_noticed(self, leave: bool = True) -> CloudNotice:
        notice = self.until(lambda notice: notice is not None and notice.leave == leave)
        assert notice is not None and notice.provider == self.server.provider
        return notice

    def let_lie(self, lie: Lie) -> None:
        """Let the server lie until the watch has met with each wrong answer, or at least one lie of another kind."""
        self.server.lie = lie
        before = self.server.lied
        lies = len(self.server.wrong) if lie == "wrong" else 1
        wait_until(lambda: self.server.lied > before + lies)  # one more: the last may still be on its way


@contextlib.contextmanager
def watching(server: MetadataServer, auto: bool = False, poll_seconds: float = POLL) -> Iterator[Watching]:
    """Watches while the test runs; afterwards no thread may be left."""
    before = threading.excepthook
    raised: list[object] = []
    threading.excepthook = raised.append
    watcher = Watching(server, auto, poll_seconds)
    with showing(lambda record: watcher.told.append(record.getMessage())):
        watcher.watch.start()
        try:
            yield watcher
        finally:
            watcher.watch.close()
            threading.excepthook = before
    assert raised == []
    wait_until(lambda: not threads())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cloud-notices"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def wait_for_rounds(server: MetadataServer, rounds: int = 1) -> None:
    """Wait until every question was put so often again."""
    last = {"aws": "rebalance", "gcp": "maintenance-event", "azure": "scheduledevents"}[server.provider]
    before = server.count(last)
    wait_until(lambda: server.count(last) > before + rounds)


def test_notice_arrives_and_can_be_read_by_people(server: MetadataServer) -> None:
    """Loss prevented: the machine vanishes with everything since the last snapshot, though it had been announced."""
    with watching(server) as watcher:
        wait_for_rounds(server)
        assert watcher.watch.notice() is None and watcher.told == []
        server.give()
        notice = watcher.until_noticed()
        assert server.served.wait(PATIENCE)  # the server says so after the last byte, the watch may be quicker
    assert (
        notice.what
        == {
            "aws": "spot interruption (terminate) at 2026-11-25T03:00:00Z",
            "gcp": "preemption",
            "azure": "scheduled event Preempt at 2026-11-25T03:00:00Z",
        }[server.provider]
    )
    assert [notice.what in line for line in watcher.told] == [True]


def test_notice_that_stood_before_the_job_is_seen(server: MetadataServer) -> None:
    """Loss prevented: a job that starts on a machine already under notice waits for a change that never comes."""
    server.give()
    with watching(server) as watcher:
        watcher.until_noticed()


def test_withdrawn_notice_stands_no_more_and_may_come_again(server: MetadataServer) -> None:
    """Loss prevented: a node leaves after an interruption was called off, or misses the one that follows."""
    with watching(server) as watcher:
        for _ in range(2):
            server.give()
            watcher.until_noticed()
            server.withdraw()
            watcher.until(lambda notice: notice is None)
    assert sum("withdrawn" in line for line in watcher.told) == 2


def test_advice_is_not_a_reason_to_leave(server: MetadataServer) -> None:
    """Loss prevented: nodes leave on a mere recommendation, and the job has no machines left."""
    with watching(server) as watcher:
        server.advise()
        watcher.until_noticed(leave=False)
        server.give()
        watcher.until_noticed(leave=True)
        server.withdraw()
        watcher.until(lambda notice: notice is None)


@pytest.mark.parametrize(("cloud", "lie"), LIES_OF_CLOUDS)
def test_lie_is_no_notice_and_the_truth_is_heard_after_it(cloud: str, lie: Lie) -> None:
    """Loss prevented: rubbish at the metadata address makes a node leave, or makes it deaf to the notice that follows."""
    with SERVERS[cloud]() as server:
        server.lie = lie
        server.give()  # what is cut in half is a notice
        with watching(server) as watcher:
            watcher.let_lie(lie)
            assert watcher.watch.notice() is None
            server.lie = None
            watcher.until_noticed()
        assert server.flooded < FLOOD_BYTES


@pytest.mark.parametrize("lie", QUICK)
def test_standing_notice_survives_failed_polls(server: MetadataServer, lie: Lie) -> None:
    """Loss prevented: a notice is forgotten because the service stumbles in the last seconds of the machine."""
    server.give()
    with watching(server) as watcher:
        notice = watcher.until_noticed()
        watcher.let_lie(lie)
        server.withdraw()  # "nothing" that comes in half is not yet nothing
        watcher.let_lie(lie)
        assert watcher.watch.notice() == notice
        server.lie = None
        watcher.until(lambda notice: notice is None)


def test_failing_service_is_not_asked_in_a_frenzy_and_told_of_once(server: MetadataServer) -> None:
    """Loss prevented: a thread that spins on a broken service takes a core from training and fills the log."""
    server.lie, server.lies_always = "error", True
    began = time.monotonic()
    with watching(server) as watcher:
        wait_until(lambda: watcher.told != [])
        count = len(server.requests)
        rounds = (time.monotonic() - began) / POLL + 2
        wait_until(lambda: len(server.requests) > 2 * count)
    assert count <= 2 * rounds
    assert len(watcher.told) == 1 and "elastic.notices" in watcher.told[0] and "500" in watcher.told[0]


def test_answer_at_once_to_a_question_that_should_hang_does_not_spin() -> None:
    """Loss prevented: a proxy that knows nothing of `wait_for_change` makes the watch ask as fast as it can."""

    class Hasty(GcpServer):
        def answer(self, request: Request) -> Reply:
            return super().answer(Request(request.method, request.path, {}, request.headers))

    with Hasty() as server:
        began = time.monotonic()
        with watching(server):
            wait_until(lambda: server.count("preempted") >= 10)
        assert server.count("preempted") <= (time.monotonic() - began) / POLL + 2


def test_change_is_heard_while_the_question_hangs() -> None:
    """Loss prevented: of Google's 30 s a good part is over before anybody asks."""

    class Sudden(GcpServer):
        hanging: ClassVar[list[Reply]] = []

        def answer(self, request: Request) -> Reply:
            if "wait_for_change" not in request.query:
                return super().answer(request)
            threading.Timer(POLL, self.give).start()
            reply = super().answer(request)
            self.hanging.append(reply)
            return reply

    with Sudden() as server, watching(server) as watcher:
        watcher.until_noticed()
    assert server.hanging[0].is_notice


def test_expired_token_is_renewed_within_the_same_poll() -> None:
    """Loss prevented: six hours into the run the watch is deaf, because its token has expired."""
    with AwsServer() as server, watching(server) as watcher:
        wait_for_rounds(server)
        assert server.tokens_given == 1
        server.give()
        watcher.until_noticed()
        server.expire_tokens()
        wait_until(lambda: server.tokens_given == 2)
        wait_for_rounds(server)
        assert server.tokens_given == 2 and watcher.watch.notice() is not None
        asked = [request.path for request in list(server.requests)]
        renewal = asked.index("/latest/api/token", 1)
        assert asked[renewal - 1] == asked[renewal + 1]
        server.withdraw()
        watcher.until(lambda notice: notice is None)


@pytest.mark.parametrize("action", ["stop", "hibernate"])
def test_spot_machines_that_are_stopped_go_away_too(action: str) -> None:
    """Loss prevented: only `terminate` is heeded, and a stopped machine is waited for until the others time out."""
    with AwsServer() as server, watching(server) as watcher:
        server.give(action)
        assert action in watcher.until_noticed().what


def test_event_of_another_machine_is_not_ours() -> None:
    """Loss prevented: Azure tells every machine of a scale set of each one's preemption, and all leave."""
    with AzureServer() as server, watching(server) as watcher:
        server.give(machine="machine_8")
        wait_for_rounds(server)
        assert watcher.watch.notice() is None
        server.give(begun=True)
        assert watcher.until_noticed().what == "scheduled event Preempt now"


def test_any_event_counts_while_the_own_name_is_not_known() -> None:
    """Loss prevented: a machine that cannot learn its name takes every notice for another's."""
    with AzureServer() as server:
        server.name = None
        with watching(server) as watcher:
            server.give("Terminate", machine="machine_8")
            assert "Terminate" in watcher.until_noticed().what


def test_broken_event_of_another_does_not_hide_ours() -> None:
    """Loss prevented: one entry in a format not known yet makes the list unreadable."""
    with AzureServer() as server, watching(server) as watcher:
        server.events = [{"EventType": 5}, None]
        server.give("Freeze")
        wait_for_rounds(server)
        assert watcher.watch.notice() is None
        server.give()
        watcher.until_noticed()


def test_moving_to_another_host_is_no_notice() -> None:
    """Loss prevented: a node leaves because of a live migration, which costs it a second."""
    with GcpServer() as server, watching(server) as watcher:
        server.migrate()
        wait_for_rounds(server)
        assert watcher.watch.notice() is None


def test_auto_finds_out_whose_cloud_it_is(server: MetadataServer) -> None:
    """Loss prevented: nobody configures it, and no notice is heard."""
    with watching(server, auto=True) as watcher:
        server.give()
        watcher.until_noticed()


def test_auto_ends_without_a_word_where_there_is_no_cloud(told: list[str]) -> None:
    """Loss prevented: every job on a workstation keeps a thread that asks for ever, and warns of it."""
    with AwsServer() as server:
        url = server.url
    watch = CloudWatch("auto", url, POLL)
    watch.start()
    wait_until(lambda: not threads())
    assert watch.notice() is None and told == []
    watch.close()


@pytest.mark.parametrize("lie", [*QUICK, "hang"])
def test_auto_takes_no_liar_for_a_cloud(lie: Lie, told: list[str]) -> None:
    """Loss prevented: a router that answers everything at that address is taken for a cloud, and complained of in every run."""
    with AwsServer() as server:
        server.lie, server.lies_always = lie, True
        server.give()
        watch = CloudWatch("auto", server.url, POLL)
        watch.start()
        wait_until(lambda: not threads())
        assert server.lied >= 3 and watch.notice() is None and told == []


def test_auto_is_patient_with_a_service_that_stumbles_at_first(server: MetadataServer) -> None:
    """Loss prevented: one lost packet while the machine boots, and no notice is heard for the rest of the run."""
    server.lie, server.lies_always = "drop", True
    with watching(server, auto=True) as watcher:
        wait_until(lambda: server.lied >= 3)
        server.lie = None
        server.give()
        watcher.until_noticed()


@pytest.mark.parametrize("vendor", [None, "azure", "gcp"])
def test_auto_believes_the_firmware_and_not_who_answers(vendor: Provider | None, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """Loss prevented: whoever takes the link-local address of a network without a cloud sends every node away, one false notice each."""
    with AwsServer() as server:
        monkeypatch.setattr(metadata, "ADDRESS", server.url)
        server.give()
        watch = CloudWatch("auto", None, POLL, lambda: vendor)
        watch.start()
        assert vendor is not None or not threads(), "nobody is asked on a machine of nobody's cloud"
        wait_until(lambda: not threads())
        assert watch.notice() is None and told == []
        assert {request.path for request in server.requests} <= {"/computeMetadata/v1/", "/metadata/versions"}
        watch.close()
        watch = CloudWatch("auto", None, POLL, lambda: "aws")
        watch.start()
        wait_until(lambda: watch.notice() is not None)
        watch.close()


@pytest.mark.parametrize(
    ("files", "vendor"),
    [
        ({"sys_vendor": "Amazon EC2", "product_name": "g5.xlarge", "bios_vendor": "Amazon EC2"}, "aws"),
        ({"sys_vendor": "Xen", "product_name": "HVM domU", "bios_version": "4.11.amazon"}, "aws"),
        ({"sys_vendor": "Xen", "uuid": "ec2a5d0e-1d0e-6c8e-9d1d-4f3b2c1d0e9f"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gcp"),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"}, "azure"),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine", "chassis_asset_tag": "1234-5678"}, None),
        ({"sys_vendor": "Google", "product_name": "Pixelbook"}, None),
        ({"sys_vendor": "Xen", "bios_version": "4.17", "uuid": "5ec2a5d0-0000"}, None),
        ({"sys_vendor": "QEMU"}, None),
        ({}, None),
    ],
)
def test_clouds_are_known_by_their_firmware(files: dict[str, str], vendor: Provider | None, tmp_path: Path) -> None:
    """Loss prevented: a spot machine that hears no notice; a workstation under Hyper-V that asks whoever answers."""
    for name, words in files.items():
        (tmp_path / name).write_text(f"{words}\n")
    (tmp_path / "board_vendor").mkdir()  # cannot be read
    assert machine_vendor(tmp_path, tmp_path) == vendor


def test_none_asks_nobody() -> None:
    """Loss prevented: a site that forbids questions to the metadata service is asked all the same."""
    with AwsServer() as server:
        watch = CloudWatch("none", server.url, POLL)
        watch.start()
        assert not threads() and watch.notice() is None
        watch.close()
        assert server.requests == []


@pytest.mark.parametrize("lie", ["hang", "drip"])
def test_close_ends_the_thread_while_an_answer_is_awaited(server: MetadataServer, lie: Lie) -> None:
    """Loss prevented: the end of the job waits for a service that does not answer, while its grace runs out."""
    server.lie, server.lies_always = lie, True
    with watching(server) as watcher:
        wait_until(lambda: server.lied >= 1)
        watcher.watch.close()  # waits for 1 s at most, and a question lasts 2 s
        assert not threads()


def test_questions_without_an_answer_cost_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss prevented: a thread more at each poll, where a name server is away that nobody can cut short."""
    is_back = threading.Event()

    def connect(*_: object, **__: object) -> socket.socket:
        is_back.wait()
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    client = HttpClient("http://metadata.example")

    def waiting() -> int:
        return sum(thread.name == "cloud-question" for thread in threading.enumerate())

    for _ in range(2 * MOST_UNANSWERED):
        with pytest.raises(TimeoutError):
            client.ask("GET", "/", {}, seconds=0.01)
    assert waiting() == MOST_UNANSWERED
    is_back.set()
    wait_until(lambda: waiting() == 0)


def test_proxies_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss prevented: behind a company's proxy the proxy's own machine is asked whether it goes away."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with AwsServer() as server, watching(server) as watcher:
        server.give()
        watcher.until_noticed()


@pytest.mark.parametrize("endpoint", ["10.0.0.1:80", "ftp://10.0.0.1", "http://", "http://10.0.0.1:http", "http://[::1"])
def test_address_that_is_none_is_refused(endpoint: str) -> None:
    """Loss prevented: a typo in the endpoint is found out when the machine is gone."""
    with pytest.raises(ConfigError, match="notices_endpoint"):
        CloudWatch("aws", endpoint)


def test_watch_survives_a_terminal_that_is_gone() -> None:
    """Loss prevented: the watch dies of its own message."""

    def show(record: logging.LogRecord) -> None:
        raise BrokenPipeError(record.getMessage())

    with AwsServer() as server, showing(show):
        watch = CloudWatch("aws", server.url, POLL)
        watch.start()
        for _ in range(2):
            server.give()
            wait_until(lambda: watch.notice() is not None)
            server.withdraw()
            wait_until(lambda: watch.notice() is None)
        watch.close()


def test_servers_can_be_run_as_a_process() -> None:
    """Loss prevented: a cluster of network namespaces cannot be given notice."""
    command = [sys.executable, "-m", "tests.faults.metadata_servers", "aws"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        watch = CloudWatch("auto", process.stdout.readline().strip(), POLL)
        watch.start()
        process.stdin.write("give\n")
        wait_until(lambda: watch.notice() is not None)
        assert process.stdout.readline() == "served\n"
        process.stdin.write("withdraw\n")
        wait_until(lambda: watch.notice() is None)
        watch.close()
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_watching_imports_no_torch() -> None:
    """Loss prevented: the launcher, which could watch as well, needs seconds to start."""
    code = "import gai_yolo.supervision.cloud.watch, sys, json; print(json.dumps('torch' in sys.modules))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) is False
