"""The writer process, as the training process sees it: how it is started, what is handed to it, what it answers."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.checkpointing.writer_process import Answer, BestRenewed, Request, receive, send
from gai_yolo.store.lease import Fence
from gai_yolo.store.manifest import FOLDERS, Manifest
from gai_yolo.store.retention import Policy

KILLED_WITHIN = 1.0
"""Seconds; a process that waits for a dead disk does not end when it is killed."""
START = """
import signal
# Before the seconds that importing torch takes: Ctrl-C, a launcher's SIGTERM, a scheduler's SIGUSR1 and a terminal's SIGHUP reach the
# whole process group, and the training process says when to stop.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
from gai_yolo.checkpointing.writer_process import main
main()
"""


@dataclass
class Job:
    """One checkpoint on its way to the disk."""

    manifest: Manifest
    buffer: StateBuffer
    stall: float
    """Seconds that its capture took."""

    @property
    def name(self) -> str:
        """As people see it."""
        return f"{FOLDERS[self.manifest.kind]}/{self.manifest.stem}.pt"


class WriterProcess:
    """The other process and the line to it.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, run: Path, fence: Fence, policy: Policy) -> None:
        own, other = socket.socketpair()
        # Modules are found as here, however this process was started, and not (-P) in the current folder; never touches a GPU.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        environment.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START], stdin=other.fileno(), stdout=subprocess.DEVNULL, env=environment
            )
        self._connection = own
        send(own, (run.absolute(), fence, policy))

    def send(self, job: Job) -> None:
        """Hand over a checkpoint. Raises `OSError` if the process has died."""
        send(self._connection, Request(job.manifest, job.buffer.content), (job.buffer.descriptor,))

    def answer(self, timeout: float) -> Answer | BestRenewed | None:
        """What became of it, or of `best.pt`, waiting at most so many seconds. Raises `OSError` or `EOFError` if the process has died."""
        readable, _, _ = select.select([self._connection], [], [], timeout)
        if not readable:
            return None
        answer: Answer | BestRenewed = receive(self._connection)[0]
        return answer

    @property
    def progress(self) -> int:
        """A number that changes while it works: bytes that it has read and written, and its processor time. The same for ever where the
        system does not tell; Linux does."""
        folder = Path("/proc") / str(self._process.pid)
        try:
            counters = [int(line.split()[1]) for line in (folder / "io").read_text().splitlines()]
            ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        except (OSError, ValueError, LookupError):
            return 0
        return sum(counters) + sum(map(int, ticks))

    def kill(self) -> bool:
        """End it; returns whether it has ended."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_WITHIN)
            return True
        return False

    def close(self, patience: float) -> None:
        """Let it end by itself, which it does when it has nothing to do; after the seconds of `patience` without us."""
        # Not only closed: loader processes forked since hold copies of the descriptor.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            # A stopped process, or one that hangs in the disk. Should it ever go on, it finds what it has to finish or the
            # fence of a successor, and ends.
            return
