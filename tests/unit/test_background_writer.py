"""Training goes on whatever the disk does, and nothing is lost that could be kept."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.checkpointing import background_writer as writing
from gai_yolo.checkpointing.background_writer import GIVEN_UP, HANGING, LONGEST_RETRY, MOST_WAITING_EPOCHS, BackgroundWriter
from gai_yolo.checkpointing.capture import StateBuffer, open_state
from gai_yolo.checkpointing.writer_process import Answer, BestRenewed, Job, WriterProcess
from gai_yolo.errors import RunFolderBusy
from gai_yolo.log import showing
from gai_yolo.store.manifest import Kind, Manifest, Position

GOOD = Answer(seconds=0.5, cpu_seconds=0.1)
FULL = Answer(failure="No space left on device")


class Clock:
    """Moves when it is told to; `drift` seconds each time somebody looks, so that no wait is for ever."""

    def __init__(self) -> None:
        self.now = 5000.0
        self.drift = 0.0

    def __call__(self) -> float:
        self.now += self.drift
        return self.now


class FakeProcess(WriterProcess):
    """Says what the script says, and takes down what it is handed."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.closed: list[float] = []

    @property
    def progress(self) -> int:
        self.bench.num_moves += self.bench.moves_by_itself
        return self.bench.num_moves

    def kill(self) -> None:
        self.bench.num_kills += 1
        if self.bench.can_be_killed:
            self.bench.answers.append(EOFError())

    def free_bytes(self) -> int:
        return self.bench.free()

    def send(self, job: Job) -> None:
        assert not self.closed
        self.bench.tried.append((self.bench.clock.now, job.name))
        if self.bench.send_errors:
            raise self.bench.send_errors.popleft()
        assert self.bench.in_flight is None, "one at a time"
        self.bench.in_flight = job.name
        self.bench.contents.append(int(open_state(job.buffer.descriptor, job.buffer.content)["n"]))

    def answer(self, timeout: float) -> Answer | BestRenewed | None:
        assert not self.closed
        assert self.bench.in_flight is not None or self.bench.best_follows, "nothing was asked"
        if not self.bench.answers:
            self.bench.clock.now += timeout
            return None
        answer = self.bench.answers.popleft()
        if answer is None:
            self.bench.clock.now += timeout
            return None
        if isinstance(answer, Exception):
            self.bench.in_flight = None
            raise answer
        if isinstance(answer, Answer):
            self.bench.in_flight = None
        self.bench.best_follows = isinstance(answer, Answer) and answer.best_follows
        return answer

    def close(self, patience: float) -> None:
        self.closed.append(patience)
        self.bench.in_flight = None


class Bench:
    """A writer, its clock, what it was told and what it tells."""

    def __init__(self, told: list[str]) -> None:
        self.clock, self.told = Clock(), told
        self.answers: deque[Answer | BestRenewed | Exception | None] = deque()
        self.send_errors: deque[OSError] = deque()
        self.start_errors: deque[OSError] = deque()
        self.processes: list[FakeProcess] = []
        self.tried: list[tuple[float, str]] = []
        self.contents: list[int] = []
        self.in_flight: str | None = None
        self.best_follows = False
        self.num_moves = self.num_kills = self.num_waits = 0
        """Of the writer, of it by us, and of times that the training thread has said that it waits."""
        self.moves_by_itself = False
        self.can_be_killed = False
        """As where no disk holds it."""
        self.each_wait: Callable[[], None] = lambda: None
        self.written: list[tuple[str, Answer]] = []
        self.free: Callable[[], int] = lambda: 7_000_000
        self.writer = BackgroundWriter(self._start, self._written, self.clock, self._waits)
        self._buffers: list[StateBuffer] = []

    def _waits(self) -> None:
        self.num_waits += 1
        self.each_wait()

    def _start(self) -> WriterProcess:
        if self.start_errors:
            raise self.start_errors.popleft()
        self.processes.append(FakeProcess(self))
        return self.processes[-1]

    def _written(self, job: Job, answer: Answer) -> None:
        self.written.append((job.name, answer))

    def job(self, kind: Kind, number: int) -> Job:
        """Step 10 x number, or epoch number."""
        position = Position(10 * number, number, 80 * number)
        if self.writer.spare:
            buffer = self.writer.spare.pop()
        else:
            buffer = StateBuffer(0, pinned=False)
            self._buffers.append(buffer)
        buffer.fill({"n": torch.tensor(number), "w": torch.zeros(100)})
        return Job(Manifest(kind, position, 0, "", 0, "f", "t", "2026-01-01T00:00:00Z"), buffer, 0.0)

    def epoch(self, number: int) -> str:
        """Submit an epoch checkpoint; returns its name."""
        job = self.job("epoch", number)
        self.writer.submit(job)
        return job.name

    def step(self, number: int) -> str:
        """Submit a snapshot; returns its name."""
        job = self.job("step", number)
        self.writer.submit(job)
        return job.name

    def answer(self, *answers: Answer | BestRenewed | Exception) -> None:
        """The writer process answers, one after the other."""
        for answer in answers:
            self.answers.append(answer)
            self.writer.poll()
            assert not self.answers, "it was listened to"

    def later(self, seconds: float) -> None:
        """A step boundary so many seconds later."""
        self.clock.now += seconds
        self.writer.poll()

    @property
    def sent(self) -> list[str]:
        """Names in the order in which they were handed over, failed tries included."""
        return [name for _, name in self.tried]

    @property
    def num_buffers(self) -> int:
        """Buffers ever needed."""
        return len(self._buffers)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()


@pytest.fixture
def bench(told: list[str]) -> Iterator[Bench]:
    """Everything works at first."""
    bench = Bench(told)
    yield bench
    bench.close()


# --- the order -------------------------------------------------------------------------------------------------------------


def test_one_is_on_its_way_at_a_time(bench: Bench) -> None:
    """Loss: two writes compete for the disk, and the older one gets its name last."""
    assert bench.writer.is_idle and bench.writer.unwritten == []
    one, two = bench.epoch(1), bench.epoch(2)
    bench.writer.poll()
    assert bench.sent == [one] and bench.writer.unwritten == [one, two]
    assert bench.written == []
    bench.answer(GOOD)
    assert bench.sent == [one, two] and bench.writer.unwritten == [two]
    assert bench.written == [(one, GOOD)] and not bench.writer.is_idle
    bench.answer(GOOD)
    assert [name for name, _ in bench.written] == [one, two] and bench.writer.is_idle
    assert (bench.contents, bench.told, len(bench.processes)) == ([1, 2], [], 1)


def test_newer_snapshot_takes_the_place_of_one_that_waits(bench: Bench) -> None:
    """Loss: a slow disk falls further and further behind, and memory fills up with old states."""
    first = bench.step(1)
    for number in range(2, 30):
        last = bench.step(number)
        assert bench.writer.unwritten == [first, last]
    assert bench.num_buffers <= 3
    bench.answer(GOOD, GOOD)
    assert bench.sent == [first, last] and bench.contents == [1, 29], "and it is the state that goes by the name"


def test_epoch_checkpoint_takes_the_place_of_a_snapshot_that_waits(bench: Bench) -> None:
    """Loss: the newer state waits for an older one that nobody needs any more."""
    first, _ = bench.step(1), bench.step(2)
    epoch = bench.epoch(1)
    assert bench.writer.unwritten == [first, epoch]


def test_epoch_checkpoints_wait_in_order_and_are_never_replaced(bench: Bench) -> None:
    """Loss: epochs are missing because the disk was slow for a while."""
    names = [bench.epoch(number) for number in (1, 2, 3)]
    names.append(bench.step(4))
    replaced = names.pop()
    names.append(bench.step(5))
    assert bench.writer.unwritten == names
    bench.answer(GOOD, GOOD, GOOD, GOOD)
    assert bench.sent == names and replaced not in bench.sent
    assert (bench.contents, bench.told) == ([1, 2, 3, 5], [])


def test_snapshots_are_not_worth_their_capture_while_an_epoch_checkpoint_waits(bench: Bench) -> None:
    """Loss: training stands still for a copy that would wait behind two others; or no snapshot is ever taken."""
    assert bench.writer.accepts_snapshots
    bench.step(1)
    bench.step(2)
    assert bench.writer.accepts_snapshots, "a newer one takes the place of the one that waits"
    bench.epoch(1)
    assert not bench.writer.accepts_snapshots
    bench.answer(GOOD)
    assert bench.writer.accepts_snapshots, "it is on its way"
    bench.answer(FULL)
    assert not bench.writer.accepts_snapshots, "and waits again"
    bench.later(1.0)
    bench.answer(GOOD)
    assert bench.writer.is_idle and bench.writer.accepts_snapshots


def test_a_state_that_a_gpu_is_still_copying_is_not_handed_over(bench: Bench) -> None:
    """Loss: a checkpoint of half a copy."""
    job = bench.job("step", 1)
    done = False
    job.buffer.ready = lambda: done
    bench.writer.submit(job)
    bench.later(5.0)
    assert bench.sent == [] and bench.writer.unwritten == [job.name]
    assert len(bench.processes) == 1, "the process comes up in the meantime"
    done = True
    bench.writer.poll()
    assert bench.sent == [job.name]


def test_the_process_comes_up_before_there_is_anything_to_write(bench: Bench) -> None:
    """Loss: the first snapshot waits for seconds until torch is imported a second time."""
    bench.writer.poll()
    assert len(bench.processes) == 1 and bench.writer.is_idle
    bench.later(1000.0)
    assert len(bench.processes) == 1 and bench.told == []


def test_buffers_are_used_again(bench: Bench) -> None:
    """Loss: each snapshot takes new memory."""
    assert bench.writer.spare == []
    job = bench.job("step", 1)
    bench.writer.submit(job)
    assert bench.writer.spare == [], "it is being read"
    replaced = bench.job("step", 2)
    bench.writer.submit(replaced)
    assert bench.writer.spare == []
    bench.writer.submit(bench.job("step", 3))
    assert bench.writer.spare.pop() is replaced.buffer
    bench.answer(GOOD)
    assert bench.writer.spare.pop() is job.buffer
    assert bench.writer.spare == []
    for number in range(4, 20):
        bench.step(number)
        bench.answer(GOOD)
    assert bench.num_buffers <= 4


# --- failures --------------------------------------------------------------------------------------------------------------


def test_failure_is_told_once_with_what_was_needed_and_what_is_free(bench: Bench) -> None:
    """Loss: a disk that has been full since the evening is noticed in the morning; or the log is full of it."""
    name = bench.epoch(1)
    bench.free = lambda: 123_456_789
    bench.answer(FULL)
    (sentence,) = bench.told
    assert name in sentence and "No space left on device" in sentence and "free 123.5 MB" in sentence
    assert "needed 0.0 MB" in sentence and "tried again" in sentence
    for _ in range(5):
        bench.later(LONGEST_RETRY)
        bench.answer(FULL)
    assert len(bench.told) == 1 and bench.written == []
    bench.later(LONGEST_RETRY)
    bench.answer(GOOD)
    assert len(bench.told) == 2 and name in bench.told[1] and "6 failed tries" in bench.told[1]
    assert bench.written == [(name, GOOD)] and bench.contents == [1] * 7


def test_megabytes_in_a_failure_are_those_of_the_state(bench: Bench) -> None:
    """Loss: somebody makes room for 3 MB where 30 are needed."""
    job = bench.job("epoch", 1)
    job.buffer.fill({"n": torch.tensor(1), "w": torch.zeros(625_000)})
    bench.writer.submit(job)
    bench.answer(FULL)
    assert "needed 2.5 MB, free 7.0 MB" in bench.told[0]


def test_room_that_cannot_be_asked_for_is_no_second_failure(bench: Bench) -> None:
    """Loss: training ends because a broken disk does not say how much room it has."""

    def refuse() -> int:
        raise OSError(5, "Input/output error")

    bench.free = refuse
    name = bench.epoch(1)
    bench.answer(FULL)
    assert name in bench.told[0] and "unknown (Input/output error)" in bench.told[0]
    assert bench.writer.unwritten == [name]


def test_tries_come_ever_more_seldom_and_at_least_once_a_minute(bench: Bench) -> None:
    """Loss: a full disk is hammered thousands of times; or room was made, and nothing is written for an hour."""
    bench.epoch(1)
    pauses = []
    for _ in range(9):
        bench.answer(FULL)
        failed_at, tries = bench.clock.now, len(bench.tried)
        while len(bench.tried) == tries:
            bench.later(0.125)
        pauses.append(bench.clock.now - failed_at)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    bench.answer(GOOD)
    bench.epoch(2)
    assert len(bench.told) == 2
    bench.answer(FULL)
    assert len(bench.told) == 3, "a new outage is told again"
    tries = len(bench.tried)
    bench.later(0.875)
    assert len(bench.tried) == tries
    bench.later(0.125)
    assert len(bench.tried) == tries + 1, "and its pauses begin anew"


def test_nothing_at_all_is_tried_during_a_pause(bench: Bench) -> None:
    """Loss: every new checkpoint starts another try on a disk that is full."""
    bench.epoch(1)
    bench.answer(FULL)
    bench.later(1.0)
    bench.answer(FULL)
    names = [bench.epoch(2), bench.step(3), bench.step(4)]
    bench.later(1.0)
    assert len(bench.sent) == 2 and bench.writer.unwritten == ["checkpoints/epoch_001.pt", names[0], names[2]]
    bench.later(1.0)
    assert len(bench.sent) == 3


def test_failed_snapshot_is_dropped_if_a_newer_one_waits(bench: Bench) -> None:
    """Loss: an old snapshot is tried again and again while newer ones wait for it."""
    one, two = bench.step(1), bench.step(2)
    bench.answer(FULL)
    assert bench.writer.unwritten == [two] and one in bench.told[0]
    bench.later(1.0)
    bench.answer(GOOD)
    assert bench.sent == [one, two] and bench.contents == [1, 2]


def test_failed_snapshot_is_tried_again_if_it_is_the_newest(bench: Bench) -> None:
    """Loss: one refused write, and the snapshot is gone although the next is minutes away."""
    one = bench.step(1)
    bench.answer(FULL)
    assert bench.writer.unwritten == [one]
    bench.later(1.0)
    bench.answer(FULL)
    two = bench.step(2)
    assert bench.writer.unwritten == [two], "until there is a newer one"
    bench.later(2.0)
    bench.answer(GOOD)
    assert bench.sent == [one, one, two] and bench.writer.is_idle


def test_failed_epoch_checkpoint_stays_first(bench: Bench) -> None:
    """Loss: an epoch is missing because the disk was full when it was written."""
    names = [bench.epoch(1), bench.epoch(2), bench.step(25)]
    bench.answer(FULL)
    assert bench.writer.unwritten == names
    bench.later(1.0)
    bench.answer(GOOD, GOOD, GOOD)
    assert bench.sent == [names[0], *names] and bench.writer.is_idle


def test_what_stood_in_the_way_is_told_whether_it_worked_or_not(bench: Bench) -> None:
    """Loss: a file of somebody else is moved aside without a word."""
    bench.epoch(1)
    bench.answer(Answer(failure="disk quota exceeded", notes=["a.pt is now a.pt.aside-1"]))
    assert bench.told[0] == "a.pt is now a.pt.aside-1" and "disk quota exceeded" in bench.told[1]
    bench.later(1.0)
    bench.answer(Answer(notes=["b.pt is complete already"]))
    assert bench.told[2] == "b.pt is complete already"


# --- the process dies ------------------------------------------------------------------------------------------------------


def test_dead_process_is_told_once_and_another_one_gets_the_job(bench: Bench) -> None:
    """Loss: the system kills the writer for want of memory, and from then on nothing is saved."""
    names = [bench.epoch(1), bench.epoch(2)]
    bench.answer(EOFError())
    assert bench.writer.unwritten == names
    (sentence,) = bench.told
    assert names[0] in sentence and "died" in sentence and "tried again" in sentence
    bench.later(1.0)
    bench.answer(ConnectionResetError(104, "Connection reset by peer"))
    bench.later(2.0)
    assert len(bench.processes) == 3 and [process.closed for process in bench.processes] == [[0.0], [0.0], []]
    assert bench.sent == [names[0]] * 3 and len(bench.told) == 1
    bench.answer(GOOD, GOOD)
    assert [name for name, _ in bench.written] == names and bench.contents == [1, 1, 1, 2]
    assert len(bench.told) == 2 and "2 failed tries" in bench.told[1]


def test_process_that_died_while_idle_is_noticed_with_the_next_job(bench: Bench) -> None:
    """Loss: a broken pipe ends the training."""
    bench.step(1)
    bench.answer(GOOD)
    bench.send_errors.append(BrokenPipeError(32, "Broken pipe"))
    two = bench.step(2)
    assert len(bench.told) == 1 and "Broken pipe" in bench.told[0] and bench.writer.unwritten == [two]
    bench.later(0.875)
    assert len(bench.processes) == 1
    bench.later(0.125)
    assert len(bench.processes) == 2 and bench.sent[1:] == [two, two]
    bench.answer(GOOD)
    assert bench.writer.is_idle and len(bench.told) == 2


def test_process_that_cannot_be_started_is_tried_again(bench: Bench) -> None:
    """Loss: a moment without memory for another process ends the training, or all saving."""
    bench.start_errors.extend(OSError(12, "Cannot allocate memory") for _ in range(3))
    name = bench.step(1)
    for pause in (1.0, 2.0):
        bench.later(pause)
    assert len(bench.told) == 1 and "Cannot allocate memory" in bench.told[0]
    assert bench.processes == [] and bench.writer.unwritten == [name]
    bench.later(4.0)
    assert len(bench.processes) == 1 and bench.sent == [name]
    bench.answer(GOOD)
    assert len(bench.told) == 2 and name in bench.told[1]


# --- it hangs --------------------------------------------------------------------------------------------------------------


def test_hanging_write_is_told_once_with_numbers_and_waited_for(bench: Bench) -> None:
    """Loss: a network disk hangs, and nobody knows since when nothing is saved."""
    name = bench.epoch(1)
    bench.later(HANGING - 1)
    assert bench.told == []
    bench.later(2.0)
    (sentence,) = bench.told
    assert name in sentence and "61 s" in sentence and "0.0 MB" in sentence and "free 7.0 MB" in sentence and "0.0 s" in sentence
    for _ in range(5):
        bench.later(1000.0)
    assert len(bench.told) == 1 and bench.sent == [name], "it is not sent a second time"
    bench.answer(GOOD)
    assert bench.written == [(name, GOOD)] and bench.writer.is_idle
    bench.epoch(2)
    bench.later(HANGING + 1)
    assert len(bench.told) == 2 and "took 0.5 s" in bench.told[1], "the next time is told again"


def test_disk_that_is_always_slow_does_not_hang(bench: Bench) -> None:
    """Loss: a warning with every snapshot of a large model on a slow disk."""
    bench.step(1)
    bench.answer(Answer(seconds=10.0))
    bench.step(2)
    bench.later(199.0)
    assert bench.told == []
    bench.later(2.0)
    assert len(bench.told) == 1 and "took 10.0 s" in bench.told[0]


# --- too much waits --------------------------------------------------------------------------------------------------------


def test_where_the_disk_works_and_is_slower_than_the_epochs_training_waits_for_it(bench: Bench) -> None:
    """Loss: epochs given up although the disk works, or memory that fills up with them."""
    names = [bench.epoch(number) for number in range(1, MOST_WAITING_EPOCHS + 2)]
    before = bench.clock.now
    bench.answers.extend([*[None] * 100, GOOD])
    names.append(bench.epoch(MOST_WAITING_EPOCHS + 2))
    assert bench.clock.now - before == pytest.approx(5.0), "100 looks of 0.05 s"
    assert bench.writer.unwritten == names[1:] and bench.told == []
    while not bench.writer.is_idle:
        bench.answer(GOOD)
    assert [name for name, _ in bench.written] == names


def test_while_the_disk_fails_the_oldest_epochs_beyond_a_few_are_given_up_and_told(bench: Bench) -> None:
    """Loss: a full disk over the weekend fills the memory too, and the run is killed; or the newest epochs are lost."""
    names = []
    for number in range(1, 11):
        names.append(bench.epoch(number))
        if bench.in_flight is not None:
            bench.answer(FULL)
        assert len(bench.writer.unwritten) <= MOST_WAITING_EPOCHS
    assert bench.writer.unwritten == names[-MOST_WAITING_EPOCHS:]
    given_up = [sentence for sentence in bench.told if "given up" in sentence]
    assert [name in sentence for name, sentence in zip(names[:-MOST_WAITING_EPOCHS], given_up, strict=True)] == [True] * 6
    assert len(bench.told) == 7
    bench.later(LONGEST_RETRY)
    for _ in range(MOST_WAITING_EPOCHS):
        bench.answer(GOOD)
    assert [name for name, _ in bench.written] == names[-MOST_WAITING_EPOCHS:] and bench.writer.is_idle
    assert bench.contents[-MOST_WAITING_EPOCHS:] == [7, 8, 9, 10]
    assert bench.num_buffers <= MOST_WAITING_EPOCHS + 1


def test_while_the_disk_hangs_training_does_not_wait_for_it(bench: Bench) -> None:
    """Loss: a hanging network disk stops the training that should go on without it."""
    first = bench.epoch(1)
    bench.later(HANGING + 1)
    names = [bench.epoch(number) for number in range(2, 12)]
    assert bench.clock.now == 5000.0 + HANGING + 1, "nobody has waited"
    assert bench.writer.unwritten == [first, *names[-MOST_WAITING_EPOCHS:]]
    assert sum("given up" in sentence for sentence in bench.told) == len(names) - MOST_WAITING_EPOCHS


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["epoch"] * 4 + ["step", "good", "full", "dead", "second", "minute", "hour"]), max_size=60))
def test_whatever_happens_memory_is_bounded_and_the_newest_is_kept(events: list[str]) -> None:
    """Loss: an order of events that nobody thought of in which memory grows, or the newest state is the one that is dropped."""
    told: list[str] = []
    with showing(lambda record: told.append(record.getMessage())):
        take(events, Bench(told))


def take(events: list[str], bench: Bench) -> None:
    """The same, on a bench."""
    submitted: list[str] = []
    for number, event in enumerate(events, start=1):
        if event in ("epoch", "step"):
            if event == "epoch" and len(bench.writer.unwritten) > MOST_WAITING_EPOCHS:
                bench.answers.append(GOOD)  # the disk is slow, but works; if not, nobody listens
            elif event == "step" and not bench.writer.accepts_snapshots:
                continue
            submitted.append(bench.epoch(number) if event == "epoch" else bench.step(number))
            bench.answers.clear()
        elif event in ("good", "full", "dead") and bench.in_flight is not None:
            bench.answer(GOOD if event == "good" else FULL if event == "full" else EOFError())
        else:
            bench.later({"second": 1.0, "minute": 60.0, "hour": 3600.0}.get(event, 0.0))
        unwritten, written = bench.writer.unwritten, [name for name, _ in bench.written]
        assert len(unwritten) <= MOST_WAITING_EPOCHS + 1, "one on its way, or tried again, beside those that wait"
        assert bench.num_buffers <= MOST_WAITING_EPOCHS + 3
        assert not submitted or submitted[-1] in (*unwritten, *written)
        epochs = [name for name in submitted if "epoch" in name]
        given_up = [name for name in epochs if any(name in text and "given up" in text for text in bench.told)]
        assert set(epochs) == {name for name in (*unwritten, *written, *given_up) if "epoch" in name}, "none is lost without a word"
        assert len(set(written)) == len(written) and [name for name in submitted if name in written] == written, "each once, in order"
    bench.close()


# --- another job -----------------------------------------------------------------------------------------------------------


def test_run_that_was_taken_over_ends_the_job_and_nothing_waits(bench: Bench) -> None:
    """Loss: two jobs train one run; or the one that has to stop waits ten minutes for a write that never comes."""
    bench.epoch(1)
    bench.epoch(2)
    with pytest.raises(RunFolderBusy, match="process 7 on elsewhere"):
        bench.answer(Answer(taken_over="taken over by another job (process 7 on elsewhere)"))
    assert bench.writer.is_idle and bench.writer.unwritten == []
    assert bench.writer.drain(600.0) and len(bench.sent) == 1 and bench.told == []
    bench.writer.close(3.0)
    assert bench.processes[0].closed == [3.0]


# --- the end ---------------------------------------------------------------------------------------------------------------


def test_draining_waits_until_everything_is_written(bench: Bench) -> None:
    """Loss: the last epoch is still in memory when the process ends."""
    names = [bench.epoch(number) for number in (1, 2, 3)]
    bench.answers.extend([None, GOOD, None, None, GOOD, GOOD])
    assert bench.writer.drain(600.0)
    assert [name for name, _ in bench.written] == names and bench.writer.is_idle


def test_draining_nothing_does_not_wait_nor_start_anything(bench: Bench) -> None:
    """Loss: every run ends with seconds of waiting for nothing."""
    assert bench.writer.drain(600.0)
    assert bench.clock.now == 5000.0 and bench.processes == []


def test_draining_gives_up_when_nothing_was_written_for_long(bench: Bench) -> None:
    """Loss: a job that never ends, on a machine that is paid by the hour."""
    names = [bench.epoch(1), bench.epoch(2)]
    before = bench.clock.now
    assert not bench.writer.drain(10.0)
    assert 10.0 <= bench.clock.now - before < 11.0
    assert bench.writer.unwritten == names


def test_draining_gives_up_while_the_disk_refuses(bench: Bench) -> None:
    """Loss: a job that never ends, because there is always one more try."""
    name = bench.epoch(1)
    bench.clock.drift = 1.0
    before = bench.clock.now
    bench.answers.extend([FULL] * 100)
    assert not bench.writer.drain(20.0)
    assert 20.0 <= bench.clock.now - before < 25.0
    assert bench.writer.unwritten == [name] and len(bench.tried) > 1, "and it was tried again in the meantime"


@pytest.mark.parametrize(("answers", "waits"), [([], 60.0), ([FULL] * 100, 2.0)], ids=["starting", "refusing"])
def test_draining_waits_for_a_writer_that_is_only_starting(answers: list[Answer], waits: float, bench: Bench) -> None:
    """Loss: "make room and start again", over and over, because the writer needs longer to come up than the patience lasts."""
    bench.epoch(1)
    bench.clock.drift = 0.1
    bench.answers.extend(answers)
    before = bench.clock.now
    assert not bench.writer.drain(2.0, first_try=60.0)
    assert waits <= bench.clock.now - before < waits + 2.0


def test_draining_goes_on_while_there_is_progress(bench: Bench) -> None:
    """Loss: a slow disk that would have taken everything is given up with the last epoch in memory."""
    for number in range(1, 5):
        bench.epoch(number)
    before = bench.clock.now
    for _ in range(4):
        bench.answers.extend([*[None] * 160, GOOD])
    assert bench.writer.drain(10.0)
    assert bench.clock.now - before == pytest.approx(32.0), "8 s each"
    assert len(bench.written) == 4


def test_no_patience_is_no_waiting(bench: Bench) -> None:
    """Loss: a job that is to end at once waits."""
    bench.epoch(1)
    assert not bench.writer.drain(0.0)
    assert bench.clock.now == 5000.0


def test_closing_ends_the_process_once(bench: Bench) -> None:
    """Loss: the writer outlives its job for ever, or the job waits for a hanging writer for ever."""
    bench.writer.close(3.0)
    bench.epoch(1)
    bench.writer.close(5.0)
    bench.writer.close(5.0)
    assert [process.closed for process in bench.processes] == [[5.0]]


def test_names_are_those_under_the_run_folder(bench: Bench) -> None:
    """Loss: a sentence about a file that nobody finds."""
    assert bench.job("epoch", 7).name == "checkpoints/epoch_007.pt"
    assert bench.job("step", 12).name == "snapshots/step_00000120.pt"


# --- slow, stuck, hung -----------------------------------------------------------------------------------------------------


def test_a_slow_disk_that_moves_is_waited_for_and_the_watchdog_knows(bench: Bench) -> None:
    """Loss: a write of more than a minute while epoch checkpoints wait, and the process is ended for a hang, or a checkpoint is dropped."""
    names = [bench.epoch(number) for number in range(1, MOST_WAITING_EPOCHS + 2)]

    def write_on() -> None:
        bench.num_moves += 1
        if bench.num_waits == 20 * 300:  # five minutes of 0.05 s
            bench.answers.append(GOOD)

    bench.each_wait = write_on
    before = bench.clock.now
    names.append(bench.epoch(MOST_WAITING_EPOCHS + 2))
    assert bench.clock.now - before > 4 * HANGING and bench.num_waits >= 20 * 300
    assert bench.writer.unwritten == names[1:], "none was dropped"
    assert len(bench.told) == 1 and "and is being written" in bench.told[0]


def test_a_snapshot_is_not_worth_waiting_for_the_disk(bench: Bench) -> None:
    """Loss: training stands still for one more copy of a state, because the cloud has given an advice."""
    for number in range(1, MOST_WAITING_EPOCHS + 2):
        bench.epoch(number)
    before = bench.clock.now
    bench.step(9)
    assert bench.clock.now == before and bench.num_waits == 0


def test_a_big_checkpoint_may_be_synced_for_as_long_as_a_slow_disk_takes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: checkpoints that are dropped, one after the other, while the first one's sync shows no progress."""
    monkeypatch.setattr(writing, "SLOWEST_DISK", 1.0)  # a byte a second: these states have some 500
    for number in range(1, MOST_WAITING_EPOCHS + 2):
        bench.epoch(number)
    size = bench.job("step", 99).buffer.content.size
    before = bench.clock.now
    bench.epoch(MOST_WAITING_EPOCHS + 2)
    assert size > 2 * HANGING and size <= bench.clock.now - before < size + HANGING


def test_a_writer_that_hangs_is_replaced(bench: Bench) -> None:
    """Loss: nothing is ever saved again, though the disk works, because the process that writes was stopped or waits for itself."""
    bench.can_be_killed = True
    name = bench.epoch(1)
    bench.later((GIVEN_UP - 1) * HANGING)
    assert bench.num_kills == 0
    bench.num_moves += 1
    bench.later(1.0)
    bench.later((GIVEN_UP - 1) * HANGING)
    assert bench.num_kills == 0, "it has moved in between"
    bench.later(2 * HANGING)
    bench.later(0.0)
    bench.later(LONGEST_RETRY)
    assert bench.num_kills == 1 and len(bench.processes) == 2 and bench.sent == [name, name]
    bench.answer(GOOD)
    assert bench.writer.is_idle and [written for written, _ in bench.written] == [name]


def test_the_end_waits_for_a_disk_that_moves(bench: Bench) -> None:
    """Loss: "could not be written", of a large last checkpoint on a disk that is slow and healthy."""
    name = bench.epoch(1)
    bench.answers.extend([None] * 4000 + [GOOD])  # 200 s
    bench.moves_by_itself = True
    assert bench.writer.drain(10.0, while_moving=True) and bench.written[0][0] == name


def test_the_end_does_not_wait_for_a_disk_that_stands_still(bench: Bench) -> None:
    """Loss: a job that never ends."""
    bench.epoch(1)
    before = bench.clock.now
    assert not bench.writer.drain(10.0, while_moving=True)
    assert bench.clock.now - before < 20.0


def test_what_moves_in_a_process_is_seen_from_outside_and_it_can_be_ended() -> None:
    """Loss: a writer that works seems to stand still, or one that stands still to work."""
    script = "read go; head -c 10000000 /dev/zero >/dev/null; read go"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, text=True) as child:
        process = WriterProcess.__new__(WriterProcess)
        process._process = child  # type: ignore[assignment]
        time.sleep(0.3)  # until it reads
        before = process.progress
        time.sleep(0.2)
        assert process.progress == before > 0
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        assert wait_until(lambda: process.progress > before)
        process.kill()
        assert child.returncode == -signal.SIGKILL
        assert process.progress == 0


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds."""
    deadline = time.monotonic() + 10.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_the_end_waits_for_best_too_and_the_next_checkpoint_does_not(bench: Bench) -> None:
    """Loss: a job says that it is done, and best.pt is that of another epoch; or an epoch waits for a copy of another one."""
    first, second = bench.epoch(1), bench.epoch(2)
    follows = replace(GOOD, best_follows=True)
    bench.answer(follows)
    bench.writer.poll()
    assert bench.sent == [first, second] and bench.writer.is_idle is False
    bench.answer(follows)
    bench.clock.drift = 0.01
    assert bench.writer.drain(5.0), "all checkpoints are written"
    waited = bench.clock.now
    bench.answers.append(BestRenewed(["best.pt cannot be renewed: a reason"]))
    assert bench.writer.drain(5.0) and bench.clock.now - waited < 1.0
    assert bench.told == ["best.pt cannot be renewed: a reason"]


def test_best_of_a_run_that_was_taken_over_stops_the_old_one(bench: Bench) -> None:
    """Loss: two jobs on one run, because the news came with best.pt."""
    bench.epoch(1)
    bench.answer(replace(GOOD, best_follows=True))
    with pytest.raises(RunFolderBusy, match="taken over"):
        bench.answer(BestRenewed(taken_over="taken over by another job"))
