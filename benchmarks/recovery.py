"""Seconds from a fault to the next new step: `uv run benchmarks/recovery.py [--rounds 5]`. Needs root, for network namespaces.

Rounds of four kinds alternate: a bare `torchrun` of a script that imports torch and does all-reduces, one of whose two processes is
killed; this project's job, launched with `gai-yolo launch`, with one of two processes killed; with one of three nodes killed, that of
rank 0; and told to end with SIGTERM and started again at once. Printed are medians, split by what the job's own records say:

    detection    from the fault until the survivors (or the process that was told) have saved the last step and end
    rendezvous   until the first new process starts, and in its process group
    imports      until its script runs
    load         data index, network, state
    first step   until it is done

and, for the bare script, the seconds until its processes have reduced again. With `--against OTHER` (a checkout of another commit, with its
virtual environment in `.venv`) its rounds alternate with those of this one, each in a process of its own, and both tables are printed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from gai_yolo.goodput.record import Record, high_water, read_records
from tests.faults.cluster import Cluster, Node
from tests.harness import REPOSITORY, environment, small

BARE = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
while True:
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        open(sys.argv[1], "a").write(f"{time.time()} {os.getpid()}\\n")
    time.sleep(0.1)
"""
PARTS = ("detection", "rendezvous", "imports", "load", "first step")
SETTINGS = (
    *("model.size=n", "training.max_batches_per_epoch=100000", "training.epochs=2", "data.workers=1"),
    *("training.batch_size=12", "training.micro_batch_size=3", "elastic.memory_interval_steps=5", "elastic.memory_folder=/dev/shm"),
)
PATIENCE = 180.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--costs", type=Path, help="write the splits for benchmarks/scale.py into this file")
    parser.add_argument("--against", type=Path, help="another checkout of this repository, measured in turn with this one")
    given = parser.parse_args()
    if given.against:
        compare(given.against.resolve(), given.rounds)
        return
    arms: dict[str, Callable[[Path], dict[str, float]]] = {
        "bare torchrun": bare,
        "worker kill": worker_kill,
        "node loss": node_loss,
        "SIGTERM": told,
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(given.rounds):
        for name, arm in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(arm(Path(folder)))
                print(f"{name}: {measured[name][-1]}", flush=True)
    show(measured)
    if given.costs:
        given.costs.write_text(json.dumps({"restart": costs(measured)}, indent=1))


def compare(other: Path, rounds: int) -> None:
    """Rounds of two checkouts in turn; prints a table for each, and the ratio of the totals."""
    checkouts = {"other": other, "this": REPOSITORY}
    measured: dict[str, dict[str, list[dict[str, float]]]] = {name: defaultdict(list) for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            for arm, row in one_round(checkout):
                measured[name][arm].append(row)
                print(f"{name} {arm}: {row}", flush=True)
    for name, checkout in checkouts.items():
        print(f"\n{name}: {checkout}")
        show(measured[name])
    print("\ntotals, this / other, medians:")
    for arm in measured["this"]:
        own, others = (statistics.median(row["total"] for row in measured[name][arm]) for name in ("this", "other"))
        print(f"{arm:16}{own / others:.2f}")


def one_round(checkout: Path) -> list[tuple[str, dict[str, float]]]:
    """What a round of a checkout has printed."""
    command = [str(checkout / ".venv" / "bin" / "python"), "benchmarks/recovery.py", "--rounds", "1"]
    own = {**environment(), "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=own, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.partition(": ") for line in done.stdout.splitlines() if ": {" in line]
    return [(arm, ast.literal_eval(row)) for arm, _, row in lines]


def costs(measured: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The splits as `benchmarks/scale.py` takes them. A notice is a SIGTERM of which the launcher is told; when it starts again is
    counted as rendezvous here."""
    names = {"worker kill": "worker", "node loss": "node", "SIGTERM": "notice"}
    median = {name: {part: statistics.median(row[part] for row in measured[arm]) for part in PARTS} for arm, name in names.items()}
    return {name: {part.replace(" ", "_"): round(max(0.0, value), 3) for part, value in parts.items()} for name, parts in median.items()}


def show(measured: dict[str, list[dict[str, float]]]) -> None:
    """A table of medians, and how they compare with the bare script."""
    base = statistics.median(one["total"] for one in measured["bare torchrun"])
    print(f"\n{'':16}{'total':>9}" + "".join(f"{part:>12}" for part in PARTS) + f"{'/ bare':>9}{'- bare':>9}")
    for name, rows in measured.items():
        total = statistics.median(row["total"] for row in rows)
        parts = "".join(f"{statistics.median(row[part] for row in rows):>10.1f} s" if part in rows[0] else f"{'':>12}" for part in PARTS)
        print(f"{name:16}{total:>7.1f} s{parts}{total / base:>9.2f}{total - base:>+7.1f} s")


def bare(folder: Path) -> dict[str, float]:
    """torchrun's own time for the same."""
    script, log = folder / "bare.py", folder / "log"
    script.write_text(BARE)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=9",
        str(script),
        str(log),
    ]
    own = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: len(_lines(log)) > 5)
            first = int(_lines(log)[-1].split()[1])
            victim = next(pid for pid in children(process.pid) if pid != first)
            killed = time.time()
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: int(_lines(log)[-1].split()[1]) != first)
            again = next(float(line.split()[0]) for line in _lines(log) if int(line.split()[1]) != first)
        finally:
            process.terminate()
    return {"total": again - killed}


def worker_kill(folder: Path) -> dict[str, float]:
    """One of two processes of a node is killed; the other one saves and both are started again."""
    with Cluster(folder, 1) as cluster:
        (node,) = cluster.nodes
        boot(cluster, node, ["--processes-per-node", "2"])
        before = settled(cluster, 1)
        killed = time.time()
        os.kill(max(node.workers()), signal.SIGKILL)
        return split(cluster, killed, before)


def node_loss(folder: Path) -> dict[str, float]:
    """One of three nodes is gone at once."""
    with Cluster(folder, 3) as cluster:
        arguments = ["--nodes", "1:3", "--rendezvous", str(cluster.shared / "rendezvous"), "--job-id", "loss"]
        for node in cluster.nodes:
            boot(cluster, node, arguments)
        before = settled(cluster, 3)
        victim = cluster.first_node()
        killed = time.time()
        victim.kill()
        return split(cluster, killed, before)


def told(folder: Path) -> dict[str, float]:
    """The launcher is told to end, and started again as soon as it has."""
    with Cluster(folder, 1) as cluster:
        (node,) = cluster.nodes
        boot(cluster, node, ["--processes-per-node", "2"])
        before = settled(cluster, 1)
        pid = node.launcher_pid()
        assert pid is not None and node.launcher is not None
        killed = time.time()
        os.kill(pid, signal.SIGTERM)
        assert node.launcher.wait() == 75, node.output
        boot(cluster, node, ["--processes-per-node", "2"])
        return split(cluster, killed, before)


def boot(cluster: Cluster, node: Node, arguments: list[str]) -> None:
    """Start the job on a node."""
    node.start(arguments, ["elastic_train.py", *small(cluster.shared, Path("~/.cache/gai-yolo").expanduser(), *SETTINGS)])


def settled(cluster: Cluster, nodes: int) -> int:
    """Wait until the job trains on so many nodes, and a bit more; returns the number of its start."""
    wait_for(lambda: sum(bool(node.workers()) for node in cluster.nodes) == nodes and bool(records(cluster)))
    at = newest(cluster)
    wait_for(lambda: newest(cluster).highest >= at.highest + 8 and newest(cluster).world_size >= nodes)
    return newest(cluster).number


def split(cluster: Cluster, killed: float, before: int) -> dict[str, float]:
    """Wait for the first step that was never made before, and say where the time went."""
    highest = high_water(records(cluster))
    wait_for(lambda: newest(cluster).number > before and newest(cluster).highest > highest)
    done = time.time()
    new = newest(cluster)
    ended = [one.ended for one in records(cluster) if one.number == before and one.ended]
    saved = min(ended, default=killed)
    parts = {
        "detection": saved - killed,
        "rendezvous": new.began - saved + new.seconds.get("rendezvous", 0.0),  # type: ignore[call-overload]
        "imports": new.seconds["import"],  # type: ignore[index]
        "load": new.seconds["load"],  # type: ignore[index]
    }
    return {"total": done - killed, **parts, "first step": done - killed - sum(parts.values())}


def records(cluster: Cluster) -> list[Record]:
    """Of all starts so far."""
    return read_records(cluster.shared / "run" / "goodput")[0]


def newest(cluster: Cluster) -> Record:
    """The record of the newest start that got furthest."""
    return max(records(cluster), key=lambda one: (one.number, one.highest), default=Record(began=0.0))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Of a process."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
