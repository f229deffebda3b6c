"""Strangers on the network of a running job, and in its rendezvous file: what listens, and what becomes of what they send."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import signal
import socket
import struct
import sys
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import Cluster, Node, has_namespaces
from tests.harness import run, small
from tests.runs import state_digest

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_namespaces(), reason="several hosts with an address each need network namespaces"),
]
PORT, JOB = 29400, "strangers"
STEPS = 10
SETTINGS = (f"training.max_batches_per_epoch={STEPS}", "training.epochs=1", "training.batch_size=8", "elastic.step_timeout_seconds=20")
LAST = "checkpoints/epoch_001.pt"
FIRST_SLOT, SLOT_BYTES = 4096, 4 << 20
FLOOD = 300


class Exploit:
    """Makes a folder, in whoever unpickles it."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (str(self._marker),)


def exploit(marker: Path) -> dict[str, str]:
    """What ran code on f7abd05: torchrun's state, as its own backend keeps it."""
    return {f"torch.rendezvous.{JOB}-1": b64encode(pickle.dumps(Exploit(marker))).decode()}


def script(folder: Path, cache: Path, *more: str) -> list[str]:
    """What the nodes run."""
    return ["elastic_train.py", "--config", "configs/config_test_resume.yaml", *small(folder, cache, *SETTINGS, *more)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> str:
    """Digest of the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    name, *arguments = script(folder, cache)
    done = run(name, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return state_digest(folder / "run" / LAST)


@contextlib.contextmanager
def job(folder: Path, where: Callable[[Cluster], str], cache: Path) -> Iterator[Cluster]:
    """Two nodes that train."""
    secret = {"GAI_YOLO_SECRET": secrets.token_hex(32)}
    with Cluster(folder, 2) as cluster:
        for node in cluster.nodes:
            arguments = ["--nodes", "2", "--rendezvous", where(cluster), "--job-id", JOB]
            node.start(arguments, script(cluster.shared, cache, "elastic.memory_folder=/dev/shm"), secret)
        cluster.wait_for_step(2)
        assert all(node.workers() for node in cluster.nodes), cluster.outputs()
        yield cluster


@contextlib.contextmanager
def held(workers: Sequence[int]) -> Iterator[None]:
    """The job's end waits for what is done meanwhile; launchers and agents go on."""
    for number in workers:
        os.kill(number, signal.SIGSTOP)
    try:
        yield
    finally:
        for number in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGCONT)


def until_the_end(cluster: Cluster, workers: Sequence[int], undisturbed: str, marker: Path) -> None:
    """The job has gone on as if nobody had been there."""
    assert workers == [pid for node in cluster.nodes for pid in node.workers()], "nobody was started again"
    cluster.wait_for(lambda: not any(node.is_up for node in cluster.nodes), "the end")
    assert not marker.exists(), "a stranger's code has run"
    assert [node.launcher.wait() for node in cluster.nodes if node.launcher] == [0, 0], cluster.outputs()
    assert state_digest(cluster.shared / "run" / LAST) == undisturbed


# ------------------------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Listener:
    """A port that is open on a node."""

    node: str
    address: str
    port: int
    process: str

    @property
    def whose(self) -> str:
        return "ours" if self.process == "launcher" else "torch's"


def listeners(node: Node) -> list[Listener]:
    """All that listens on a node, as the kernel says."""
    holders: dict[str, int] = {}
    for pid in node.pids():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    holders.setdefault(str(link.readlink()), pid)
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{node.launcher_pid()}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                address, port = local.split(":")
                holder = holders.get(f"socket:[{inode}]", 0)
                found.add(Listener(node.name, _readable(family, address), int(port, 16), _role(node, holder)))
    return sorted(found, key=lambda one: (one.whose != "ours", one.process, one.address, one.port))


def listeners_of_ours(node: Node) -> set[str]:
    """The addresses on which a node's launcher listens."""
    return {one.address for one in listeners(node) if one.whose == "ours"} if node.launcher_pid() is not None else set()


def _readable(family: int, digits: str) -> str:
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]  # each in the byte order of this machine
    return socket.inet_ntop(family, b"".join(word.to_bytes(4, sys.byteorder) for word in words))


def _role(node: Node, pid: int) -> str:
    if pid == node.launcher_pid():
        return "launcher"
    roles = {"agent": node.agents(), "worker": node.workers(), "fork server": node.fork_servers()}
    return next((role for role, pids in roles.items() if pid in pids), f"process {pid}")


def send(node: Node, data: bytes) -> None:
    """Send as much as is taken, and wait until the other end hangs up."""
    with socket.create_connection((node.address, PORT), 5.0) as stranger, contextlib.suppress(ConnectionError):
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(4096):
            pass


def test_strangers_bytes_on_each_port_of_ours_change_nothing(
    undisturbed: str, tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: who reaches the port owns every node."""
    marker = tmp_path / "marker"
    with job(tmp_path, lambda cluster: ",".join(f"{node.name}:{PORT}" for node in cluster.nodes), cache) as cluster:
        workers = [pid for node in cluster.nodes for pid in node.workers()]
        found = [one for node in cluster.nodes for one in listeners(node)]
        for one in found:
            figure(f"listens: {one.node} {one.address}:{one.port}  {one.process}, {one.whose}")
        ours = {(one.node, one.address, one.port) for one in found if one.whose == "ours"}
        assert ours == {(node.name, address, PORT) for node in cluster.nodes for address in (node.address, "127.0.1.1")}
        assert {one.process for one in found} == {"launcher", "worker"}, "all else is torch's, in the workers"
        request = json.dumps({"do": "write", "notes": exploit(marker)}).encode() + b"\n"
        junk = (os.urandom(1 << 16), b"GET / HTTP/1.0\r\n\r\n", b"A" * (16 << 20), request, b"\x80\x04" + pickle.dumps(Exploit(marker)))
        with contextlib.ExitStack() as hanging, held(workers):
            for node in cluster.nodes:
                for data in junk:
                    send(node, data)
                slow = [hanging.enter_context(socket.create_connection((node.address, PORT), 5.0)) for _ in range(FLOOD)]
                for _ in range(4):  # a byte at a time, by all that are still connected; agents look every second
                    for stranger in slow:
                        with contextlib.suppress(ConnectionError):
                            stranger.send(b"0")
                    time.sleep(0.5)
        until_the_end(cluster, workers, undisturbed, marker)


def test_first_node_that_is_up_before_its_network_is_found(tmp_path: Path, cache: Path) -> None:
    """Loss: a job started at boot waits for ever for a node that listens to itself alone."""
    with Cluster(tmp_path, 2) as cluster:
        first, second = cluster.nodes
        first.set_address(False)
        for node in cluster.nodes:
            arguments = ["--nodes", "2", "--rendezvous", f"{first.name}:{PORT}", "--job-id", JOB]
            node.start(arguments, script(cluster.shared, cache), {"GAI_YOLO_SECRET": "s" * 32})
        cluster.wait_for(lambda: "launch: rendezvous at" in first.output, "the first node's own rendezvous", 60.0)
        assert listeners_of_ours(first) == {"127.0.1.1"}
        first.set_address(True)
        cluster.wait_for(lambda: "launch: rendezvous at" in second.output, "the second node's finding the first", 60.0)
        assert listeners_of_ours(first) == {"127.0.1.1", first.address}, "and not on all addresses"
        assert first.output.count("launch: rendezvous at") == 1, "who was connected stays so"


# ---------------------------------------------------------------------------------------------------------------------- the file


def forge(path: Path, marker: Path, over_the_newest: bool) -> None:
    """Write the exploit into a rendezvous file, in its own form, as its newest change; without the secret."""
    data = json.dumps(exploit(marker)).encode()
    with path.open("r+b") as file:
        is_old = file.read(17) == b"gai-yolo board 1\n"
        numbers = []
        for slot in range(2):
            file.seek(FIRST_SLOT + slot * SLOT_BYTES)
            numbers.append(struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0])
        number = max(numbers) + (2 if over_the_newest else 1)
        if is_old:
            head = struct.pack("<QII", number, len(data), zlib.crc32(data, number & 0xFFFFFFFF))
        else:
            head = struct.pack("<QI32s", number, len(data), os.urandom(32))
        file.seek(FIRST_SLOT + (number % 2) * SLOT_BYTES)
        file.write(head + data)


def test_strangers_bytes_in_the_rendezvous_file_change_nothing(undisturbed: str, tmp_path: Path, cache: Path) -> None:
    """Loss: who can write one file owns every node."""
    marker = tmp_path / "marker"
    with job(tmp_path, lambda cluster: str(cluster.shared / "rendezvous"), cache) as cluster:
        workers = [pid for node in cluster.nodes for pid in node.workers()]
        assert not any(one.whose == "ours" for node in cluster.nodes for one in listeners(node)), "with a file nothing of ours listens"
        with held(workers):
            for over_the_newest in (False, True):
                forge(cluster.shared / "rendezvous", marker, over_the_newest)
                time.sleep(2.5)  # agents look every second
        until_the_end(cluster, workers, undisturbed, marker)


def test_exploit_is_one(tmp_path: Path) -> None:
    """Loss: attacks that could not have done harm."""
    pickle.loads(pickle.dumps(Exploit(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()
