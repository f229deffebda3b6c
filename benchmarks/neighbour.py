"""What a busy neighbour costs, by how OpenMP's threads wait: `uv run benchmarks/neighbour.py [--rounds 10]`.

One process for each setting holds a training job in memory, and they take turns, on all cores: real steps of YOLO12-n, undisturbed and
beside processes that compute without end (a loader, the writer, another job). Which setting goes first changes every round. Printed
are the medians of the seconds of a step, their quartiles, and the medians of the ratios to the first setting's of the same round. At the
end all have trained equally long, and their weights are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gai_yolo.machine import SAID_BY

CONFIG = Path("configs/config.yaml")
SETTINGS = ["GOMP_SPINCOUNT=300000", "OMP_WAIT_POLICY=PASSIVE", *(f"GOMP_SPINCOUNT={count}" for count in (100, 1000, 2000, 4000, 10000))]
"""The first is libgomp's own."""


def main() -> None:
    """Start the processes and let them take turns, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="NAME=VALUE")
    parser.add_argument("--neighbours", nargs="+", type=int, default=[0, 1], help="busy processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--be-trained", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be_trained:
        take_turns(given.be_trained, given.set)
        return
    with contextlib.ExitStack() as stack:
        jobs = {}
        for setting in given.settings:
            jobs[setting] = start(stack, setting, given.steps, given.set)
            turn(jobs[setting])  # built, and warm, before the next one
        seconds: dict[tuple[int, str], list[float]] = {(count, name): [] for count in given.neighbours for name in jobs}
        for number in range(given.rounds):
            for count in given.neighbours:
                with neighbours(count):
                    for place in range(len(jobs)):
                        setting = given.settings[(place + number) % len(jobs)]
                        seconds[count, setting].append(turn(jobs[setting]))
        weights = {ask(job, "weights") for job in jobs.values()}
    for count in given.neighbours:
        print_table(count, {setting: seconds[count, setting] for setting in given.settings})
    print("the weights are equal, to the last bit" if len(weights) == 1 else "THE WEIGHTS DIFFER")


def start(stack: contextlib.ExitStack, setting: str, steps: int, overrides: list[str]) -> subprocess.Popen[str]:
    """A process that trains when it is its turn."""
    name, value = setting.split("=")
    environment = {key: old for key, old in os.environ.items() if key not in SAID_BY} | {name: value}
    command = [sys.executable, "-m", "benchmarks.neighbour", f"--be-trained={steps}", *(f"--set={one}" for one in overrides)]
    job = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.callback(job.wait)
    stack.callback(pipe(job.stdin).close)  # its end
    return job


def turn(job: subprocess.Popen[str]) -> float:
    """Let it train; returns the seconds of a step."""
    return float(ask(job, "train"))


def ask(job: subprocess.Popen[str], what: str) -> str:
    """A line from a process that is told a line."""
    print(what, file=pipe(job.stdin), flush=True)
    return pipe(job.stdout).readline()


def take_turns(steps: int, overrides: list[str]) -> None:
    """For each line from the standard input, train `steps` steps and say how long one took, or give the weights' digest."""
    from benchmarks.epoch import build, train  # these import PyTorch, which only those need that are measured
    from gai_yolo.machine import available_cores

    settings = ["data.workers=0", "data.image_size=320", "training.batch_size=16", "reporting.tensorboard=false"]
    with tempfile.TemporaryDirectory() as folder:
        threads = f"training.threads={available_cores()}"
        run = build(CONFIG, [*settings, threads, *overrides, f"experiment.folder={folder}"])
        batches = [batch for _, batch in zip(range(steps), run.loader.epoch(1), strict=False)]
        train(run, batches)
        for line in sys.stdin:
            if line == "train\n":
                print(train(run, batches) / steps, flush=True)
            else:
                parts = (tensor.contiguous().numpy().tobytes() for tensor in run.state.model.state_dict().values())
                print(hashlib.sha256(b"".join(parts)).hexdigest(), flush=True)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def print_table(count: int, seconds: dict[str, list[float]]) -> None:
    """Medians and ratios of one number of neighbours."""
    print(f"{count} busy neighbours" if count else "undisturbed")
    first = next(iter(seconds.values()))
    for setting, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        ratio = statistics.median(value / default for value, default in zip(values, first, strict=True))
        print(f"  {setting:<26} {median:.3f} s ({low:.3f} to {high:.3f})   ratio {ratio:.3f}", flush=True)


def pipe(stream: IO[str] | None) -> IO[str]:
    """A stream that is there, because it was asked for."""
    assert stream is not None
    return stream


if __name__ == "__main__":
    main()
