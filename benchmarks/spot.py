"""A seeded spot trace: `uv run benchmarks/spot.py [--minutes 20] [--every 120] [--seed 0]`. Needs root, for network namespaces.

Three nodes train; every so many seconds one of them is preempted, without a word (power off), with SIGTERM, or with a notice of a mock
AWS metadata service, and comes back as a new machine after some seconds. At the end all are told to leave. Printed is what
`goodput.json` says beside a stop-watch of our own: the wall time, where it went, and for each preemption what the account knows of
it. Exit code 1 if the wall times differ by more than 1 %, or an interruption is missing or has no cause.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gai_yolo.goodput.report import REPORT_FILE, Report, from_json
from tests.faults.cluster import Cluster, Node
from tests.faults.metadata_servers import AwsServer
from tests.harness import REPOSITORY, small

SETTINGS = (
    *("model.size=n", "training.max_batches_per_epoch=400", "training.epochs=100", "data.workers=1", "evaluation.interval=1"),
    *("training.batch_size=12", "training.micro_batch_size=3", "elastic.memory_interval_steps=5", "elastic.memory_folder=/dev/shm"),
)
KINDS = ("power off", "SIGTERM", "notice")
WITHIN = 30.0
"""Seconds after a preemption in which the account must have an interruption."""


@dataclass(frozen=True)
class Preemption:
    """What was done to a node."""

    time: float
    """Seconds since 1970."""
    kind: str
    node: str


def main() -> int:
    """Run the trace and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between two preemptions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="copy the run's goodput.json and goodput/ into this folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wall, preemptions, run_folder = trace(Path(folder), given.minutes * 60, given.every, random.Random(given.seed))
        report = from_json((run_folder / REPORT_FILE).read_text())
        if given.keep:
            shutil.copytree(run_folder / "goodput", given.keep / "goodput", dirs_exist_ok=True)
            shutil.copy(run_folder / REPORT_FILE, given.keep)
    return show(wall, report, preemptions)


def trace(folder: Path, seconds: float, every: float, rng: random.Random) -> tuple[float, list[Preemption], Path]:
    """Returns the seconds that it took, what was done, and a copy of the run's accounts."""
    with Cluster(folder, 3) as cluster, contextlib.ExitStack() as stack:
        clouds = {node.name: stack.enter_context(AwsServer(cluster.outside)) for node in cluster.nodes}
        started = time.time()
        for node in cluster.nodes:
            boot(cluster, node, clouds[node.name])
        preemptions: list[Preemption] = []
        while started + seconds - time.time() > every:
            time.sleep(max(0.0, started + every * (len(preemptions) + 1) - time.time()))
            node, kind = rng.choice(cluster.nodes), KINDS[len(preemptions) % len(KINDS)]
            preemptions.append(Preemption(time.time(), kind, node.name))
            print(f"{time.time() - started:7.1f} s  {kind} of {node.name} at step {cluster.steps()}", flush=True)
            preempt(cluster, node, kind, clouds[node.name])
            time.sleep(rng.uniform(5, 30))
            boot(cluster, node, clouds[node.name])
        time.sleep(max(0.0, started + seconds - time.time()))
        for node in cluster.nodes:
            if (pid := node.launcher_pid()) is not None:
                os.kill(pid, signal.SIGTERM)
        cluster.wait_for(lambda: not any(node.is_up for node in cluster.nodes), "the end")
        wall = time.time() - started
        kept = Path(tempfile.mkdtemp())
        shutil.copytree(cluster.shared / "run" / "goodput", kept / "goodput")
        shutil.copy(cluster.shared / "run" / REPORT_FILE, kept)
    return wall, preemptions, kept


def preempt(cluster: Cluster, node: Node, kind: str, cloud: AwsServer) -> None:
    """Take a node away; returns when it is gone."""
    if kind == "power off":
        node.kill()
    elif kind == "SIGTERM":
        pid = node.launcher_pid()
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
    else:
        cloud.give()
    cluster.wait_for(lambda: not node.pids(), f"{node.name} is gone")
    cloud.withdraw()


def boot(cluster: Cluster, node: Node, cloud: AwsServer) -> None:
    """Start the job on a node."""
    notices = ("elastic.notices=aws", f"elastic.notices_endpoint={cloud.url}")
    command = ["elastic_train.py", *small(cluster.shared, Path("~/.cache/gai-yolo").expanduser(), *SETTINGS, *notices)]
    node.start(["--nodes", "1:3", "--rendezvous", str(cluster.shared / "rendezvous"), "--job-id", "spot"], command)


def show(wall: float, report: Report, preemptions: list[Preemption]) -> int:
    """Print the account beside the stop-watch; returns the exit code."""
    total = sum(report.seconds.values())
    print(json.dumps({part: round(seconds, 1) for part, seconds in report.seconds.items()}))
    difference = (total - wall) / wall
    print(
        f"stop-watch {wall:.1f} s, account {total:.1f} s: {difference:+.2%}; goodput {report.goodput:.1%}; replayed {report.replayed_steps}"
    )
    missing = 0
    for one in preemptions:
        known = [found for found in report.interruptions if -2.0 <= found.time - one.time <= WITHIN]
        missing += not known or not known[0].cause
        print(f"{one.kind} of {one.node}: " + (f"{known[0].cause}, lost {known[0].lost_steps} steps" if known else "NOT IN THE ACCOUNT"))
    print(f"{len(preemptions)} preemptions, {len(report.interruptions)} interruptions (a node that joins is one too), {missing} missing")
    return int(abs(difference) > 0.01 or missing > 0)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
