"""However the job ends, nothing of it lives on: ten ways to end, three numbers of loader processes, three who start it.

A test run has each way once, and each number of loaders under each launcher. `GAI_YOLO_EVERY_END=1 uv run pytest
tests/faults/test_every_way_to_end.py` has all ninety.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gai_yolo.cli import main as cli
from tests.faults.keeper import PATIENCE, Report, read_report
from tests.harness import REPOSITORY, command, environment, small, start

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and adopts orphans")]

SCRIPT = "tests/faults/ending_job.py"
LAUNCHERS, WORKERS = ("alone", "torchrun", "launch"), (0, 1, 2)
CHOSEN = {
    "refusal": ("launch", 0),
    "nan": ("torchrun", 0),
    "memory": ("torchrun", 2),
    "key_error_step": ("torchrun", 1),
    "key_error_loader": ("alone", 2),
    "key_error_evaluation": ("alone", 1),
    "sigterm": ("launch", 1),
    "ctrl_c": ("launch", 2),
    "finished": ("alone", 0),
    "disk_gone": ("alone", 1),
}
"""For each way to end, with whom it is tried in every test run."""
EXIT_CODES = {
    "refusal": (2, 2),
    "nan": (2, 2),
    "memory": (1, 4),
    "key_error_step": (1, 4),
    "key_error_loader": (1, 4),
    "key_error_evaluation": (1, 4),
    "sigterm": (75, 75),
    "ctrl_c": (130, 130),
    "finished": (0, 0),
    "disk_gone": (2, 2),
}
"""Alone, and of `gai-yolo launch`, which starts again what failed until there is no hope. torchrun makes 1 of all but 0."""
SAID = {
    "refusal": "error: /nowhere/yolov12n-typo.pt: cannot be read",
    "nan": "error: the loss or the gradient was not finite",
    "memory": "OutOfMemoryError",
    "key_error_step": "KeyError",
    "key_error_loader": "KeyError",
    "key_error_evaluation": "KeyError",
    "sigterm": "SIGTERM: (left after step|this process leaves)",
    "ctrl_c": "(left after step|this process leaves)",
    "finished": "finished: 2 of 2 epochs",
    "disk_gone": "could not be written within snapshots.patience_seconds",
}
"""Patterns of what is said of the end. On a busy machine a step may take too long to be waited for."""
IN_THE_JOB = ("nan", "memory", "key_error_step", "key_error_loader", "key_error_evaluation")
"""What the job does to itself; see ending_job.py."""
TRACEBACKS = ("memory", "key_error_step", "key_error_loader", "key_error_evaluation")
"""After what nobody had foreseen, a person is to see where it was."""
ENDS_WITHIN = {"disk_gone": 60.0}
"""Seconds from the fault's last strike to the end of the job, on a busy machine..."""
ELSE_WITHIN = 30.0
"""...and for all others."""

CASES = [
    (way, launcher, workers)
    for way, launcher, workers in itertools.product(CHOSEN, LAUNCHERS, WORKERS)
    if os.environ.get("GAI_YOLO_EVERY_END") or CHOSEN[way] == (launcher, workers)
]


class Job:
    """A job with its keeper.

    Args:
        folder: of the test.
        runs: where the run folder is.
    """

    def __init__(self, folder: Path, runs: Path, cache: Path, way: str, launcher: str, workers: int) -> None:
        self.way, self.launcher = way, launcher
        self.struck, self._report = folder / "struck", folder / "report.json"
        arguments = ["--config", "configs/config_test_resume.yaml", *small(runs, cache, *settings(way, workers))]
        words = command(SCRIPT, arguments, 1 if launcher == "alone" else 2, 0 if launcher == "alone" else 20)
        if launcher == "launch":
            words = [sys.executable, "-m", "gai_yolo.cli", "launch", "--processes-per-node", "2", "--", SCRIPT, *arguments]
        keeper = [sys.executable, str(REPOSITORY / "tests/faults/keeper.py"), str(self._report), *words[1:]]
        self._output = folder / "output"
        wanted = {**environment(), "PYTHONUNBUFFERED": "1", "GAI_YOLO_ENDING": f"{way}:{self.struck}"}
        self._process = start(keeper, wanted, apart=False, plain=False)
        assert self._process.stdout is not None
        self._stdout, self.output = self._process.stdout, ""

    def read_until(self, text: str) -> None:
        """Read what it says until it says this."""
        while text not in self.output:
            line = self._stdout.readline()
            assert line, f"ended before {text!r}:\n{self.output}"
            self.output += line

    def end(self) -> Report:
        """Read the rest; returns what has become of it."""
        self.output += self._stdout.read()
        self._process.wait(PATIENCE)
        return read_report(self._report)

    def note_strike(self) -> None:
        """The fault strikes now, from outside."""
        self.struck.write_text(f"{time.monotonic()}\n")

    def signal(self, number: signal.Signals, group: bool) -> None:
        """Signal the process that was started, or all of its group."""
        pid = int(self._report.with_suffix(".pid").read_text())
        self.note_strike()
        (os.killpg if group else os.kill)(pid, number)

    def strikes(self) -> list[float]:
        """When the fault has struck."""
        return [float(line) for line in self.struck.read_text().splitlines()] if self.struck.exists() else []


def settings(way: str, workers: int) -> list[str]:
    """Settings of the job's arguments: as short as can be, except where it must still be there when something strikes from outside."""
    steps = {"sigterm": 90, "ctrl_c": 90, "disk_gone": 6}.get(way, 3)
    more = {
        "refusal": ["model.weights=/nowhere/yolov12n-typo.pt"],
        "nan": ["training.max_bad_steps=0"],
        "key_error_evaluation": ["training.epochs=1"],
        "disk_gone": ["snapshots.patience_seconds=2"],
    }
    length = [f"training.max_batches_per_epoch={steps}", "training.batch_size=2", "training.micro_batch_size=1", "evaluation.interval=2"]
    saving = ["elastic.memory_interval_steps=1", "snapshots.interval_steps=2"]
    return [*length, *saving, f"data.workers={workers}", *more.get(way, [])]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where runs lie: on a disk that can be taken away, where the machine lets us."""
    folder = tmp_path / "disks" / "runs"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def take_away(runs: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Puts `runs` on a disk of its own, below which there is nothing that could be written to; the function takes it away, and returns
    where what is on it can still be looked at."""
    if os.getuid() != 0:
        pytest.skip("needs root, to mount a disk")
    below, aside = runs.parent, tmp_path / "aside"
    aside.mkdir()
    _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", below)
    runs.mkdir()
    _mount("-o", "remount,ro", below)
    _mount("-t", "tmpfs", "-o", "size=600m", "tmpfs", runs)
    _mount("--bind", runs, aside)

    def take() -> Path:
        subprocess.run(["umount", "-l", runs], check=True)
        return aside

    try:
        yield take
    finally:
        for one in (aside, runs, below):
            subprocess.run(["umount", "-l", one], check=False, capture_output=True)


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


@pytest.mark.parametrize(("way", "launcher", "workers"), CASES)
def test_however_it_ends_no_process_lives_on(
    way: str,
    launcher: str,
    workers: int,
    runs: Path,
    tmp_path: Path,
    cache: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    figure: Callable[[str], None],
) -> None:
    """Loss: a job that is over, or was refused, holds the GPU and the run's lock until a person looks for what is left of it."""
    take: Callable[[], Path] | None = request.getfixturevalue("take_away") if way == "disk_gone" else None
    began = time.monotonic()
    job = Job(tmp_path, runs, cache, way, launcher, workers)
    looked_at = runs
    if way in ("sigterm", "ctrl_c"):
        job.read_until("epoch 1/2  step 2/")
        job.signal(signal.SIGTERM if way == "sigterm" else signal.SIGINT, group=way == "ctrl_c")
    if take is not None:
        job.read_until("epoch 2/2  step 2/")
        job.note_strike()
        looked_at = take()
        assert not list(runs.iterdir())
    report = job.end()
    assert not report.left, f"{len(report.left)} of {len(report.ever)} processes live on after {PATIENCE} s\n{report}\n{job.output}"
    expected = EXIT_CODES[way][launcher == "launch"]
    assert report.code == (min(expected, 1) if launcher == "torchrun" else expected), job.output
    assert re.search(SAID[way], job.output), job.output
    struck = job.strikes()
    assert bool(struck) == (way not in ("refusal", "finished")), "the fault has struck"
    took = report.ended_at - struck[-1] if struck else 0.0
    assert took < ENDS_WITHIN.get(way, ELSE_WITHIN), job.output
    own = re.findall(r'File ".*/job/run.py", line \d+, in run_job', job.output)  # torchrun has tracebacks of its own
    assert bool(own) == (way in TRACEBACKS), job.output
    assert len(report.ever) >= at_least(way, launcher, workers), report
    if way == "refusal":
        assert not list(runs.rglob("*.pt")), "nothing was trained"
    else:
        assert cli.main(["snapshots", "verify", str(looked_at / "run")]) == 0, capsys.readouterr().out
    figure(
        f"{way}, {launcher}, {workers} loaders: code {report.code}, {took:.1f} s after the fault; the last of {len(report.ever)} processes "
        f"gone {report.seconds:.2f} s later; {time.monotonic() - began:.0f} s in all"
    )


def at_least(way: str, launcher: str, workers: int) -> int:
    """How many processes there must have been, the launcher's, the training's, the writer and the loaders."""
    training = 1 if launcher == "alone" else 2
    launching = {"alone": 0, "torchrun": 1, "launch": 3}[launcher]  # with its agent and the fork server
    return launching + training + (0 if way == "refusal" else 1 + training * workers)
