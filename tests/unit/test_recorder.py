"""Recording where the time goes: one process, one file, any death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gai_yolo.errors import Ending
from gai_yolo.goodput.record import (
    BLOCK,
    COMPACTED,
    COMPACTED_AT_ONCE,
    KEPT_STARTS,
    Phase,
    Record,
    compact_records,
    high_water,
    keep_records,
    next_number,
    pack,
    parse_records,
    plain,
    read_records,
    unpack,
)
from gai_yolo.goodput.recorder import BEAT, STEP_PATIENCE, Recorder, RecordFile, process_started
from gai_yolo.goodput.report import Report, report
from tests.harness import REPOSITORY
from tests.starts import EPOCH, Node


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process of this program, whose output is read."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def test_every_second_is_in_one_phase() -> None:
    """Loss: seconds that are counted twice, or in no phase, make every share wrong."""
    node = Node(0.0)
    node.load(10, known=12)
    node.spend(Phase.DATA, 0.5)
    node.spend(Phase.STEP, 1.0)
    node.spend(Phase.SNAPSHOT, 0.25)
    node.recorder.enter(Phase.STEP)
    node.clock.now += 2.0
    node.recorder.step_done(11, 1)
    node.steps(12, 14, 4.0)
    node.spend(Phase.EVALUATION, 8.0)
    node.spend(Phase.STEP, 0.75)
    record = node.end()
    assert record.seconds == {"import": 2.0, "rendezvous": 1.0, "load": 1.0, "data": 0.5, "snapshot": 0.25, "evaluation": 8.0}
    assert (record.replayed_steps, record.replayed_seconds) == (2, 7.0)
    assert (record.useful_steps, record.useful_seconds) == (2, 8.0)
    assert (record.pending_seconds, record.stretch, record.phase) == (0.75, 0.75, "step")
    assert record.end == node.clock.now and record.beat == node.clock.now


def test_imports_are_counted_from_the_start_of_the_process() -> None:
    """Loss: the import of torch, most of a fast restart, is in no account."""
    began = time.time()
    with run("import time; time.sleep(0.3); from gai_yolo.goodput.recorder import process_started; print(process_started())") as process:
        spawned = time.time()
        text = process.communicate()[0]
    assert began - 0.05 < float(text) < spawned + 0.05
    began = time.time()
    recorder = Recorder(began - 5.0)
    recorder.enter(Phase.LOAD)
    assert 5.0 <= recorder.record().seconds[Phase.IMPORT] < time.time() - began + 5.01
    assert process_started() < time.time()


def test_a_job_begins_with_its_launcher() -> None:
    """Loss: ten seconds of the launcher's and the agent's imports are in no account."""
    node = Node(100.0)
    node.load(0)
    before = node.recorder.record()
    node.recorder.begin_at(EPOCH + 93.0)
    after = node.recorder.record()
    assert (before.began, after.began) == (EPOCH + 100.0, EPOCH + 93.0)
    assert after.seconds[Phase.IMPORT] == before.seconds[Phase.IMPORT] + 7.0
    record = after
    assert record.end == node.clock.now
    node.recorder.begin_at(EPOCH + 95.0)
    assert node.recorder.record().began == EPOCH + 93.0
    with run("import time; print(flush=True); time.sleep(60)") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert abs(process_started(process.pid) - time.time()) < 5.0
        process.kill()


def test_a_clock_that_is_set_shifts_no_second() -> None:
    """Loss: a machine that learns the time during training accounts for an hour of it too much."""
    wall, inner = [EPOCH], [7.0]
    recorder = Recorder(EPOCH, lambda: inner[0], lambda: wall[0])
    inner[0], wall[0] = 10.0, EPOCH + 3603
    record = recorder.record()
    assert (record.elapsed, record.end, record.beat) == (3.0, EPOCH + 3.0, EPOCH + 3603)


def test_steps_done_again_without_a_new_start_are_replays() -> None:
    """Loss: a run that went back to a good snapshot counts the same steps twice."""
    node = Node(0.0)
    node.load(0)
    node.steps(1, 5)
    node.steps(3, 6)
    record = node.end()
    assert (record.useful_steps, record.replayed_steps, record.step, record.highest) == (6, 3, 6, 6)


def test_the_pace_is_the_recent_one_without_evaluations() -> None:
    """Loss: an ETA from the first, slow steps."""
    node = Node(0.0)
    node.load(0)
    node.steps(1, 1, 30.0)
    assert node.record().pace is None
    node.steps(2, 11, 2.0)
    node.spend(Phase.EVALUATION, 100.0)
    node.steps(12, 12, 2.0)
    assert node.record().pace == 2.0
    node.steps(13, 100, 0.5)
    assert node.record().pace == 0.5


def test_the_first_word_about_the_end_stands() -> None:
    """Loss: every cause is hidden behind what it led to."""
    node = Node(0.0)
    node.spend(Phase.STEP, 3.0)
    node.recorder.ended(Ending.LEFT, "notice: SIGTERM")
    node.spend(Phase.CLOSING, 2.0)
    record = node.end(Ending.PEER_LOST)
    assert (record.ending, record.outcome, record.ended) == ("left", "notice: SIGTERM", EPOCH + 3.0)
    assert record.seconds[Phase.CLOSING] == 2.0


KILLED_IN_A_STEP = """
import sys, time
from pathlib import Path
from gai_yolo.goodput.recorder import *
from gai_yolo.goodput.record import Phase
recorder = Recorder(process_started())
recorder.open(Path(sys.argv[1]), 3, "nonce", "node/1", 0, 2)
recorder.started_from(40, 1, "memory")
recorder.enter(Phase.STEP)
recorder.step_done(41, 1)
recorder.step_done(42, 1)
print("ready", flush=True)
time.sleep(60)
"""


def known_end(folder: Path) -> float:
    """Up to when the record there counts; 0 while it is being written."""
    return max((record.end for record in read_records(folder)[0]), default=0.0)


def test_after_kill_9_the_last_step_and_the_time_of_death_are_known(tmp_path: Path) -> None:
    """Loss: what a death costs is a guess."""
    with run(KILLED_IN_A_STEP, tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        began = seen = known_end(tmp_path)
        while seen < began + 0.5 * BEAT:  # nothing but beats can move it
            time.sleep(0.05)
            seen = known_end(tmp_path)
        process.send_signal(signal.SIGKILL)
        died = time.time()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("000003-nonce-node_1-") and path.stat().st_size == BLOCK
    (record,) = read_records(tmp_path)[0]
    assert (record.origin, record.step, record.useful_steps, record.outcome) == (40, 42, 2, None)
    assert seen <= record.end <= died + 0.1
    assert record.pending_seconds > 0.3 * BEAT


DISK_FILLS = """
import resource, sys, time
from pathlib import Path
from gai_yolo.goodput.recorder import *
from gai_yolo.goodput.record import Phase
from gai_yolo.log import showing
told = []
said = showing(lambda record: told.append(record.getMessage()))
said.__enter__()
recorder = Recorder(process_started())
recorder.open(Path(sys.argv[1]), 1, "s", "a", 0, 1)
recorder.enter(Phase.STEP)
recorder.step_done(1, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
recorder.step_done(2, 1)
recorder.step_done(3, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recorder.step_done(4, 1)
recorder.close()
print(len(told), told)
"""


def test_a_disk_that_refuses_is_told_once_and_made_up_for(tmp_path: Path) -> None:
    """Loss: a full disk ends a training because of its stop-watch, or fills the log."""
    with run(DISK_FILLS, tmp_path) as process:
        text = process.communicate()[0]
    assert process.returncode == 0
    assert text.startswith("1 ") and "cannot be written (File too large); the account of the time may miss this start" in text
    assert read_records(tmp_path)[0][0].useful_steps == 4


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path, told: list[str]) -> None:
    """Loss: a file in the way ends a training."""
    (tmp_path / "goodput").write_text("")
    node = Node(0.0, folder=tmp_path / "goodput")
    node.load(0)
    node.steps(1, 3)
    assert node.end().useful_steps == 3
    assert len(told) == 1 and told[0].startswith(f"{tmp_path}/goodput/000001-s1-a-")


@pytest.fixture
def hanging_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes paths whose opening hangs: named pipes that nobody reads; read at the end, so that nothing hangs on, or tells others' tests."""
    pipes, before = [], threading.enumerate()

    def make(name: str) -> Path:
        path = tmp_path / name
        os.mkfifo(path)
        pipes.append(path)
        return path

    yield make
    readers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in pipes]
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(20)
            assert not thread.is_alive()
    for reader in readers:
        os.close(reader)


def test_a_disk_that_hangs_holds_up_one_step_and_for_a_moment_only(hanging_disk: Callable[[str], Path]) -> None:
    """Loss: training stands still because a network file system does."""
    recorder = Recorder(time.time())
    blank = recorder.record()
    path = hanging_disk(replace(blank, number=1, start="s", node="a").name)
    recorder.open(path.parent, 1, "s", "a", 0, 1)
    recorder.enter(Phase.STEP)
    took = []
    for step in range(1, 21):
        started = time.monotonic()
        recorder.step_done(step, 1)
        took.append(time.monotonic() - started)
    assert took[0] >= STEP_PATIENCE
    assert sum(seconds >= STEP_PATIENCE for seconds in took) < 5, "others may be long because the machine is busy"
    assert recorder.record().useful_steps == 20
    recorder.close()


def test_a_file_that_nobody_asks_for_is_brought_up_to_date_each_second(tmp_path: Path) -> None:
    """Loss: a long evaluation looks like a death."""
    calls: list[float] = []

    def content() -> Record:
        calls.append(time.monotonic())
        return Record(0.0, number=len(calls))

    file = RecordFile(tmp_path / "one.json", content)
    assert file.update(1.0) and len(calls) == 1
    while len(calls) < 3:
        time.sleep(0.05)
    assert all(later - earlier >= BEAT for earlier, later in pairwise(calls))
    file.close(10.0)
    assert read_records(tmp_path)[0] == [Record(0.0, number=len(calls))]


def test_a_record_that_shrinks_leaves_no_old_end(tmp_path: Path) -> None:
    """Loss: a file that was longer before is no JSON any more."""
    texts = iter(["x" * 3 * BLOCK, "y", "z"])
    file = RecordFile(tmp_path / "one.json", lambda: Record(0.0, outcome=next(texts)))
    file.update(1.0)
    file.update(1.0)
    file.close(1.0)
    assert read_records(tmp_path) == ([Record(0.0, outcome="z")], [])
    assert (tmp_path / "one.json").stat().st_size == 4 * BLOCK


def test_torn_and_foreign_files_cost_a_record_and_not_the_account(tmp_path: Path) -> None:
    """Loss: after a power cut nobody can say what the run has cost."""
    whole = pack(plain(Node(0.0).end()))
    other = pack(plain(Node(5.0, number=2).end()))
    for name, data in {
        "1.json": whole,
        "cut.json": whole[:200],
        "zeros.json": bytes(BLOCK),
        "mixed.json": whole[:60] + other[60:],
        "list.json": b"[1]",
        "text.json": b"\xff\xfe",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty.json").touch()
    records, damaged = read_records(tmp_path)
    assert [record.number for record in records] == [1]
    assert {path.name for path in damaged} == {"cut.json", "zeros.json", "mixed.json", "list.json", "text.json"}
    assert read_records(tmp_path / "absent") == ([], [])
    assert len(parse_records([*map(plain, records), {"format": 2, "began": 1.0}, {}])) == 1


def test_nodes_without_common_storage_keep_each_others_records(tmp_path: Path, told: list[str]) -> None:
    """Loss: what was done on a node that is gone is in no account."""
    ours, theirs = Node(0.0, node="a", folder=tmp_path / "a"), Node(0.0, node="b", folder=tmp_path / "b")
    for node in (ours, theirs):
        node.load(0)
        node.steps(1, 5)
    early = theirs.record()
    theirs.steps(6, 7)
    ours.end(Ending.PEER_LOST)
    theirs.end()
    keep_records(tmp_path / "a", [early])
    gathered = [record for name in "ab" for record in read_records(tmp_path / name)[0]]
    for _ in range(2):
        keep_records(tmp_path / "a", gathered)
        assert sorted((one.node, one.highest) for one in read_records(tmp_path / "a")[0]) == [("a", 5), ("b", 7)]
    keep_records(tmp_path / "a", [early])
    assert (high_water(read_records(tmp_path / "a")[0]), next_number(gathered)) == (7, 2)
    assert (high_water([]), next_number([])) == (0, 1)
    (tmp_path / "file").touch()
    assert told == []
    keep_records(tmp_path / "file", gathered)
    assert len(told) == 1 and "cannot be kept here" in told[0]


def write_starts(folder: Path, count: int) -> None:
    """Two nodes' records of so many starts."""
    for number in range(1, count + 1):
        for name in "ab":
            node = Node(10.0 * number, number, name, folder=folder)
            node.load(number)
            node.end(Ending.FAILED)


def account(folder: Path) -> Report:
    """Of the records there."""
    return report(read_records(folder)[0])


def test_records_of_old_starts_are_put_together_and_say_the_same(tmp_path: Path) -> None:
    """Loss: every start of a job that was started thousands of times reads as many files; or an account that forgets its beginnings."""
    write_starts(tmp_path, KEPT_STARTS + COMPACTED_AT_ONCE - 1)
    compact_records(tmp_path)
    assert not (tmp_path / COMPACTED).exists()
    write_starts(tmp_path, KEPT_STARTS + COMPACTED_AT_ONCE)
    before = account(tmp_path)
    compact_records(tmp_path)
    assert account(tmp_path) == before and before.starts == KEPT_STARTS + COMPACTED_AT_ONCE
    assert len(list(tmp_path.iterdir())) == 1 + len(list(tmp_path.glob("*-*.json"))) <= 1 + 2 * 2 * KEPT_STARTS
    assert min(path.name for path in tmp_path.glob("*-*.json")).startswith(f"{COMPACTED_AT_ONCE + 1:06d}-")


def test_a_crash_while_records_are_put_together_counts_none_twice_and_loses_none(tmp_path: Path) -> None:
    """Loss: steps that were done once are accounted for twice, or not at all."""
    write_starts(tmp_path, KEPT_STARTS + COMPACTED_AT_ONCE)
    before = account(tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    compact_records(tmp_path)
    for path, content in list(kept.items())[::3]:
        path.write_bytes(content)  # was not removed any more
    assert account(tmp_path) == before
    compact_records(tmp_path)
    assert account(tmp_path) == before
    (tmp_path / COMPACTED).write_bytes(b"{")
    damaged = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    compact_records(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == damaged
    assert tmp_path / COMPACTED in read_records(tmp_path)[1]


def test_a_record_of_a_later_version_is_kept(tmp_path: Path) -> None:
    """Loss: an older version that is tried for an hour throws away what a newer one has written."""
    write_starts(tmp_path, KEPT_STARTS + COMPACTED_AT_ONCE)
    (tmp_path / "000001-x-a-later.json").write_bytes(pack({"format": 9, "id": "later"}))
    compact_records(tmp_path)
    assert not (tmp_path / "000001-x-a-later.json").exists()
    assert {"format": 9, "id": "later"} in unpack((tmp_path / COMPACTED).read_bytes())["records"]
