"""Schedules of faults: every kind is drawn once, dealt out to one schedule for each kind of storage; and the test of one."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tests.faults import faults_of_nodes, faults_of_storage
from tests.faults.cluster import Cluster
from tests.faults.cluster_job import ClusterJob, Storage, arguments, disk_of_its_own
from tests.faults.metadata_servers import AwsServer
from tests.harness import Running
from tests.runs import account, ledger, scalar_steps, state_digest

SEEDS = range(int(os.environ.get("GAI_YOLO_SCHEDULES", "1")))
"""Each draws every kind of fault once; ten are for whoever changes something here."""
ONLY = [name for name in os.environ.get("GAI_YOLO_ONLY", "").split(",") if name]
"""Names of faults: these alone, in the order of KINDS, on whichever storage is tested."""
STEPS_PER_EPOCH = 16
STEP_SECONDS, LONG_STEP_SECONDS = 0.3, 1.0
"""Added to each step of a schedule of chosen faults, and of one that has many: no fault may take the rest of the run."""
LOCKED_SECONDS = 5.0
"""A lock is held in a schedule of chosen faults."""
UNDISTURBED = "undisturbed"
"""Name of the folder of the run that nothing disturbs."""


Strike = Callable[[ClusterJob], str]


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    strike: Strike
    storage: Storage | None = None
    """It makes sense with this one only."""
    needs_namespaces: bool = False
    weight: int = 1
    """It takes as long as so many others."""
    steps: int = 7
    """The job may go on by so many steps meanwhile, and before the next one."""

    @property
    def name(self) -> str:
        """For people, and GAI_YOLO_ONLY."""
        return self.strike.__name__


KINDS = (
    Kind(faults_of_nodes.worker),
    Kind(faults_of_nodes.agent),
    Kind(faults_of_nodes.launcher),
    Kind(faults_of_nodes.node),
    Kind(faults_of_nodes.first_node),
    Kind(faults_of_nodes.stopped),
    Kind(faults_of_nodes.cut_off, needs_namespaces=True),
    Kind(faults_of_nodes.told),
    Kind(faults_of_nodes.noticed),
    Kind(faults_of_nodes.grows),
    Kind(faults_of_nodes.other_configuration),
    Kind(faults_of_nodes.empty_node_first, "local", weight=2, steps=24),
    Kind(faults_of_storage.full_disk, "shared", needs_namespaces=True),
    Kind(faults_of_storage.full_at_start, "shared", needs_namespaces=True),
    Kind(faults_of_storage.lock_held, "shared", weight=4),
    Kind(faults_of_storage.stale),
    Kind(faults_of_storage.slow_scoring, weight=2, steps=24),
)


def plan(seed: int, storage: Storage, namespaces: bool = True) -> list[Kind]:
    """The faults of a schedule in their order. Those of one seed, on all kinds of storage together, are every kind once.

    Args:
        namespaces: whether nodes have networks and disks of their own.
    """
    rng = random.Random(seed)
    dealt: dict[Storage, list[Kind]] = {one: [kind for kind in KINDS if kind.storage == one] for one in get_args(Storage)}
    for kind in rng.sample([kind for kind in KINDS if kind.storage is None], k=sum(kind.storage is None for kind in KINDS)):
        lightest = min(dealt, key=lambda one: sum(kind.weight for kind in dealt[one]))
        dealt[lightest].append(kind)
    mine = [kind for kind in dealt[storage] if namespaces or not kind.needs_namespaces]
    return rng.sample(mine, len(mine))


def planned(seed: int, storage: Storage, namespaces: bool) -> list[Kind]:
    """As `plan`, or what GAI_YOLO_ONLY says."""
    return [kind for kind in KINDS if kind.name in ONLY and kind.storage in (None, storage)] or plan(seed, storage, namespaces)


def chosen(strikes: Sequence[Strike], namespaces: bool) -> list[Kind]:
    """The kinds that these are."""
    kinds = [kind for strike in strikes for kind in KINDS if kind.strike is strike]
    return [kind for kind in kinds if namespaces or not kind.needs_namespaces]


def check_schedule(seed: int, storage: Storage, folder: Path, cache: Path, strikes: Sequence[Strike] = ()) -> str:
    """Let every fault of a schedule strike the job, and compare its end with that of an undisturbed run; returns what happened.

    Args:
        strikes: these, in place of the seed's, and no lock is held for long.
    """
    rng, began = random.Random(f"{seed} {storage}"), time.monotonic()
    with cluster_job(storage, folder, cache, rng) as job, contextlib.ExitStack() as stack:
        cluster = job.cluster
        kinds = chosen(strikes, cluster.namespaces) or planned(seed, storage, cluster.namespaces)
        job.locked_seconds = LOCKED_SECONDS if strikes else job.locked_seconds
        epochs = max(math.ceil(sum(kind.steps for kind in kinds) / STEPS_PER_EPOCH), 3)
        job.length = (f"training.max_batches_per_epoch={STEPS_PER_EPOCH}", f"training.epochs={epochs}")
        job.length += ("evaluation.interval=1",)  # one kind strikes while rank 0 scores
        alone = stack.enter_context(undisturbed(job))
        for node in cluster.nodes:
            node.slow_down(STEP_SECONDS if strikes else LONG_STEP_SECONDS)
        for node in cluster.nodes[: rng.choice([2, 3])]:
            job.boot(node)
        fired: list[str] = []
        for number, kind in enumerate(kinds):
            # Between two faults at least one new step: otherwise it would be one fault.
            cluster.wait_for_step(cluster.steps() + 1 + rng.randrange(3))
            assert cluster.steps() < epochs * STEPS_PER_EPOCH, f"the run is over before fault {number}, {kind.name}: {fired}"
            cluster.wait_for(lambda: bool(job.workers()), "a worker")
            at = cluster.steps()
            fired.append(f"step {at}: {kind.strike(job)}")
            print(f"{time.monotonic() - began:.0f} s, {fired[-1]}", flush=True)
        for node in cluster.nodes:
            if not node.is_up and node.launcher is None:
                job.boot(node)
        cluster.wait_for(lambda: not job.up(), "the end", 600.0)
        assert {node.launcher.returncode for node in cluster.nodes if node.launcher} == {0}, cluster.outputs()
        assert alone.wait() == 0, alone.output
        end = compare(job, epochs, fired, [kind.name for kind in kinds])
        return f"{storage} storage, schedule {seed}: {fired}; goodput {account(end)['goodput']:.2f}; {time.monotonic() - began:.0f} s"


@contextlib.contextmanager
def cluster_job(storage: Storage, folder: Path, cache: Path, rng: random.Random) -> Iterator[ClusterJob]:
    """Three machines with their metadata services, and disks that can be filled."""
    with Cluster(folder, 3) as cluster, contextlib.ExitStack() as stack:
        clouds = {node.name: stack.enter_context(AwsServer(cluster.outside)) for node in cluster.nodes}
        job = ClusterJob(cluster, storage, cache, (), clouds, rng)
        job.meeting.mkdir()
        if cluster.namespaces:
            stack.enter_context(disk_of_its_own(cluster.shared))
            stack.enter_context(disk_of_its_own(job.meeting))
        yield job


@contextlib.contextmanager
def undisturbed(job: ClusterJob) -> Iterator[Running]:
    """The run of one process that nothing disturbs, beside the other one: it takes what that leaves of the processors, which is much while
    that waits for a lock or comes up again. So no step of it is too slow."""
    patient = ("elastic.step_timeout_seconds=3600", "elastic.timeout_seconds=3600")
    alone = Running("elastic_train.py", arguments(job.cluster.folder / UNDISTURBED, job.cache, *job.length, *patient))
    os.setpriority(os.PRIO_PROCESS, alone.process.pid, 19)
    try:
        yield alone
    finally:
        if alone.process.poll() is None:
            alone.send(signal.SIGKILL)
            alone.wait()


def compare(job: ClusterJob, epochs: int, fired: list[str], names: list[str]) -> Path:
    """The end of a run that was disturbed with that of one that was not; returns a run folder in which it is."""
    last = f"checkpoints/epoch_{epochs:03d}.pt"
    ends = [folder for folder in job.run_folders() if (folder / last).exists()]
    assert ends, job.cluster.outputs()
    alone = job.cluster.folder / UNDISTURBED
    wanted = state_digest(alone / "run" / last)
    assert {state_digest(end / last) for end in ends} == {wanted}, "\n".join(fired)
    if job.storage == "local":
        return ends[0]  # pictures, ledger and TensorBoard's files lie on the nodes that were rank 0 at the time
    shown, expected = scalar_steps(ends[0])["Loss/Train_Batch"], list(range(1, epochs * STEPS_PER_EPOCH + 1))
    assert shown == sorted(set(shown)) and set(shown) <= set(expected)
    if not {"full_disk", "full_at_start"} & set(names):
        # TensorBoard and the ledger have nowhere to keep what a full disk does not take.
        assert ledger(ends[0]) == ledger(alone / "run"), "no sample lost or doubled"
        # The moments before a kill, which a survivor's state knows and the killed process's writer thread had not yet written.
        assert len(expected) - len(shown) <= len(fired), set(expected) - set(shown)
    return ends[0]
