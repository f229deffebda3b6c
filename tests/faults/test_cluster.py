"""Whole nodes come and go under the real job, launched as users launch it; nothing of it is to be seen in the result."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gai_yolo.launching.secret import SECRET_VARIABLE
from tests.faults.cluster import Cluster, Node, filled, has_namespaces
from tests.faults.metadata_servers import AwsServer
from tests.harness import run, small
from tests.runs import ledger, scalar_steps, state_digest

pytestmark = pytest.mark.timeout(1500)
STEPS = 25
EPOCHS = 2
MEMORY_INTERVAL = 3
SETTINGS = (
    f"training.max_batches_per_epoch={STEPS}",
    "training.batch_size=12",
    "training.micro_batch_size=3",
    "data.workers=1",
    f"elastic.memory_interval_steps={MEMORY_INTERVAL}",
    "elastic.step_timeout_seconds=6",
    "elastic.check_interval=10",
    "snapshots.interval_seconds=5",
    "reporting.ledger=true",
)
SEEDS = range(int(os.environ.get("GAI_YOLO_SCHEDULES", "1")))
"""Schedules that are tried; ten are for whoever changes something here."""
FAULTS = int(os.environ.get("GAI_YOLO_FAULTS", "5"))
"""Faults in each; as many kinds as there are, for the same."""
LAST = f"checkpoints/epoch_{EPOCHS:03d}.pt"


def script(folder: Path, cache: Path, *more: str) -> list[str]:
    """What the nodes run."""
    return ["elastic_train.py", "--config", "configs/config_test_resume.yaml", *small(folder, cache, *SETTINGS, *more)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folder of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(*_split(script(folder, cache)))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def _split(command: list[str]) -> tuple[str, list[str]]:
    return command[0], command[1:]


def account(run_folder: Path) -> dict[str, object]:
    """Of where the time went."""
    found: dict[str, object] = json.loads((run_folder / "goodput.json").read_text())
    return found


@pytest.mark.parametrize("storage", ["shared", "local"])
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
            arguments = ["--nodes", "1:3", "--rendezvous", where, "--job-id", "lost"]
            node.start(arguments, script(folders[node.name], cache, *memory_of(cluster, node)), secret)

        for node in cluster.nodes:
            boot(node)
        cluster.wait_for(lambda: sum(len(node.workers()) for node in cluster.nodes) == 3, "three workers")
        cluster.wait_for_step(5)
        victim = cluster.nodes[0] if storage == "local" else cluster.first_node()
        at = cluster.steps()
        assert victim.kill() >= 3, "launcher, agent and worker"
        seconds = cluster.wait_for_step(at + 2)
        assert not victim.is_up, "the others went on without it"
        boot(victim)
        cluster.wait_for(lambda: len(victim.workers()) == 1, "it has rejoined")
        cluster.wait_for(lambda: not any(node.is_up for node in cluster.nodes), "the end")
        assert [node.launcher.returncode for node in cluster.nodes if node.launcher] == [0, 0, 0], cluster.outputs()
        ends = [folder / "run" for folder in folders.values() if (folder / "run" / LAST).exists()]
        assert ends, cluster.outputs()
        assert {state_digest(end / LAST) for end in ends} == {state_digest(undisturbed / LAST)}
        report = account(ends[0])
        lost = [one["lost_steps"] for one in report["interruptions"]]  # type: ignore[attr-defined]
        assert lost and max(lost) <= MEMORY_INTERVAL
        if storage == "shared":
            assert ledger(ends[0]) == ledger(undisturbed), "no sample lost or doubled"
            assert scalar_steps(ends[0])["Loss/Train_Batch"] == list(range(1, EPOCHS * STEPS + 1))
        figure(f"node of rank 0 lost, {storage} storage: next new steps after {seconds:.1f} s, lost steps {lost}")


def memory_of(cluster: Cluster, node: Node) -> tuple[str, ...]:
    """Nodes that are only sets of processes share a /dev/shm, and must not share their memory."""
    if cluster.namespaces:
        return ("elastic.memory_folder=/dev/shm",)
    (node.folder / "memory").mkdir(exist_ok=True)
    return (f"elastic.memory_folder={node.folder / 'memory'}",)


class Trouble:
    """Faults in a running cluster. Each returns how it was seen to have fired."""

    def __init__(self, cluster: Cluster, boot: Callable[[Node], None], rng: random.Random, clouds: dict[str, AwsServer]) -> None:
        self.cluster, self.boot, self.rng, self.clouds = cluster, boot, rng, clouds

    def kinds(self) -> list[Callable[[], str]]:
        """What this machine can do."""
        always = [self.worker, self.agent, self.node, self.first_node, self.launcher, self.stopped, self.told, self.grows, self.noticed]
        return [*always, self.cut_off, self.full_disk] if self.cluster.namespaces else always

    def one(self) -> Node:
        """A node that has a worker."""
        return self.rng.choice([node for node in self.cluster.nodes if node.workers()])

    def worker(self) -> str:
        """The training process of a node dies."""
        node = self.one()
        pid = node.workers()[0]
        os.kill(pid, signal.SIGKILL)
        self.cluster.wait_for(lambda: pid not in node.pids(), "the worker is dead")
        return f"worker {pid} of {node.name} killed"

    def agent(self) -> str:
        """torchrun's agent dies alone, and its worker must not train on as an orphan."""
        node = self.one()
        agent, workers = node.agents()[0], node.workers()
        os.kill(agent, signal.SIGKILL)
        self.cluster.wait_for(lambda: not {agent, *workers} & set(node.pids()), "agent and orphans are gone", 30.0)
        return f"agent of {node.name} killed, its worker left"

    def launcher(self) -> str:
        """`gai-yolo launch` dies alone, and nothing must be left of it."""
        node = self.one()
        pid = node.launcher_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.cluster.wait_for(lambda: not node.pids(), "nothing is left on the node", 60.0)
        self.boot(node)
        return f"launcher of {node.name} killed"

    def node(self, which: Node | None = None) -> str:
        """Power off, and on again after some seconds."""
        node = which or self.one()
        count = node.kill()
        assert count >= 3 and not node.pids()
        time.sleep(self.rng.uniform(0, 4))
        self.boot(node)
        return f"{count} processes of {node.name} killed"

    def first_node(self) -> str:
        """The same with the node that writes the checkpoints."""
        return self.node(self.cluster.first_node())

    def stopped(self) -> str:
        """A machine that hangs and comes back, and may still believe that it is rank 0."""
        node = self.one()
        count = node.signal_all(signal.SIGSTOP)
        before = self.cluster.steps()
        time.sleep(self.rng.uniform(1, 12))
        node.signal_all(signal.SIGCONT)
        return f"{count} processes of {node.name} stopped at step {before}"

    def cut_off(self) -> str:
        """A network cable."""
        node = self.one()
        node.cut_off(True)
        assert not node.is_connected()
        time.sleep(self.rng.uniform(2, 14))
        node.cut_off(False)
        return f"{node.name} cut off"

    def told(self) -> str:
        """SIGTERM, as Kubernetes and Slurm say it; another machine comes in its place."""
        node = self.one()
        assert node.launcher is not None
        pid = node.launcher_pid()
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        self.cluster.wait_for(lambda: not node.pids(), "it has left", 20.0)
        assert node.launcher.wait() in (75, 0), self.cluster.outputs()
        self.boot(node)
        return f"{node.name} left with code {node.launcher.returncode}"

    def noticed(self) -> str:
        """The cloud says that the machine goes, and means it; or takes it back, or lies."""
        node, kind = self.one(), self.rng.choice(["comes", "withdrawn", "lies"])
        cloud = self.clouds[node.name]
        if kind == "lies":
            cloud.lie = "nonsense"
            self.cluster.wait_for(lambda: bool(cloud.lied), "the lie was told", 30.0)
            cloud.lie = None
            return f"{node.name} was lied to"
        cloud.give()
        self.cluster.wait_for(cloud.served.is_set, "the notice was read", 30.0)
        if kind == "withdrawn":
            cloud.withdraw()
            cloud.served.clear()
            return f"{node.name} had a notice that was withdrawn"
        self.cluster.wait_for(lambda: not node.pids(), "it has left", 30.0)
        assert node.launcher is not None and node.launcher.wait() in (75, 0), self.cluster.outputs()
        cloud.withdraw()
        cloud.served.clear()
        self.boot(node)
        return f"{node.name} had notice, and left"

    def grows(self) -> str:
        """A node that was not there joins."""
        absent = [node for node in self.cluster.nodes if not node.is_up]
        if not absent:
            node = self.one()
            node.kill()
            self.cluster.wait_for_step(self.cluster.steps() + 1)
            absent = [node]
        self.boot(absent[0])
        self.cluster.wait_for(lambda: bool(absent[0].workers()) or not absent[0].is_up, "it has joined")
        return f"{absent[0].name} joined"

    def full_disk(self) -> str:
        """The shared disk is full for a while."""
        with filled(self.cluster.shared) as size:
            assert size > 0
            time.sleep(self.rng.uniform(2, 6))
        return f"disk full of {size} bytes"


@contextlib.contextmanager
def small_disk(cluster: Cluster) -> Iterator[None]:
    """The shared folder as a file system of its own, so that it can be filled."""
    if not cluster.namespaces:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(cluster.shared)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(cluster.shared)], check=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_job_finishes_by_itself_with_the_same_result(
    seed: int, tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: the promise."""
    rng = random.Random(seed)
    steps = 8 * FAULTS // 2 * 2
    length = (f"training.max_batches_per_epoch={steps // 2}",)
    with Cluster(tmp_path, 3) as cluster, small_disk(cluster), contextlib.ExitStack() as stack:
        clouds = {node.name: stack.enter_context(AwsServer(cluster.outside)) for node in cluster.nodes}

        def boot(node: Node) -> None:
            cloud = ("elastic.notices=aws", f"elastic.notices_endpoint={clouds[node.name].url}")
            arguments = ["--nodes", "1:3", "--rendezvous", str(cluster.shared / "rendezvous"), "--job-id", f"s{seed}"]
            node.start(arguments, script(cluster.shared, cache, *length, *cloud, *memory_of(cluster, node)))

        for node in cluster.nodes[: rng.choice([2, 3])]:
            boot(node)
        trouble = Trouble(cluster, boot, rng, clouds)
        kinds = trouble.kinds()
        plan = rng.sample(kinds, min(FAULTS, len(kinds))) + [rng.choice(kinds) for _ in range(FAULTS - len(kinds))]
        fired: list[str] = []
        for number, fault in enumerate(plan):
            # Between two faults at least one new step: otherwise it would be one fault.
            cluster.wait_for_step(cluster.steps() + 1 + rng.randrange(4))
            assert cluster.steps() < steps, f"the run is over before fault {number}: {fired}"
            cluster.wait_for(lambda: any(node.workers() for node in cluster.nodes), "a worker")
            fired.append(f"step {cluster.steps()}: {fault()}")
        for node in cluster.nodes:
            if not node.is_up and node.launcher is None:
                boot(node)
        cluster.wait_for(lambda: not any(node.is_up for node in cluster.nodes), "the end", 600.0)
        folder = cluster.shared / "run"
        assert (folder / LAST).exists(), cluster.outputs()
        alone = run(*_split(script(tmp_path / "alone", cache, *length)))
        assert alone.returncode == 0, alone.stdout + alone.stderr
        assert state_digest(folder / LAST) == state_digest(tmp_path / "alone" / "run" / LAST), "\n".join(fired)
        shown, expected = scalar_steps(folder)["Loss/Train_Batch"], list(range(1, steps + 1))
        assert shown == sorted(set(shown)) and set(shown) <= set(expected)
        if not any(fault.__name__ == "full_disk" for fault in plan):
            # TensorBoard and the ledger have nowhere to keep what a full disk does not take.
            assert ledger(folder) == ledger(tmp_path / "alone" / "run"), "no sample lost or doubled"
            # The moments before a kill, which a survivor's state knows and the killed process's writer thread had not yet written.
            assert len(expected) - len(shown) <= len(fired), set(expected) - set(shown)
        report = account(folder)
        figure(f"schedule {seed}: {fired}; goodput {report['goodput']}")


def test_namespaces_are_used_where_root_allows_it() -> None:
    """Loss: partitions are never tested, and nobody notices."""
    if os.getuid() != 0:
        pytest.skip("needs root")
    assert has_namespaces()
