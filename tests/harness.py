"""Starting the real job from tests: small, single-threaded, in folders of the test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

from gai_yolo.launcher.fork_server import FORKED_NAME
from gai_yolo.processes import children_of, name_of
from tests.zygote import TORCHRUN, Forked, zygote

REPOSITORY = Path(__file__).parents[1]
NUM_IMAGES, NUM_VALIDATION_IMAGES = 211, 13
"""Of the data set that jobs train on: `shapes`, but half of it, and little to evaluate."""
PATIENCE = 240.0
"""Seconds to wait for a process on a busy machine before a test fails."""


def small(folder: Path, cache: Path, *more: str) -> list[str]:
    """`--set` arguments for a run of seconds: a network that learns nothing, two epochs of tiny images, one evaluation at the end, one
    thread, no loader processes."""
    values = [
        f"experiment.folder={folder}",
        "experiment.name=run",
        f"data.cache_folder={cache}",
        f"elastic.memory_folder={cache}",  # goes with the test's files, killed or not
        "elastic.notices=none",
        "model.size=debug",
        "data.path=shapes",
        "data.image_size=64",
        "data.workers=0",
        "training.epochs=2",
        "training.batch_size=12",
        "training.micro_batch_size=4",
        "training.max_batches_per_epoch=2",
        "training.checkpoint_interval=1",
        "evaluation.interval=1000",
        "training.threads=1",
        "training.device=cpu",
        "reporting.images=0",
        "reporting.log_interval=1",
        *more,
    ]
    return [argument for value in values for argument in ("--set", value)]


def command(script: str, arguments: Sequence[str], processes: int = 1, restarts: int = 0) -> list[str]:
    """The command line of a script of this repository, under torchrun if it is to have several processes or to be started again."""
    path = str(REPOSITORY / script)
    if processes == 1 and not restarts:
        return [sys.executable, path, *arguments]
    launcher = [sys.executable, *TORCHRUN, "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, f"--max-restarts={restarts}", path, *arguments]


def environment() -> dict[str, str]:
    """The environment of a child: one thread, no outer torchrun."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in outer and not key.startswith("TORCHELASTIC")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def run(script: str, arguments: Sequence[str], processes: int = 1, plain: bool = False) -> subprocess.CompletedProcess[str]:
    """Run to the end from the repository's folder, as a user would.

    Args:
        plain: not by the zygote.
    """
    return finished(command(script, arguments, processes), environment(), plain=plain)


def finished(words: Sequence[str], wanted: Mapping[str, str], apart: bool = True, plain: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command to the end; see `start`."""
    job = start(words, wanted, apart, plain)
    with ThreadPoolExecutor() as readers:
        said = [readers.submit(stream.read) for stream in (job.stdout, job.stderr) if stream is not None]
        try:
            code = job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            job.kill()
            raise
    return subprocess.CompletedProcess(list(words), code, *(one.result() for one in said))


def start(
    words: Sequence[str],
    wanted: Mapping[str, str],
    apart: bool = False,
    plain: bool = False,
    folder: Path = REPOSITORY,
    output: IO[Any] | None = None,
) -> subprocess.Popen[str] | Forked:
    """Start a job in a session of its own, forked where that makes no difference.

    Args:
        apart: errors have a stream of their own.
        folder: where it runs.
        output: where all is written that it says; None: to streams.
    """
    forks = None if plain else zygote()
    if forks is not None and forks.can_start(wanted):
        return forks.start(words, wanted, apart, folder, output)
    errors = subprocess.PIPE if apart else subprocess.STDOUT
    return subprocess.Popen(
        words, cwd=folder, env=dict(wanted), stdout=output or subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )


class Running:
    """A job in the background, in a process group of its own, whose output can be waited for."""

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        processes: int = 1,
        extra: Mapping[str, str] | None = None,
        restarts: int = 0,
        plain: bool = False,
    ) -> None:
        words = command(script, arguments, processes, restarts)
        self._has_agent = TORCHRUN[1] in words
        self.process = start(words, {**environment(), "PYTHONUNBUFFERED": "1", **(extra or {})}, apart=False, plain=plain)
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, text: str) -> None:
        """Wait until a text has appeared in the output."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            assert time.monotonic() < deadline, f"{text!r} did not appear in time:\n{self.output}"
            assert self.process.poll() is None or text in self.output, f"ended before {text!r}:\n{self.output}"
            time.sleep(0.02)

    def training_processes(self) -> list[int]:
        """Process ids of the script itself: under torchrun its children, by rank. Reads /proc."""
        if not self._has_agent:
            return [self.process.pid]
        return sorted(pid for pid in children_of(self.process.pid) if name_of(pid) != FORKED_NAME) or [self.process.pid]

    def hold_until(self, condition: Callable[[], bool]) -> None:
        """Stop the training until something is so, and let it go on: a busy machine's writer has all the time that it needs.

        A signal to the job still reaches it. What waits for the writer waits in the training process, so every few seconds
        that one is let go until it says something, which is a step.
        """
        training = self.training_processes()
        deadline = time.monotonic() + PATIENCE
        while not condition():
            _signal(training, signal.SIGSTOP)
            _wait(condition, 4.0)
            said = self.output
            _signal(training, signal.SIGCONT)
            if not condition():
                _wait(partial(self._has_said_more, said), 10.0)
            assert self.process.poll() is None and time.monotonic() < deadline, self.output

    def _has_said_more(self, than: str) -> bool:
        return self.output != than

    def send(self, signal_number: signal.Signals) -> None:
        """Signal every process of the job, as a terminal or a dying machine does. Under torchrun each process has a session of its
        own, and would outlive its agent."""
        for group in {self.process.pid, *self.training_processes()}:
            os.killpg(group, signal_number)

    def wait(self) -> int:
        """Exit code, after all output was read."""
        code = self.process.wait(PATIENCE)
        self._reader.join(10)
        return code


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
