"""The process that writes checkpoints: serialises, hashes, syncs, publishes and prunes, at low priority; and the training process's handle
of it.

It serves one request after the other and ends when the training process has gone; what it has been handed by then it still
finishes, unless another start has raised the fence. `best.pt` is for when there is nothing else to write: a checkpoint that comes
meanwhile goes first. It does nothing else on its own: when to try again is for the training process to say.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from gai_yolo.checkpointing.capture import Content, StateBuffer, open_state
from gai_yolo.checkpointing.writer_start import SpareWriter, Started, start_writer
from gai_yolo.errors import Refusal, RunFolderBusy
from gai_yolo.store.best import BestCopy
from gai_yolo.store.filesystem import REAL
from gai_yolo.store.lease import Fence
from gai_yolo.store.manifest import FOLDERS, Manifest
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store

KILLED_WITHIN = 1.0
"""Seconds; a process that waits for a dead disk does not end when it is killed."""


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """For people: what stood in the way."""
    failure: str | None = None
    """Why it could not be written; trying again is right."""
    taken_over: str | None = None
    """Another job has taken the run over; nothing can be written any more."""
    best_follows: bool = False
    """`best.pt` is not renewed yet; a `BestRenewed` comes when it is, or cannot be."""


@dataclass(frozen=True)
class BestRenewed:
    """`best.pt` is what it should be, or could not be renewed: it comes up again with the next epoch."""

    notes: list[str] = field(default_factory=list)
    taken_over: str | None = None


class Postponed(Exception):
    """There is a checkpoint to write, which goes first."""


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
    """The other process and the line to it. Raises `OSError` if it cannot be started.

    Args:
        spare: whose fork it is to be, if that is still there.
    """

    def __init__(self, run: Path, fence: Fence, policy: Policy, spare: SpareWriter | None = None) -> None:
        self._run, begin = run, (run.absolute(), fence, policy)
        if (forked := spare.take() if spare is not None else None) is not None:
            try:
                self._open(forked, begin)
                return
            except OSError:  # somebody has killed it, or there was no descriptor for it
                self._socket.close()
                self.kill()
        self._open(start_writer(), begin)

    def _open(self, started: Started, begin: object) -> None:
        self._process, self._socket = started
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._connection.send(begin)

    def send(self, job: Job) -> None:
        """Hand over a checkpoint: a byte with the state's descriptor, and what it is. Both are so small that sending them never waits, even
        for a writer that was stopped (the standard library's `send_handle` may, for an acknowledgement). Raises `OSError` if the process
        has died."""
        socket.send_fds(self._socket, [b"."], [job.buffer.descriptor])
        self._connection.send((job.manifest, job.buffer.content))

    def answer(self, timeout: float) -> Answer | BestRenewed | None:
        """What became of it, or of `best.pt`, waiting at most so many seconds. Raises `OSError` or `EOFError` if the process has died."""
        answer: Answer | BestRenewed | None = self._connection.recv() if self._connection.poll(timeout) else None
        return answer

    def free_bytes(self) -> int:
        """Room on the disk. Raises `OSError`."""
        return REAL.free_bytes(self._run)

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

    def kill(self) -> None:
        """End it, if it can be."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_WITHIN)

    def close(self, patience: float) -> None:
        """Let it end by itself, which it does when it has nothing to do; after the seconds of `patience` without us."""
        # Not only closed: loader processes forked since hold copies of the descriptor.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._connection.close()
        # Not in time: a stopped process, or one that hangs in the disk. Should it ever go on, it finds what it has to finish or the
        # fence of a successor, and ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)


def main() -> None:
    """Serve the socket that standard input is, until it is closed."""
    os.nice(19)
    torch.set_num_threads(1)
    line, connection = socket.socket(fileno=0), Connection(os.dup(0))
    try:
        run, fence, policy = connection.recv()
    except (EOFError, OSError):
        return  # a spare one that nobody has needed
    store = Store(run, fence)
    best, best_is_due = BestCopy(store, policy.best_since), True  # a start that was killed may have left it undone
    while True:
        renewed = renew(best, connection.poll) if best_is_due else None
        try:
            if renewed is not None:
                best_is_due = False
                connection.send(renewed)
            _, descriptors, _, _ = socket.recv_fds(line, 1, 1)
            manifest, content = connection.recv()
        except (EOFError, OSError):
            return  # it has gone; with an answer of ours unread, the connection breaks
        answer = serve(store, policy, manifest, content, descriptors[0])
        best_is_due = best_is_due or (answer.failure is None and manifest.metric is not None)
        try:
            connection.send(replace(answer, best_follows=best_is_due))
        except OSError:
            return


def serve(store: Store, policy: Policy, manifest: Manifest, content: Content, descriptor: int) -> Answer:
    """Write one checkpoint, and make room by retention's rules."""
    started, cpu_started = time.monotonic(), time.process_time()
    notes: list[str] = []
    failure = None
    try:
        try:
            state = open_state(descriptor, content)
            _, notes = store.publish(manifest, lambda file: torch.save(state, file))
        except RunFolderBusy:
            raise
        except Exception as error:
            # Also torch's own errors: whatever it is, training goes on, somebody is told, and it is tried again.
            failure = _reason(error)
        notes = notes + _noted("older checkpoints cannot be removed", lambda: store.prune(policy))
    except RunFolderBusy as busy:
        return Answer(taken_over=str(busy))
    finally:
        os.close(descriptor)
    return Answer(time.monotonic() - started, time.process_time() - cpu_started, notes, failure)


def renew(best: BestCopy, has_news: Callable[[], bool]) -> BestRenewed | None:
    """Keep `best.pt` true; None if it was broken off because there is a request, which goes first, or nobody any more to make one: that is
    what `has_news` tells."""

    def between() -> None:
        if has_news():
            raise Postponed

    notes: list[str] = []
    try:
        failed = _noted("best.pt cannot be renewed", lambda: notes.extend(best.renew(between)))
    except Postponed:
        return None
    except RunFolderBusy as busy:
        return BestRenewed(taken_over=str(busy))
    return BestRenewed(notes + failed)


def _noted(what: str, action: Callable[[], object]) -> list[str]:
    """Do something beside writing. What fails here is noted and comes up again with the next checkpoint: the one that was written is
    complete all the same, and if it could not be written for want of room, retention is what may help. Raises `RunFolderBusy`."""
    try:
        action()
    except RunFolderBusy:
        raise
    except (OSError, Refusal) as error:
        return [f"{what}: {_reason(error)}; training and saving go on"]
    return []


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        # Of a rename the target, because the other is a random name and the same trouble is to be told in the same words.
        name = error.filename2 or error.filename
        where = f" ({name})" if name else ""
        return f"{error.strerror or error}{where}"
    if isinstance(error, Refusal):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
