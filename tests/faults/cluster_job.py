"""The real job on a cluster, as faults and schedules see it: where each node keeps its run, how it is booted, how far the work is."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gai_yolo.store.catalogue import Catalogue
from tests.faults.cluster import STEP, Cluster, Node
from tests.faults.metadata_servers import AwsServer
from tests.harness import small

Storage = Literal["shared", "local"]
"""Whether all nodes see one run folder, or each has its own."""
MEMORY_INTERVAL = 3
TIMEOUT = 15.0
"""Seconds that processes wait for each other outside of steps."""
SETTINGS = (
    "training.batch_size=12",
    "training.micro_batch_size=3",
    "data.workers=1",
    f"elastic.memory_interval_steps={MEMORY_INTERVAL}",
    "elastic.step_timeout_seconds=6",
    "elastic.check_interval=10",
    "snapshots.interval_seconds=5",
    "reporting.ledger=true",
)
DISK = "size=600m"
"""Room for all checkpoints of a run, and no more than memory can be filled with."""


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    """Of the script, which keeps its runs in this folder."""
    return ["--config", "configs/config_test_resume.yaml", *small(folder, cache, *SETTINGS, *more)]


def memory_of(cluster: Cluster, node: Node) -> tuple[str, ...]:
    """Nodes that are only sets of processes share a /dev/shm, and must not share their memory."""
    if cluster.namespaces:
        return ("elastic.memory_folder=/dev/shm",)
    _memory(node).mkdir(exist_ok=True)
    return (f"elastic.memory_folder={_memory(node)}",)


def _memory(node: Node) -> Path:
    return node.folder / "memory"


@dataclass
class ClusterJob:
    """One run on up to three nodes.

    Args:
        length: settings that say how long it trains.
        clouds: each node's metadata service.
        rng: of the schedule.
    """

    cluster: Cluster
    storage: Storage
    cache: Path
    length: Sequence[str]
    clouds: dict[str, AwsServer]
    rng: random.Random
    locked_seconds: float = 100.0
    """How long a lock stays that nobody holds any more: longer than the 90 s for which an NFSv4 server keeps that of a dead client."""

    def disk(self, node: Node) -> Path:
        """Where a node keeps its runs."""
        return self.cluster.shared if self.storage == "shared" else node.folder / "disk"

    def run_folders(self) -> list[Path]:
        """All that are there."""
        folders = {self.disk(node) / "run" for node in self.cluster.nodes}
        return sorted(folder for folder in folders if folder.exists())

    def boot(self, node: Node, *more: str) -> None:
        """Start a node's launcher, as a machine does that comes up.

        Args:
            more: settings that this node alone has.
        """
        self.disk(node).mkdir(exist_ok=True)
        local = ("elastic.notices=aws", f"elastic.notices_endpoint={self.clouds[node.name].url}", *memory_of(self.cluster, node))
        script = arguments(self.disk(node), self.cache, *self.length, f"elastic.timeout_seconds={TIMEOUT:.0f}", *local, *more)
        launch = ["--nodes", "1:3", "--rendezvous", str(self.meeting / "rendezvous"), "--job-id", "schedule"]
        node.start(launch, ["tests/faults/faulty_train.py", *script])

    @property
    def meeting(self) -> Path:
        """Where the nodes find each other."""
        return self.cluster.folder / "meeting"

    def power_off(self, node: Node) -> int:
        """Let a node die with all that is in its memory; returns how many processes it had."""
        count = node.kill()
        if not self.cluster.namespaces:
            shutil.rmtree(_memory(node), ignore_errors=True)
        return count

    def up(self) -> list[Node]:
        """Nodes whose launcher runs."""
        return [node for node in self.cluster.nodes if node.is_up]

    def one(self) -> Node:
        """A node that has a worker."""
        return self.rng.choice([node for node in self.cluster.nodes if node.workers()])

    def workers(self) -> list[int]:
        """The training processes of all nodes."""
        return sorted(pid for node in self.cluster.nodes for pid in node.workers())

    def have_nodes(self, count: int) -> None:
        """Boot nodes until so many are up, and wait until all that are up train together."""
        absent = [node for node in self.cluster.nodes if not node.is_up]
        for node in absent[: max(count - len(self.up()), 0)]:
            self.boot(node)
        self.cluster.wait_for(lambda: all(node.workers() for node in self.up()), "all nodes that are up have a worker")
        self.go_on()

    def go_on(self, steps: int = 1) -> None:
        """Wait for new steps.

        Raises:
            AssertionError: the run is over.
        """
        wanted = self.cluster.steps() + steps
        self.cluster.wait_for_step(wanted)
        assert self.cluster.steps() >= wanted, f"the run is over\n{self.cluster.outputs()}"

    def offsets(self) -> dict[str, int]:
        """How much each node has printed; for `steps_since`."""
        return {node.name: len(node.output) for node in self.cluster.nodes}

    def steps_since(self, offsets: dict[str, int]) -> list[int]:
        """Numbers, from the run's beginning, of the steps that were printed after that, in order on each node."""
        printed = [STEP.findall(node.output[offsets[node.name] :]) for node in self.cluster.nodes]
        return [(int(epoch) - 1) * int(total) + int(step) for steps in printed for epoch, step, total in steps]


def saved_step(run_folder: Path) -> int:
    """The step of the newest state that is complete on a disk; 0 if there is none."""
    present = Catalogue(run_folder).listing().present
    return present[0].position.step if present else 0


@contextlib.contextmanager
def disk_of_its_own(folder: Path, size: str = DISK) -> Iterator[None]:
    """A folder as a small file system of its own, so that it can be filled. Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
