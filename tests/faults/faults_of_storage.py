"""Faults of what is read and written, and of what takes long. Each does it, and returns how it was seen to have fired."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from typing import IO

from tests.faults.cluster import Node, filled
from tests.faults.cluster_job import TIMEOUT, ClusterJob

STALE_SECONDS = 5.0
SCORING_SECONDS = TIMEOUT + 8.0


def full_disk(job: ClusterJob) -> str:
    """The shared disk is full for a while, and so is that of the rendezvous."""
    with filled(job.cluster.shared) as size, filled(job.meeting) as beside:
        assert size > 0 and beside > 0
        time.sleep(job.rng.uniform(2, 6))
    return f"disk full of {size} bytes"


def full_at_start(job: ClusterJob) -> str:
    """The disk is full, and all training processes are killed: those that start there go on from memory, as long as it takes."""
    job.have_nodes(2)
    up = job.up()
    with filled(job.cluster.shared) as size:
        at, killed = job.cluster.steps(), job.workers()
        assert size > 0 and killed
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        job.go_on(2)
        went_on = job.cluster.steps()
        assert not set(killed) & set(job.workers())
    assert all(node.is_up for node in up), job.cluster.outputs()
    return f"{len(killed)} workers killed at step {at} on a disk full of {size} bytes, which went on to step {went_on}"


def lock_held(job: ClusterJob) -> str:
    """All machines die, and the storage believes for long that one of them still holds the lock of the run folder."""
    up = job.up()
    for node in up:
        job.power_off(node)
    with (job.cluster.shared / ".run.lock").open("a") as file:
        # The dead may be seen to be gone a moment before they have let their files go.
        job.cluster.wait_for(lambda: _locks(file), "the lock of the dead", 30.0)
        for node in up:
            job.boot(node)
        before = job.offsets()
        job.cluster.wait_for(lambda: bool(job.workers()), "somebody asks for the lock")
        deadline = time.monotonic() + job.locked_seconds
        while time.monotonic() < deadline:
            assert all(node.is_up for node in up), f"somebody has given up\n{job.cluster.outputs()}"
            time.sleep(0.2)
        assert not job.steps_since(before), "trained without the lock"
    job.cluster.wait_for(lambda: bool(job.steps_since(before)), "steps with the lock")
    return f"lock held for {job.locked_seconds:.0f} s, {len(up)} nodes waited"


def _locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stale(job: ClusterJob) -> str:
    """For 5 s a node's file server does not know the images any more. None of them may be trained on as if it were damaged."""
    node = job.one()
    switch = node.faults / "stale"
    began = _turn_on(job, [node], "stale", "")
    time.sleep(max(0.0, STALE_SECONDS - (time.monotonic() - began)))
    switch.unlink()
    return f"{len(_log(node, 'stale'))} images of {node.name} not opened for {STALE_SECONDS:.0f} s"


def slow_scoring(job: ClusterJob) -> str:
    """Scoring takes longer than processes wait for each other: nobody is started again for that."""
    job.have_nodes(2)
    before = job.workers()
    nodes = job.up()
    _turn_on(job, nodes, "slow_scoring", f"{SCORING_SECONDS}")
    for node in nodes:
        (node.faults / "slow_scoring").unlink()

    def is_over() -> bool:
        return job.workers() != before or any(line.endswith("ends") for node in nodes for line in _log(node, "slow_scoring"))

    job.cluster.wait_for(is_over, "the end of the scoring")
    assert job.workers() == before, f"somebody did not wait\n{job.cluster.outputs()}"
    job.go_on()
    assert job.workers() == before, f"somebody did not wait\n{job.cluster.outputs()}"
    return f"scoring took {SCORING_SECONDS:.0f} s longer, others wait for {TIMEOUT:.0f} s"


def _turn_on(job: ClusterJob, nodes: list[Node], fault: str, setting: str) -> float:
    """Turn on a fault of faulty_train.py and wait until it has struck; returns when that was seen."""
    for node in nodes:
        (node.faults / f"{fault}.log").unlink(missing_ok=True)
        (node.faults / fault).write_text(setting)
    job.cluster.wait_for(lambda: any(_log(node, fault) for node in nodes) or not job.up(), f"{fault} strikes")
    assert any(_log(node, fault) for node in nodes), f"the run ended before {fault}"
    return time.monotonic()


def _log(node: Node, fault: str) -> list[str]:
    path = node.faults / f"{fault}.log"
    return path.read_text().splitlines() if path.exists() else []
