"""`gai-yolo launch` with real agents and workers; the workers train nothing, but meet at every step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gai_yolo.launcher.fork_server import WORKER_NAME
from gai_yolo.processes import children_of, name_of
from tests.harness import environment
from tests.harness import start as start_process

WORKER = """
import ctypes, json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # as the job does: end with the agent
agent, told, folder, name = os.getppid(), [], Path(), os.environ["NODE"]
signal.signal(signal.SIGTERM, lambda *_: told.append(1))

def log(text):
    with open(f"{name}.log", "a") as file:
        file.write(text + "\\n")

def end(code, reason):
    draft = Path(f"{os.environ['GAI_YOLO_OUTCOME']}.{os.getpid()}")
    draft.write_text(json.dumps({"code": code, "reason": reason}))
    draft.rename(os.environ["GAI_YOLO_OUTCOME"])
    log(f"end {code}")
    os._exit(code)

if "refuse" in sys.argv:
    log("start")
    os.kill(agent, signal.SIGTERM)
    end(2, "nothing to train on")
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
step = torch.tensor([int(Path("step").read_text()) if Path("step").exists() else 0])
dist.broadcast(step, 0)
log(f"start world={dist.get_world_size()} run={os.environ['TORCHELASTIC_RUN_ID']} step={step.item()}")
try:
    while True:
        enough = torch.tensor([Path("enough").exists()])
        dist.all_reduce(enough.int())
        step += 1
        if dist.get_rank() == 0:
            Path("step.new").write_text(str(step.item()))
            Path("step.new").rename("step")
        if told:
            end(75, "left after SIGTERM")
        dist.broadcast(enough, 0)
        if enough:
            break
        time.sleep(0.05)
except RuntimeError:
    end(76, "a peer was lost")
end(0, "done")
"""
PATIENCE = 90.0
"""Seconds for what takes 15 on an idle machine."""


class Node:
    """A launcher in the background, its agent and its workers."""

    def __init__(self, folder: Path, name: str, *options: str, script: tuple[str, ...] = ("worker.py",), plain: bool = False) -> None:
        self.folder, self.name = folder, name
        self._output = folder / f"{name}.out"
        with self._output.open("ab") as output:
            self.launcher = start_process(
                [sys.executable, "-m", "gai_yolo.cli", "launch", *options, "--", *script],
                {**environment(), "NODE": name, "TMPDIR": str(folder)},
                plain=plain,
                folder=folder,
                output=output,
            )

    @property
    def output(self) -> str:
        """Everything that was printed under this name."""
        return self._output.read_text()

    def log(self, word: str) -> list[str]:
        """Lines of the workers that begin with a word."""
        path = self.folder / f"{self.name}.log"
        return [line for line in path.read_text().splitlines() if line.startswith(word)] if path.exists() else []

    def agent(self) -> int:
        """Process id."""
        (agent,) = children_of(self.launcher.pid)
        return agent

    def workers(self) -> list[int]:
        """Process ids."""
        return sorted(pid for pid in children_of(self.agent()) if Path(f"/proc/{pid}/comm").read_text() != "fork-server\n")

    def family(self) -> list[int]:
        """All process ids, children before their parents."""
        family = [self.launcher.pid]
        for pid in family:
            family += children_of(pid)
        return family[::-1]

    def kill(self) -> None:
        """As when the machine is gone."""
        for pid in (family := self.family()):
            os.kill(pid, signal.SIGSTOP)  # none sees the others die
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def wait(self) -> int:
        """Exit code."""
        try:
            return self.launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there:\n{self.output}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{self.name}: {what} did not come:\n{self.output}"
            time.sleep(0.1)

    def until_started(self, times: int, *words: str) -> None:
        """Wait until workers have logged a start for so many times in all, the last one with these words."""
        self.until(lambda: len(self.log("start")) >= times and all(word in self.log("start")[-1] for word in words), f"start {times}")


StartNode = Callable[..., Node]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes that share a folder, and leaves none behind."""
    (tmp_path / "worker.py").write_text(WORKER)
    nodes: list[Node] = []

    def start(name: str, *options: str, **more: Any) -> Node:
        nodes.append(Node(tmp_path, name, *options, **more))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.launcher.poll() is None:
            node.kill()


def steps(folder: Path) -> int:
    """How far the job is."""
    path = folder / "step"
    return int(path.read_text()) if path.exists() else 0


def goes_on(node: Node) -> None:
    """Wait until a new step was made."""
    before = steps(node.folder)
    node.until(lambda: steps(node.folder) > before + 1, "a step")


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.timeout(300)
def test_killed_worker_and_killed_agent_are_started_again_in_the_same_run(start: StartNode, tmp_path: Path) -> None:
    """A job that waits for a person after the kernel has killed one of its processes, or that takes a restart for a new `--fresh`."""
    node = start("a", "--processes-per-node", "2", plain=True)
    node.until_started(2)
    goes_on(node)
    assert os.getsid(node.agent()) == node.agent(), "a terminal's Ctrl-C reaches it through the launcher alone"
    assert all(name_of(pid).startswith(WORKER_NAME) for pid in node.workers()), "forks, as the fork server found itself fit"
    os.kill(node.workers()[1], signal.SIGKILL)
    node.until_started(4)
    goes_on(node)
    orphans = node.workers()
    os.kill(node.agent(), signal.SIGKILL)
    node.until_started(6)
    goes_on(node)
    assert not any(is_alive(pid) for pid in orphans)
    (tmp_path / "enough").touch()
    assert node.wait() == 0
    assert "torchrun was killed by SIGKILL; starting again in 1 s" in node.output
    assert "Traceback" not in node.output
    (run,) = {line.partition("run=")[2].split()[0] for line in node.log("start")}
    assert run.startswith("gai-yolo-")


@pytest.mark.timeout(200)
def test_refusal_ends_with_its_code_and_reason_after_one_start(start: StartNode) -> None:
    """A hundred restarts of a job whose configuration a person has to mend."""
    node = start("a", script=("worker.py", "refuse"))
    assert node.wait() == 2
    assert len(node.log("start")) == 1
    assert "launch: nothing to train on\n" in node.output
    assert "Traceback" not in node.output


@pytest.mark.timeout(200)
def test_script_that_cannot_run_ends_with_a_clear_line(start: StartNode, tmp_path: Path) -> None:
    """A night of restarts of a script with a typo."""
    (tmp_path / "broken.py").write_text("def f(:\n")
    node = start("a", script=("broken.py",))
    assert node.wait() == 1
    tracebacks = node.output.count("SyntaxError")
    assert tracebacks % 3 == 0 and 6 <= tracebacks <= 24, "three times, then the launcher waits"
    assert "launch: the script ends as soon as it is started; starting again in 1 s\n" in node.output
    assert node.output.endswith("times in a row within 30 s of its start; its messages are above\n")


@pytest.mark.timeout(200)
def test_nothing_lives_on_when_the_launcher_is_killed(start: StartNode) -> None:
    """Orphans that train on, hold the GPU and the run's lock, and answer to nobody."""
    node = start("a", "--processes-per-node", "2")
    node.until_started(2)
    goes_on(node)
    family = node.family()
    assert len(family) == 5  # launcher, agent, its fork server, two workers
    node.launcher.kill()
    node.until(lambda: not any(is_alive(pid) for pid in family), "the end of all")


@pytest.mark.timeout(200)
def test_sigterm_reaches_the_workers_and_their_departure_is_the_exit_code(start: StartNode) -> None:
    """A preempted machine whose state was not saved, or whose scheduler takes it for a failure."""
    node = start("a")
    node.until_started(1)
    goes_on(node)
    family = node.family()
    node.launcher.terminate()
    assert node.wait() == 75
    assert node.log("end") == ["end 75"]
    assert not any(is_alive(pid) for pid in family)
    assert "launch: left after SIGTERM\n" in node.output


@pytest.mark.timeout(400)
def test_node_is_lost_and_comes_back_with_a_shared_file(start: StartNode, tmp_path: Path) -> None:
    """A job that ends with any one of its machines, or does not take it back; and a file that serves for one job only."""
    options = ("--nodes", "1:2", "--rendezvous", "rdzv", "--host-name", "127.0.0.1")
    first, second = start("a", *options), start("b", *options)
    first.until_started(1, "world=2")
    goes_on(first)
    second.kill()
    first.until_started(2, "world=1")
    goes_on(first)
    second = start("b", *options)
    first.until_started(3, "world=2")
    goes_on(first)
    (tmp_path / "enough").touch()
    assert (first.wait(), second.wait()) == (0, 0)
    runs = {line.partition("run=")[2] for node in (first, second) for line in node.log("start")}
    assert len({run.split()[0] for run in runs}) == 1
    later = start("c", *options)
    assert later.wait() == 0
    assert later.log("start")[0].split()[2] not in {line.split()[2] for line in first.log("start")}


@pytest.mark.timeout(400)
def test_job_survives_the_loss_of_its_rendezvous_host_which_comes_back(start: StartNode, tmp_path: Path) -> None:
    """Without shared storage: the one machine whose loss ends the job; and a second job that it begins when it is back."""
    where = f"127.0.0.1:{free_port()},127.0.0.2:{free_port()}"
    options = ("--nodes", "1:2", "--rendezvous", where, "--job-id", "tcp")
    first = start("a", *options, "--host-name", "127.0.0.1")
    second = start("b", *options, "--host-name", "127.0.0.2")
    second.until_started(1, "world=2")
    goes_on(second)
    first.kill()
    second.until_started(2, "world=1")
    goes_on(second)
    first = start("a", *options, "--host-name", "127.0.0.1")
    second.until_started(3, "world=2")
    goes_on(second)
    (tmp_path / "enough").touch()
    assert (first.wait(), second.wait()) == (0, 0)
    assert {line.split()[2] for node in (first, second) for line in node.log("start")} == {"run=tcp-1"}
    assert first.output.count("rendezvous at 127.0.0.1") == 1
    assert first.output.count("rendezvous at 127.0.0.2") == 1
