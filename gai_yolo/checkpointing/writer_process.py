"""The process that writes checkpoints: serialises, hashes, syncs, publishes and prunes, at low priority.

Started by `writer_handle.WriterProcess` with one end of a socket as standard input. It serves one request after the other and ends
when the training process has gone; what it has been handed by then it still finishes, unless another start has raised the
fence. `best.pt` is for when there is nothing else to write: a checkpoint that comes meanwhile goes first.
It does nothing else on its own: when to try again is for the training process to say.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import torch

from gai_yolo.checkpointing.capture import Content, open_state
from gai_yolo.errors import Refusal, RunFolderBusy
from gai_yolo.store.best import BestCopy
from gai_yolo.store.manifest import Manifest
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Request:
    """One checkpoint to write. The state comes beside it, as the descriptor of a `StateBuffer`: a request is so small that
    sending it never waits, even for a writer that was stopped."""

    manifest: Manifest
    content: Content


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    size: int = 0
    """Bytes on the disk; 0 if it failed."""
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


def main() -> None:
    """Serve the socket that standard input is, until it is closed."""
    os.nice(19)
    torch.set_num_threads(1)
    connection = socket.socket(fileno=0)
    run, fence, policy = receive(connection)[0]
    store = Store(run, fence)
    best, best_is_due = BestCopy(store, policy.best_since), True  # a start that was killed may have left it undone
    while True:
        renewed = renew(best, lambda: _has_news(connection)) if best_is_due else None
        try:
            if renewed is not None:
                best_is_due = False
                send(connection, renewed)
            request, descriptor = receive(connection)
        except (EOFError, OSError):
            return  # it has gone; with an answer of ours unread, the connection breaks
        answer = serve(store, policy, request, descriptor)
        best_is_due = best_is_due or (answer.failure is None and request.manifest.metric is not None)
        try:
            send(connection, replace(answer, best_follows=best_is_due))
        except OSError:
            return


def serve(store: Store, policy: Policy, request: Request, descriptor: int) -> Answer:
    """Write one checkpoint, and make room by retention's rules."""
    started, cpu_started = time.monotonic(), time.process_time()
    notes: list[str] = []
    size, failure = 0, None
    try:
        try:
            state = open_state(descriptor, request.content)
            manifest, notes = store.publish(request.manifest, lambda file: save(state, file))
            size = manifest.size
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
    return Answer(size, time.monotonic() - started, time.process_time() - cpu_started, notes, failure)


def renew(best: BestCopy, has_news: Callable[[], bool]) -> BestRenewed | None:
    """Keep `best.pt` true; None if it was broken off because a checkpoint waits, which goes first."""

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
    complete all the same, and if it could not be written for want of room, retention is what may help.

    Raises:
        RunFolderBusy: another job has taken the run over.
    """
    try:
        action()
    except RunFolderBusy:
        raise
    except (OSError, Refusal) as error:
        return [f"{what}: {_reason(error)}; training and saving go on"]
    return []


def _has_news(connection: socket.socket) -> bool:
    """Whether there is a request, or nobody any more to make one."""
    return bool(select.select([connection], [], [], 0)[0])


def save(state: dict[str, Any], file: BinaryIO) -> None:
    """The bytes of a checkpoint."""
    torch.save(state, file)


def send(connection: socket.socket, message: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Send a message and copies of file descriptors.

    Raises:
        OSError: nobody is listening any more.
    """
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    socket.send_fds(connection, [LENGTH.pack(len(data))], list(descriptors))
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, int]:
    """A message and the file descriptor that came with it, or -1.

    Raises:
        EOFError: the other end has gone.
        OSError: the connection broke.
    """
    head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 1)
    if len(head) < LENGTH.size:
        head += _read(connection, LENGTH.size - len(head))
    data = _read(connection, LENGTH.unpack(head)[0])
    return pickle.loads(data), descriptors[0] if descriptors else -1


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        # Of a rename the target, because the other is a random name and the same trouble is to be told in the same words.
        name = error.filename2 or error.filename
        where = f" ({name})" if name else ""
        return f"{error.strerror or error}{where}"
    if isinstance(error, Refusal):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
