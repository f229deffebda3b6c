"""Faults of processes, machines and the network between them. Each does it, and returns how it was seen to have fired."""

from __future__ import annotations

import os
import shutil
import signal
import time

from tests.faults.cluster import Node
from tests.faults.cluster_job import ClusterJob, saved_step

WRONG = {"loss.box": "15", "augment.flip": "0"}
"""Settings with which a node must not train."""


def worker(job: ClusterJob) -> str:
    """The training process of a node dies."""
    node = job.one()
    pid = node.workers()[0]
    os.kill(pid, signal.SIGKILL)
    job.cluster.wait_for(lambda: pid not in node.pids(), "the worker is dead")
    return f"worker {pid} of {node.name} killed"


def agent(job: ClusterJob) -> str:
    """torchrun's agent dies alone, and its worker must not train on as an orphan."""
    node = job.one()
    agent, workers = node.agents()[0], node.workers()
    os.kill(agent, signal.SIGKILL)
    job.cluster.wait_for(lambda: not {agent, *workers} & set(node.pids()), "agent and orphans are gone", 30.0)
    return f"agent of {node.name} killed, its worker left"


def launcher(job: ClusterJob) -> str:
    """`gai-yolo launch` dies alone, and nothing must be left of it."""
    node = job.one()
    pid = node.launcher_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    job.cluster.wait_for(lambda: not node.pids(), "nothing is left on the node", 60.0)
    job.boot(node)
    return f"launcher of {node.name} killed"


def node(job: ClusterJob) -> str:
    """Power off, and on again after some seconds."""
    return _off_and_on(job, job.one())


def first_node(job: ClusterJob) -> str:
    """The same with the node that writes the checkpoints."""
    return _off_and_on(job, job.cluster.first_node())


def _off_and_on(job: ClusterJob, node: Node) -> str:
    count = job.power_off(node)
    assert count >= 3 and not node.pids()
    time.sleep(job.rng.uniform(0, 4))
    job.boot(node)
    return f"{count} processes of {node.name} killed"


def stopped(job: ClusterJob) -> str:
    """A machine that hangs and comes back, and may still believe that it is rank 0."""
    node = job.one()
    count = node.signal_all(signal.SIGSTOP)
    before = job.cluster.steps()
    time.sleep(job.rng.uniform(1, 12))
    node.signal_all(signal.SIGCONT)
    return f"{count} processes of {node.name} stopped at step {before}"


def cut_off(job: ClusterJob) -> str:
    """A network cable."""
    node = job.one()
    node.cut_off(True)
    assert not node.is_connected()
    time.sleep(job.rng.uniform(2, 14))
    node.cut_off(False)
    return f"{node.name} cut off"


def told(job: ClusterJob) -> str:
    """SIGTERM, as Kubernetes and Slurm say it; another machine comes in its place."""
    node = job.one()
    assert node.launcher is not None
    pid = node.launcher_pid()
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    job.cluster.wait_for(lambda: not node.pids(), "it has left", 20.0)
    code = node.launcher.wait()
    assert code in (75, 0), job.cluster.outputs()
    job.boot(node)
    return f"{node.name} left with code {code}"


def noticed(job: ClusterJob) -> str:
    """The cloud says that the machine goes, and means it; or takes it back, or lies."""
    node, kind = job.one(), job.rng.choice(["comes", "withdrawn", "lies"])
    cloud = job.clouds[node.name]
    if kind == "lies":
        cloud.lie = "nonsense"
        job.cluster.wait_for(lambda: bool(cloud.lied), "the lie was told", 30.0)
        cloud.lie = None
        return f"{node.name} was lied to"
    cloud.give()
    job.cluster.wait_for(cloud.served.is_set, "the notice was read", 30.0)
    if kind == "withdrawn":
        cloud.withdraw()
        cloud.served.clear()
        return f"{node.name} had a notice that was withdrawn"
    job.cluster.wait_for(lambda: not node.pids(), "it has left", 30.0)
    assert node.launcher is not None and node.launcher.wait() in (75, 0), job.cluster.outputs()
    cloud.withdraw()
    cloud.served.clear()
    job.boot(node)
    return f"{node.name} had notice, and left"


def grows(job: ClusterJob) -> str:
    """A node that was not there joins."""
    absent = [node for node in job.cluster.nodes if not node.is_up]
    if not absent:
        node = job.one()
        job.power_off(node)
        job.go_on()
        absent = [node]
    job.boot(absent[0])
    job.cluster.wait_for(lambda: bool(absent[0].workers()) or not absent[0].is_up, "it has joined")
    return f"{absent[0].name} joined"


def other_configuration(job: ClusterJob) -> str:
    """A node comes up with another configuration: it is refused, and the others train on without it until it has been put right."""
    job.have_nodes(3)
    node = job.one()
    job.power_off(node)
    others = job.up()
    job.go_on()
    job.boot(node, *(f"{key}={value}" for key, value in WRONG.items()))
    job.cluster.wait_for(lambda: not node.is_up, "the node with another configuration is refused")
    assert node.launcher is not None and node.launcher.returncode == 2, job.cluster.outputs()
    said = node.logs[-1].read_text()
    assert all(key in said for key in WRONG), said
    job.go_on()
    assert all(one.is_up for one in others), job.cluster.outputs()
    job.boot(node)
    return f"{node.name} refused with {WRONG}"


def empty_node_first(job: ClusterJob) -> str:
    """All machines die; a new one, whose disk is empty, is the first to come up, and trains alone; then the work comes back."""
    job.have_nodes(2)
    # More than the new node makes until the other one has come up.
    job.cluster.wait_for(lambda: max(map(saved_step, job.run_folders()), default=0) >= 12 or not job.up(), "saved work")
    died = sum(job.power_off(node) for node in job.up())
    holder = max(job.cluster.nodes, key=lambda node: saved_step(job.disk(node) / "run"))
    work = saved_step(job.disk(holder) / "run")
    empty = job.rng.choice([node for node in job.cluster.nodes if node is not holder])
    shutil.rmtree(job.disk(empty), ignore_errors=True)
    job.boot(empty)
    before = job.offsets()
    job.cluster.wait_for(lambda: bool(job.steps_since(before)), "the new node trains")
    alone = job.steps_since(before)
    assert alone[0] == 1, "it began at the beginning"
    job.boot(holder)
    job.cluster.wait_for(lambda: bool(empty.workers() and holder.workers()), "both train")
    together = job.offsets()
    job.cluster.wait_for(lambda: bool(job.steps_since(together)) or not job.up(), "a step together")
    first = min(job.steps_since(together))
    assert first > work, f"{holder.name} had saved step {work}, they went on with {first}\n{job.cluster.outputs()}"
    return f"{died} processes killed; {empty.name} trained alone, {holder.name} came with step {work}, both went on with step {first}"
