"""A real job, killed at each file system call of a checkpoint in turn, and started again each time."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.manifest import Position
from tests.faults.faults import Faults, strace_works
from tests.harness import Running, run, small
from tests.runs import metrics, state_digest

STEPS, EPOCHS = 3, 30
SETTINGS = (
    *(f"training.epochs={EPOCHS}", f"training.max_batches_per_epoch={STEPS}", "training.batch_size=4", "evaluation.interval=1000"),
    "elastic.memory_interval_steps=null",  # what is tested here is the disk
)
SNAPSHOTS = (*SETTINGS, "snapshots.interval_steps=1", "training.checkpoint_interval=1000")
CHECKPOINTS = (*SETTINGS, "snapshots.interval_seconds=null", "snapshots.keep_epochs=2")


def newest_complete(folder: Path) -> Position | None:
    """What a start must go on from, found by hand: the newest manifest whose data has its digest."""
    catalogue = Catalogue(folder)
    return next((one.position for one in catalogue.listing().present if catalogue.defect_of(one) is None), None)


def gone_on_from(output: str) -> int:
    """The step that a job said it went on from; 0 if it began."""
    match = re.search(r"going on from \S+ \(epoch \d+, step (\d+)\)", output)
    return int(match[1]) if match else 0


class Chain:
    """Starts a job again and again; each start resumes what the one before has left, and is killed in its turn."""

    def __init__(self, folder: Path, cache: Path, settings: tuple[str, ...]) -> None:
        self.run = folder / "run"
        self.faults = Faults(folder, self.run)
        self.arguments = small(folder, cache, *settings)
        self.expected: Position | None = None

    def killed(self, extra: dict[str, str]) -> None:
        """Start once, see it go on from the newest complete checkpoint, and see it killed."""
        job = Running("main.py", self.arguments, extra=extra)
        assert job.wait() == -signal.SIGKILL, job.output
        self._check(job.output)

    def to_the_end(self) -> None:
        """Start once more, undisturbed."""
        done = run("main.py", self.arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        self._check(done.stdout)

    def _check(self, output: str) -> None:
        assert gone_on_from(output) == (0 if self.expected is None else self.expected.step), output
        said = " ".join(output.split())
        assert said.count("passed over") == said.count("has no manifest"), f"a kill makes no bad checkpoint\n{output}"
        left = newest_complete(self.run)
        assert self.expected is None or (left is not None and left >= self.expected), "what was complete is lost"
        self.expected = left


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("main.py", small(folder, cache, *CHECKPOINTS))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_killed_at_the_calls_that_make_a_snapshot(tmp_path: Path, cache: Path, undisturbed: Path) -> None:
    """Loss: as below; the calls between which there is one file more."""
    chain = Chain(tmp_path, cache, SNAPSHOTS)
    for call in ("write data", "rename data", "rename manifest", "unlink manifest"):
        chain.killed(chain.faults.at([(call, 1)], "kill"))
        assert chain.faults.calls()[-1].what == call
    chain.to_the_end()
    assert_no_trace(chain.run, undisturbed)


def assert_no_trace(folder: Path, undisturbed: Path) -> None:
    """The weights, EMA, optimizer and metrics are those of the undisturbed run."""
    last = f"checkpoints/epoch_{EPOCHS:03d}.pt"
    assert state_digest(folder / last) == state_digest(undisturbed / last)
    rows, expected = ([{k: v for k, v in row.items() if "second" not in k} for row in metrics(one)] for one in (folder, undisturbed))
    assert rows == expected


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_killed_at_each_call_of_a_snapshot(tmp_path: Path, cache: Path, undisturbed: Path, figure: Callable[[str], None]) -> None:
    """Loss: the one call between two others at which a kill costs the run."""
    chain = Chain(tmp_path, cache, SNAPSHOTS)
    victims: list[str] = []
    for number in range(1, 100):
        chain.killed(chain.faults.at([number], "kill"))
        calls = chain.faults.calls()
        assert len(calls) == number, "struck where it was meant to"
        if [call.what for call in calls].count("open data") == 2:
            break
        victims.append(calls[-1].what)
    assert {"open data", "write data", "fsync data", "close data", "rename data", "rename manifest", "fsync folder"} <= set(victims)
    assert {"open manifest", "write manifest", "fsync manifest", "unlink manifest", "unlink data"} <= set(victims)
    chain.to_the_end()
    assert_no_trace(chain.run, undisturbed)
    figure(f"killed at {len(victims)} calls of a snapshot, resumed each time: {', '.join(dict.fromkeys(victims))}")


@pytest.mark.parametrize(
    "call", ["rename best", *(pytest.param(call, marks=pytest.mark.exhaustive) for call in ("write best", "rename record"))]
)
def test_killed_while_best_is_copied(call: str, tmp_path: Path, cache: Path) -> None:
    """Loss: the copy for people costs a checkpoint, stays torn, or is never made again."""
    chain = Chain(tmp_path, cache, (*CHECKPOINTS, "evaluation.interval=1", "training.epochs=2"))
    chain.killed(chain.faults.at([(call, 1)], "kill"))
    assert chain.faults.calls()[-1].what == call
    assert chain.expected is not None, "a checkpoint was complete before"
    chain.to_the_end()
    checkpoints = chain.run / "checkpoints"
    copy = checkpoints / "best.pt"
    assert any(copy.read_bytes() == one.read_bytes() and not copy.samefile(one) for one in checkpoints.glob("epoch_*.pt"))
    assert not list(checkpoints.glob("best.pt.aside*")), "what was killed there is not taken for a person's own"


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not strace_works(), reason="needs strace and the right to trace")
def test_killed_by_strace_at_each_system_call_of_a_checkpoint(
    tmp_path: Path, cache: Path, undisturbed: Path, figure: Callable[[str], None]
) -> None:
    """Loss: as above, where the thin layer does not see what Python really calls."""
    chain = Chain(tmp_path, cache, CHECKPOINTS)
    struck: dict[str, int] = {}
    for syscall, number in kill_points():
        chain.killed(chain.faults.strace(syscall, number))
        last = chain.faults.log.read_text().splitlines()[-2:]
        assert any(syscall in line for line in last), last
        struck[syscall] = number
    chain.to_the_end()
    assert_no_trace(chain.run, undisturbed)
    figure(f"killed by strace at system calls of an epoch checkpoint, resumed each time: {struck}")


def kill_points() -> Iterator[tuple[str, int]]:
    """The system calls of one checkpoint, by kind: 6 writes of data, 1 of manifest; fsyncs of data, manifest and folders; ..."""
    for syscall, count in (("write", 7), ("fsync", 5), ("rename", 2), ("unlink", 2)):
        for number in range(1, count + 1):
            yield syscall, number
