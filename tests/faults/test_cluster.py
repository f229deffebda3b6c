"""Whole nodes come and go under the real job, launched as users launch it; nothing of it is to be seen in the result."""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from gai_yolo.launcher.fork_server import WORKER_NAME
from gai_yolo.launcher.rendezvous.secret import SECRET_VARIABLE
from gai_yolo.processes import name_of
from tests.faults import faults_of_nodes, faults_of_storage
from tests.faults.cluster import Cluster, Node, has_namespaces
from tests.faults.cluster_job import MEMORY_INTERVAL, arguments, memory_of
from tests.faults.schedules import SEEDS, check_schedule, plan
from tests.harness import run
from tests.runs import account, ledger, scalar_steps, state_digest

pytestmark = pytest.mark.timeout(1500)
STEPS = 15
EPOCHS = 2
NUM_KINDS = 17
LENGTH = (f"training.max_batches_per_epoch={STEPS}",)
LAST = f"checkpoints/epoch_{EPOCHS:03d}.pt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folder of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("elastic_train.py", arguments(folder, cache, *LENGTH))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.mark.parametrize("storage", ["shared", pytest.param("local", marks=pytest.mark.exhaustive)])
def test_the_node_of_rank_0_and_the_rendezvous_is_lost_and_comes_back(
    storage: str, undisturbed: Path, tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: the whole job, with the one machine that was thought to be safe; without shared storage all of its work too."""
    with Cluster(tmp_path, 3) as cluster:
        if storage == "shared":
            where = str(cluster.shared / "rendezvous")
        elif cluster.namespaces:
            where = ",".join(f"{node.name}:29400" for node in cluster.nodes)
        else:
            pytest.skip("several hosts with an address each need network namespaces")
        secret = {SECRET_VARIABLE: secrets.token_hex(32)}  # between hosts there must be one
        folders = {node.name: cluster.shared if storage == "shared" else node.folder for node in cluster.nodes}

        def boot(node: Node) -> None:
            launch = ["--nodes", "1:3", "--rendezvous", where, "--job-id", "lost"]
            script = arguments(folders[node.name], cache, *LENGTH, *memory_of(cluster, node))
            node.start(launch, ["tests/faults/faulty_train.py", *script], secret)

        for node in cluster.nodes:
            boot(node)
        cluster.wait_for(lambda: sum(len(node.workers()) for node in cluster.nodes) == 3, "three workers")
        cluster.wait_for_step(5)
        assert all(name_of(pid).startswith(WORKER_NAME) for node in cluster.nodes for pid in node.workers()), "the fork servers are fit"
        victim = cluster.nodes[0] if storage == "local" else cluster.first_node()
        at = cluster.steps()
        for node in cluster.nodes:
            node.slow_down(1.0)  # it is to be back before the end, on any machine
        assert victim.kill() >= 3, "launcher, agent and worker"
        seconds = cluster.wait_for_step(at + 2)
        assert not victim.is_up, "the others went on without it"
        boot(victim)
        cluster.wait_for(lambda: len(victim.workers()) == 1, "it has rejoined")
        for node in cluster.nodes:
            node.slow_down(0.0)
        cluster.wait_for(lambda: not any(node.is_up for node in cluster.nodes), "the end")
        assert [node.launcher.returncode for node in cluster.nodes if node.launcher] == [0, 0, 0], cluster.outputs()
        ends = [folder / "run" for folder in folders.values() if (folder / "run" / LAST).exists()]
        assert ends, cluster.outputs()
        assert {state_digest(end / LAST) for end in ends} == {state_digest(undisturbed / LAST)}
        report = account(ends[0])
        lost = [one["lost_steps"] for one in report["interruptions"]]
        assert lost and max(lost) <= MEMORY_INTERVAL
        if storage == "shared":
            assert ledger(ends[0]) == ledger(undisturbed), "no sample lost or doubled"
            assert scalar_steps(ends[0])["Loss/Train_Batch"] == list(range(1, EPOCHS * STEPS + 1))
        figure(f"node of rank 0 lost, {storage} storage: next new steps after {seconds:.1f} s, lost steps {lost}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_job_finishes_by_itself_with_the_same_result(
    seed: int, tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: the promise. Here with a run folder that all nodes see; test_nodes_with_disks_of_their_own.py has the other half."""
    figure(check_schedule(seed, "shared", tmp_path, cache))


FEW = (faults_of_nodes.stopped, faults_of_nodes.cut_off, faults_of_storage.stale, faults_of_storage.lock_held)


@pytest.mark.exhaustive
def test_what_only_a_cluster_suffers_leaves_no_trace(tmp_path: Path, cache: Path, figure: Callable[[str], None]) -> None:
    """Loss: as above, on a shared storage, whatever the schedules drew for them. These are the kinds of faults of which no quick test
    has one like them: those of single processes, notices, full disks, slow ranks and other configurations have tests of their own."""
    figure(check_schedule(0, "shared", tmp_path, cache, FEW))


def test_every_run_draws_every_kind_of_fault() -> None:
    """Loss: kinds of faults that are there to be read, and never strike."""
    defined = {
        name
        for module in (faults_of_nodes, faults_of_storage)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert len(defined) == NUM_KINDS
    for seed in range(20):
        drawn = [kind.name for storage in ("shared", "local") for kind in plan(seed, storage)]
        assert sorted(drawn) == sorted(defined)


def test_namespaces_are_used_where_root_allows_it() -> None:
    """Loss: partitions are never tested, and nobody notices."""
    if os.getuid() != 0:
        pytest.skip("needs root")
    assert has_namespaces()
