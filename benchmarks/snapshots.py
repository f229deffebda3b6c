"""What saving costs training: `uv run benchmarks/snapshots.py --size n` (and `--size x --set data.image_size=64`).

Windows of real training steps alternate: without a snapshot, with one durable snapshot of this project at the window's
beginning, with one plain `torch.save` and fsync, and with one `torch.distributed.checkpoint.async_save`. The batches are in memory
and the training has all cores, so that nothing is idle for a writer to hide in. What a snapshot costs does not depend on how often one
is taken, so windows may be shorter than the interval it is then set against; they must be longer than the write, which is
checked. Printed are medians over the rounds: how long the loop itself stood still; how many seconds more a window took than the one
without a snapshot in the same round; what both are at one snapshot each 30 s; and how long it took until it was complete.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.epoch import build
from gai_yolo.checkpointing.tier import DiskTier
from gai_yolo.data.dataset import Batch
from gai_yolo.training.loop import TrainingParts

SETTINGS = (
    *("data.path=shapes", "data.image_size=160", "data.workers=0", "training.batch_size=4", "training.micro_batch_size=4"),
    *(
        "reporting.tensorboard=false",
        "snapshots.keep=1",
        "snapshots.interval_steps=1",
        "evaluation.interval=1000",
        "training.epochs=100000",
        "training.optimizer=sgd",
    ),
)
INTERVAL = 30.0
"""Seconds between snapshots that the costs are set against."""
Save = Callable[[], tuple[float, Callable[[], float]]]
"""Begins a snapshot; returns the seconds it blocked, and what waits for it and returns the seconds until it was complete."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices="nsmlx", default="n")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a window, about")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    given = parser.parse_args()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    # Not in /tmp, which may be memory.
    Path("experiments").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="experiments") as folder:
        overrides = [*SETTINGS, f"model.size={given.size}", f"experiment.folder={folder}", *given.set]
        run = build(Path("configs/config.yaml"), overrides)
        batches = next(run.loader.epoch(1))
        steps = calibrate(run, batches, given.seconds)
        arms: dict[str, Save | None] = {
            "without": None,
            "this project": lambda: ours(run),
            "torch.save": lambda: plain(run, Path(folder) / "plain.pt"),
            "DCP async_save": lambda: dcp(run, Path(folder) / "dcp"),
        }
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
        for number in range(given.rounds):
            for name in rotated(list(arms), number):
                measured[name].append(window(run, batches, steps, arms[name]))
        size = max(path.stat().st_size for path in Path(folder).rglob("*.pt"))
        run.saver.close(60.0)
    show(given.size, run, steps, size, measured)


def rotated(names: list[str], number: int) -> list[str]:
    """Each round begins with another arm, so that a drift of the machine hits all alike."""
    cut = number % len(names)
    return names[cut:] + names[:cut]


def calibrate(run: TrainingParts, batches: list[Batch], seconds: float) -> int:
    """Steps in about so many seconds."""
    train(run, batches, 10)
    started = time.perf_counter()
    train(run, batches, 10)
    return max(5, round(seconds / ((time.perf_counter() - started) / 10)))


def train(run: TrainingParts, batches: list[Batch], steps: int) -> None:
    """So many steps over the same batch."""
    for _ in range(steps):
        run.step(batches, len(batches), sum(len(batch.images) for batch in batches), run.input_size.image_size)


def window(run: TrainingParts, batches: list[Batch], steps: int, save: Save | None) -> tuple[float, float, float]:
    """Seconds of the whole, seconds that the loop stood still, seconds until the snapshot was complete."""
    snapshots = run.saver.tiers[0]
    assert isinstance(snapshots, DiskTier)
    started = time.perf_counter()
    train(run, batches, 1)
    blocked, wait = save() if save else (0.0, lambda: 0.0)
    for _ in range(steps - 1):
        train(run, batches, 1)
        if save is not None and not snapshots.writer.is_idle:
            polled = time.perf_counter()
            snapshots.writer.poll()  # as the loop does at every step
            blocked += time.perf_counter() - polled
    whole = time.perf_counter() - started
    return whole, blocked, wait()


def ours(run: TrainingParts) -> tuple[float, Callable[[], float]]:
    """A mid-epoch snapshot."""
    snapshots = run.saver.tiers[0]
    assert isinstance(snapshots, DiskTier)
    count, seconds = snapshots.count, snapshots.write_seconds
    started = time.perf_counter()
    run.saver.is_due(run.state.step, at_once=True)
    run.saver.after_step(agreed=True)
    blocked = time.perf_counter() - started

    def wait() -> float:
        assert snapshots.writer.drain(120.0) and snapshots.count == count + 1
        return snapshots.write_seconds - seconds

    return blocked, wait


def plain(run: TrainingParts, path: Path) -> tuple[float, Callable[[], float]]:
    """What most scripts do, made durable."""
    started = time.perf_counter()
    with path.with_suffix(".new").open("wb") as file:
        torch.save(run.state.capture(), file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".new").rename(path)
    seconds = time.perf_counter() - started
    return seconds, lambda: seconds


def dcp(run: TrainingParts, folder: Path) -> tuple[float, Callable[[], float]]:
    """torch's own asynchronous checkpoint, with its defaults."""
    started = time.perf_counter()
    captured = run.state.capture()
    state: dict[str, Any] = {"model": captured["model_state_dict"], "ema": captured["ema_state_dict"]}
    state["optimizer"] = {str(key): value for key, value in captured["optimizer_state_dict"]["state"].items()}
    future: Any = async_save(state, checkpoint_id=folder)
    ended: list[float] = []
    future.add_done_callback(lambda _: ended.append(time.perf_counter()))

    def wait() -> float:
        future.result()
        while not ended:
            time.sleep(0.01)
        return ended[0] - started

    return time.perf_counter() - started, wait


def show(size: str, run: TrainingParts, steps: int, num_bytes: int, measured: dict[str, list[tuple[float, float, float]]]) -> None:
    """A table of medians."""
    base = [whole for whole, _, _ in measured["without"]]
    print(
        f"YOLO12-{size}, {run.input_size.image_size} px, {num_bytes / 1e6:.0f} MB a snapshot, {torch.get_num_threads()} threads; ", end=""
    )
    print(f"windows of {steps} steps, {statistics.median(base):.1f} s; medians of {len(base)} rounds, at one each {INTERVAL:.0f} s")
    print(f"{'':16}{'stands still':>14}{'share':>9}{'window longer by':>22}{'throughput':>14}{'complete after':>18}")
    for name, rows in measured.items():
        stall = statistics.median(blocked for _, blocked, _ in rows)
        longer = [whole - without for without, (whole, _, _) in zip(base, rows, strict=True)]
        extra, quartiles = statistics.median(longer), statistics.quantiles(longer, n=4)
        spread = f"{extra:+.2f} s ({quartiles[0]:+.2f}..{quartiles[2]:+.2f})"
        complete = statistics.median(after for _, _, after in rows)
        print(f"{name:16}{stall:>12.3f} s{stall / INTERVAL:>9.2%}{spread:>22}{1 / (1 + extra / INTERVAL):>14.3f}{complete:>16.1f} s")


if __name__ == "__main__":
    main()
