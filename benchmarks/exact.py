"""What exactness costs: `uv run benchmarks/exact.py [--sizes n s] [--processes 2] [--rounds 20]`.

Steps of exact training alternate with steps of plain DDP (`training.exact: false`, no deterministic kernels) on the same batches in
memory, in the same processes; which goes first changes every round. Printed are the medians of the seconds of a step, as the
slowest rank sees it, their ratio, and the quartiles of the ratios of single rounds. Then what finding a sample of ten thousand
million costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch

from benchmarks.epoch import build
from gai_yolo.data.dataset import Batch
from gai_yolo.data.order import Order
from gai_yolo.distributed.world import World, fix_arithmetic
from gai_yolo.training.loop import TrainingParts

CONFIG, BATCHES = Path("configs/config.yaml"), 4


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["n", "s"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.processes}", "-m", "benchmarks.exact"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *sys.argv[1:]], env=environment, cwd=Path(__file__).parents[1], check=True)
        print_order()
        return
    world = World("auto", 1)
    for size in given.sizes:
        measure(size, given.rounds, given.set, world)
    world.close()


def measure(size: str, rounds: int, overrides: list[str], world: World) -> None:
    """Measure one size of the network and print on rank 0."""
    settings = ["data.image_size=320", "training.batch_size=16", "training.threads=1", "data.workers=0", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        common = [*settings, f"model.size={size}", "reporting.tensorboard=false"]
        runs = {
            kind: build(CONFIG, [*common, f"training.exact={kind == 'exact'}", f"experiment.folder={folder}/{kind}"], world)
            for kind in ("exact", "plain")
        }
        batches = [batch for _, batch in zip(range(BATCHES), runs["exact"].loader.epoch(1), strict=False)]
        for kind in runs:
            for number in range(2):  # kernels, memory and DDP's buckets settle
                step(runs[kind], kind, batches, number)
        seconds: dict[str, list[float]] = {"exact": [], "plain": []}
        for number in range(rounds):
            for kind in ("exact", "plain") if number % 2 else ("plain", "exact"):
                seconds[kind].append(step(runs[kind], kind, batches, number))
    plan = runs["exact"].plan
    if world.is_first:
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        low, _, high = statistics.quantiles([e / p for e, p in zip(seconds["exact"], seconds["plain"], strict=True)])
        print(f"YOLO12-{size}, {world.world_size} processes, batch {plan.batch_size} in micro-batches of {plan.micro_batch_size}")
        print(f"a step: exact {medians['exact']:.3f} s, plain DDP {medians['plain']:.3f} s (medians of {rounds} interleaved steps each)")
        print(f"exact / plain {medians['exact'] / medians['plain']:.4f} (quartiles of single rounds {low:.3f} and {high:.3f})", flush=True)


def step(run: TrainingParts, kind: str, batches: list[list[Batch]], number: int) -> float:
    """Seconds of one step on the slowest rank."""
    if kind == "exact":
        fix_arithmetic()
    else:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    run.state.model.train()
    num_micro_batches, num_samples = run.plan.step_size(0)
    world = run.step.world
    world.sum(torch.zeros(1, device=world.device))  # all begin together
    started = time.perf_counter()
    run.step(batches[number % BATCHES], num_micro_batches, num_samples, run.input_size.image_size)
    return float(world.maximum(torch.tensor([time.perf_counter() - started], dtype=torch.float64, device=world.device)).item())


def print_order() -> None:
    """Time and memory of finding a batch in the middle of an epoch's order."""
    times = []
    for number in range(300):
        started = time.perf_counter()
        Order(10**10, 0, number).samples(10**9, 10**9 + 1)
        times.append(time.perf_counter() - started)
    tracemalloc.start()
    Order(10**10, 0, 1).samples(10**9, 10**9 + 64)
    peak = tracemalloc.get_traced_memory()[1]
    print(f"order: position 10^9 of 10^10 in {statistics.median(times) * 1e6:.0f} microseconds, a batch of 64 there in {peak / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
