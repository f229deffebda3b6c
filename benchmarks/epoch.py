"""Seconds of a training epoch, and what loading the data costs: `uv run benchmarks/epoch.py [--config ...] [--rounds 5]`.

Epochs with the loader alternate with epochs over the same batches kept in memory; medians of both and their ratio are
printed. Evaluation and checkpoints are not part of it. Nothing is written but a temporary run folder.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from gai_yolo.config import load_config
from gai_yolo.data.dataset import Batch
from gai_yolo.data.sources import load_indexes
from gai_yolo.distributed.world import World, fix_arithmetic
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job.build import KnownRun, assemble, make_loaders, make_state
from gai_yolo.job.settlement import settle
from gai_yolo.membership.join import Membership
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.run_record import RunRecord
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notices
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.context import JobContext
from gai_yolo.training.loop import TrainingParts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/bccd.yaml"))
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = build(given.config, [*given.set, f"experiment.folder={folder}", "reporting.tensorboard=false"])
        kept = list(run.loader.epoch(1))
        train(run, kept[:4])  # kernels and memory warm up
        with_loader, in_memory = [], []
        for epoch in range(2, 2 + given.rounds):
            with_loader.append(train(run, run.loader.epoch(epoch)))
            in_memory.append(train(run, kept))
        loaded, bare = statistics.median(with_loader), statistics.median(in_memory)
    images = run.plan.num_samples
    print(f"{given.config}: {images} images, {run.input_size.image_size} px, {run.step.world.threads} threads")
    print(f"epoch with data loading: {loaded:.2f} s ({images / loaded:.1f} images/s); batches in memory: {bare:.2f} s")
    print(f"ratio {loaded / bare:.3f} (medians of {given.rounds} interleaved epochs each)")


def build(config_path: Path, overrides: list[str], world: World | None = None) -> TrainingParts:
    """The job as the configuration says, in a folder of its own; `world` if there is one already."""
    config = load_config(config_path, overrides)
    if config.training.exact:
        fix_arithmetic()
    world = world or World(config.training.device, config.training.threads)
    notices = Notices(CloudWatch("none"))
    watchdog = Watchdog(notices, Limits(), lambda *_: None)  # looks at nothing until it is started
    context = JobContext(world, RunFolder(config.run_folder), NullConsole(), notices, watchdog, Recorder(time.time()))
    context.folder.lock()
    context.folder.make()
    indexes = load_indexes(config.data)
    config = settle(config, None, world, len(indexes[0])).config
    run = KnownRun(config, indexes, Membership(RunRecord("1-benchmark"), None), [])
    state = make_state(run, context, None)
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return assemble(run, make_loaders(run, context, None, stack), state, context)


def train(run: TrainingParts, steps: Iterable[list[Batch]]) -> float:
    """Train on the given steps; returns the seconds, the loader's included."""
    run.state.model.train()
    started = time.perf_counter()
    for number, batches in enumerate(steps):
        num_micro_batches, num_samples = run.plan.step_size(number)
        run.step(batches, num_micro_batches, num_samples, run.input_size.image_size)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
