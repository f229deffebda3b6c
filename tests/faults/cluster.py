"""A cluster on one machine: nodes that can be killed, stopped, cut off and brought back, each running `gai-yolo launch`.

Where root allows it a node is a network namespace with a host name and a /dev/shm of its own on a bridge; elsewhere it is the set of
its processes, and cannot be cut off. All processes of a node carry its name in their environment, which is how they are found.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import REPOSITORY, environment

PATIENCE = 240.0
"""Seconds to wait for anything on a busy machine before a test fails."""
MARK = "GAI_YOLO_TEST_NODE"
SCRIPTS = (b"elastic_train.py", b"faulty_train.py")
"""What training processes run."""
STEP = re.compile(r"epoch (\d+)/\d+  step (\d+)/(\d+)")
NETWORK = "10.77.{cluster}.{host}"


def has_namespaces() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "gai-probe"], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "gai-probe"], capture_output=True, check=False)
    return made


@dataclass
class Node:
    """One machine.

    Args:
        name: of the host.
        address: on the cluster's network, or 127.0.0.1.
        folder: its local disk.
        namespace: of its network; None if it has none of its own.
    """

    name: str
    address: str
    folder: Path
    namespace: str | None
    launcher: subprocess.Popen[bytes] | None = None
    logs: list[Path] = field(default_factory=list)

    def start(self, arguments: Sequence[str], script: Sequence[str], extra: dict[str, str] | None = None) -> None:
        """Run `gai-yolo launch ARGUMENTS -- SCRIPT`, as whoever boots this machine does."""
        command = [sys.executable, "-m", "gai_yolo.cli", "launch", *arguments, "--", *script]
        if self.namespace is not None:
            inside = 'mount -t tmpfs -o size=1g tmpfs /dev/shm && hostname "$0" && exec "$@"'
            command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", inside, self.name, *command]
        log = self.folder / f"log_{len(self.logs)}.txt"
        self.logs.append(log)
        with log.open("wb") as output:
            self.launcher = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**environment(), "PYTHONUNBUFFERED": "1", MARK: self.mark, "GAI_YOLO_NODE_FAULTS": str(self.faults), **(extra or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def mark(self) -> str:
        """Tells its processes from all others."""
        return f"{self.folder}"

    @property
    def faults(self) -> Path:
        """The folder in which faults of its training processes are turned on; see faulty_train.py."""
        return self.folder / "faults"

    def slow_down(self, seconds: float) -> None:
        """Let each step of its training processes take so much longer; they must run faulty_train.py."""
        (self.faults / "slow_steps").write_text(f"{seconds}")

    @property
    def output(self) -> str:
        """Everything that was printed on this machine."""
        return "".join(log.read_text(errors="replace") for log in self.logs)

    @property
    def is_up(self) -> bool:
        """Whether its launcher runs."""
        return self.launcher is not None and self.launcher.poll() is None

    def pids(self) -> list[int]:
        """Of all its processes."""
        wanted = f"{MARK}={self.mark}\0".encode()
        return [pid for pid in _all_pids() if wanted in _read(pid, "environ") + b"\0"]

    def launcher_pid(self) -> int | None:
        """Of `gai-yolo launch`."""
        return next((pid for pid in self.pids() if b"gai_yolo.cli" in _read(pid, "cmdline")), None)

    def agents(self) -> list[int]:
        """Of torchrun's agent."""
        return [pid for pid in self.pids() if b"gai_yolo.launcher.agent" in _read(pid, "cmdline")]

    def workers(self) -> list[int]:
        """Of the training processes."""
        agents = self.agents()
        return [pid for pid in self.pids() if _parent(pid) in agents and _is_training(_read(pid, "cmdline"), _read(pid, "comm"))]

    def fork_servers(self) -> list[int]:
        """Of the processes whose forks become training processes."""
        return [pid for pid in self.pids() if _read(pid, "comm") == b"fork-server\n"]

    def kill(self) -> int:
        """Power off: everything on it is gone, its memory too; returns how many processes died."""
        count = 0
        while pids := self.pids():
            count += len(pids)
            for pid in pids:
                _send(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self.launcher is not None:
            self.launcher.wait()
        return count

    def signal_all(self, number: signal.Signals) -> int:
        """Signal every process of it; returns how many there were."""
        pids = self.pids()
        for pid in pids:
            _send(pid, number)
        return len(pids)

    def cut_off(self, down: bool) -> None:
        """Take its network cable out, or put it back."""
        assert self.namespace is not None
        _ip("-n", self.namespace, "link", "set", "eth0", "down" if down else "up")

    def set_address(self, there: bool) -> None:
        """Give it its address, as a network does that has come up, or take it away."""
        assert self.namespace is not None
        _ip("-n", self.namespace, "addr", "add" if there else "del", f"{self.address}/24", "dev", "eth0")

    def is_connected(self) -> bool:
        """Whether its network cable is in."""
        assert self.namespace is not None
        return "state UP" in _ip("-n", self.namespace, "link", "show", "eth0")


class Cluster:
    """Nodes on one network, with a folder that they share."""

    _made = itertools.count()

    def __init__(self, folder: Path, num_nodes: int) -> None:
        number = next(self._made)
        self.folder, self.namespaces = folder, has_namespaces()
        self.shared = folder / "shared"
        self.shared.mkdir(parents=True)
        self._prefix = f"gai{os.getpid() % 100000}-{number}"
        self._network = _claim_network() if self.namespaces else 0
        self._bridge = _bridge(self._network)
        self.nodes = [self._make(place) for place in range(num_nodes)]

    def _make(self, place: int) -> Node:
        name = f"node{place}"
        folder = self.folder / name
        (folder / "faults").mkdir(parents=True)
        namespace = f"{self._prefix}-{place}" if self.namespaces else None
        address = NETWORK.format(cluster=self._network, host=place + 1) if self.namespaces else "127.0.0.1"
        return Node(name, address, folder, namespace)

    @property
    def outside(self) -> str:
        """The address under which nodes reach this process."""
        return NETWORK.format(cluster=self._network, host=254) if self.namespaces else "127.0.0.1"

    def __enter__(self) -> Cluster:
        if self.namespaces:
            _ip("addr", "add", f"{self.outside}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for place, node in enumerate(self.nodes):
                self._connect(node, place)
        return self

    def _connect(self, node: Node, place: int) -> None:
        assert node.namespace is not None
        here = f"{self._bridge}v{place}"
        # As Debian does it: a machine's own name leads to itself alone.
        hosts = "127.0.0.1 localhost\n" + "".join(f"{'127.0.1.1' if one is node else one.address} {one.name}\n" for one in self.nodes)
        names = Path("/etc/netns") / node.namespace
        names.mkdir(parents=True)
        (names / "hosts").write_text(hosts)
        _ip("netns", "add", node.namespace)
        _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
        _ip("link", "set", here, "master", self._bridge, "up")
        _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", "eth0")
        _ip("-n", node.namespace, "link", "set", "eth0", "up")
        _ip("-n", node.namespace, "link", "set", "lo", "up")

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.signal_all(signal.SIGCONT)
            node.kill()
        if self.namespaces:
            for place, node in enumerate(self.nodes):
                assert node.namespace is not None
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip("link", "del", f"{self._bridge}v{place}")  # goes with its namespace, but later than the next cluster wants its name
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip("netns", "del", node.namespace)
                shutil.rmtree(Path("/etc/netns") / node.namespace, ignore_errors=True)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", self._bridge)

    def steps(self) -> int:
        """The highest step that any node has printed, from the run's beginning."""
        found = [STEP.findall(node.output) for node in self.nodes]
        return max(((int(e) - 1) * int(total) + int(step) for steps in found for e, step, total in steps), default=0)

    def wait_for(self, condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> float:
        """Wait until something is so; returns the seconds."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < patience, f"not within {patience:.0f} s: {what}\n{self.outputs()}"
            time.sleep(0.05)
        return time.monotonic() - started

    def wait_for_step(self, step: int) -> float:
        """Wait until a step was made, or all nodes have ended."""
        return self.wait_for(lambda: self.steps() >= step or not any(node.is_up for node in self.nodes), f"step {step}")

    def first_node(self) -> Node:
        """The node that holds rank 0."""
        return next(node for node in self.nodes for pid in node.workers() if _is_first(pid))

    def outputs(self, last: int = 6000) -> str:
        """The ends of what the nodes have printed."""
        return "\n".join(f"--- {node.name}, up: {node.is_up}\n{node.output[-last:]}" for node in self.nodes)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[int]:
    """A disk without a free byte; yields the bytes that it took. The folder must be a small file system of its own."""
    ballast = folder / "ballast"
    size = 0
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            size += file.write(b"\0" * (1 << 16))
    try:
        yield size
    finally:
        ballast.unlink()


def _bridge(network: int) -> str:
    return f"gai-net{network}"


def _claim_network() -> int:
    """A network that no other test has, of this process or of another: the kernel makes a bridge of one name only once."""
    for network in range(1, 255):
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "add", _bridge(network), "type", "bridge")
            return network
    raise RuntimeError("all networks are taken by bridges of tests that were killed: ip link del gai-net1 and so on")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_training(command_line: bytes, name: bytes) -> bool:
    # Forks have their server's command line, and in its first moment that one has no name of its own yet.
    is_fork = b"gai_yolo.launcher.fork_server" in command_line
    return any(script in command_line for script in SCRIPTS) and (not is_fork or name.startswith(b"rank-"))


def _is_first(pid: int) -> bool:
    return _read(pid, "comm") == b"rank-0\n" or b"\0RANK=0\0" in b"\0" + _read(pid, "environ") + b"\0"


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""  # it has just ended


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
