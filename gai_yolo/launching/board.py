"""A notice board: names and bytes that the nodes of a job leave for each other, changed by one node at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")

MAGIC = b"gai-yolo board 1\n"
FIRST_SLOT = 4096
SLOT_BYTES = 4 << 20
"""Room for the notes of some thousand nodes. The file is sparse: it takes what its notes take."""
HEADER = struct.Struct("<QII")
"""Number of the change, bytes of the notes, CRC-32 of both."""


class Board(Protocol):
    """Every call is atomic: no other node's call comes in between.

    Raises:
        OSError: from every call: the board cannot be reached, or not in time. What was asked for may have been done.
    """

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """The notes of these names; None where there is none."""

    def write(self, notes: Mapping[str, bytes]) -> None:
        """Leave notes, in place of those of the same names."""

    def add(self, name: str, amount: int) -> int:
        """Add to a number, 0 at first; returns the sum."""

    def swap(self, name: str, expected: bytes, value: bytes) -> bytes:
        """Leave a note if `expected` stands there (empty: nothing); returns what stands there afterwards."""


class Notes:
    """A board of one process."""

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content = {} if content is None else content

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Board`."""
        return [self.content.get(name) for name in names]

    def write(self, notes: Mapping[str, bytes]) -> None:
        """See `Board`."""
        for name, value in notes.items():
            if name not in self.content:
                forget_old_rounds(self.content, name)
            self.content[name] = value

    def add(self, name: str, amount: int) -> int:
        """See `Board`."""
        total = int(self.content.get(name, b"0")) + amount
        self.write({name: str(total).encode()})
        return total

    def swap(self, name: str, expected: bytes, value: bytes) -> bytes:
        """See `Board`."""
        if self.content.get(name, b"") == expected:
            self.write({name: value})
        return self.content.get(name, b"")


def forget_old_rounds(content: dict[str, bytes], name: str) -> None:
    """Drop what belongs to rendezvous rounds before the last one: torchrun names notes `torch.rendezvous.RUN.ROUND/...` and
    leaves them."""
    run, number = _round_of(name)
    if number is None:
        return
    for other in list(content):
        its_run, its_number = _round_of(other)
        if its_number is not None and its_run == run and its_number < number - 1:
            del content[other]


def _round_of(name: str) -> tuple[str, int | None]:
    head, slash, _ = name.partition("/")
    run, _, number = head.rpartition(".")
    return (run, int(number)) if slash and head.startswith("torch.rendezvous.") and number.isdigit() else (head, None)


class FileBoard:
    """A board in one file on storage that all nodes share, under a lock (`flock`; NFS 4, Lustre mounted with it, and GPFS have it).

    Two slots are written by turns, each with a checksum: a change that was cut short, by a kill or a full disk, has not happened,
    and the notes before it stand. The file does not grow. Nothing is promised where the file system's locks are not
    those of all nodes.

    Args:
        path: made if it is not there.
        patience: seconds to wait for the lock.
    """

    def __init__(self, path: Path, patience: float = 20.0) -> None:
        self.path, self._patience = path, patience

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Board`."""
        with self._locked(fcntl.LOCK_SH) as file:
            return Notes(_newest(file, self.path)[1]).read(names)

    def write(self, notes: Mapping[str, bytes]) -> None:
        """See `Board`."""
        self._change(lambda present: present.write(notes))

    def add(self, name: str, amount: int) -> int:
        """See `Board`."""
        return self._change(lambda notes: notes.add(name, amount))

    def swap(self, name: str, expected: bytes, value: bytes) -> bytes:
        """See `Board`."""
        return self._change(lambda notes: notes.swap(name, expected, value))

    def _change(self, action: Callable[[Notes], T]) -> T:
        with self._locked(fcntl.LOCK_EX) as file:
            number, content = _newest(file, self.path)
            before = dict(content)
            result = action(Notes(content))
            if content != before:
                _publish(file, number + 1, content)
            return result

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[int]:
        # Readers, too: the lock is what makes a network file system read anew.
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            deadline = time.monotonic() + self._patience
            while True:
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(errno.ETIMEDOUT, "locked by another process for too long", str(self.path)) from None
                    time.sleep(0.01)
            yield file
        finally:
            os.close(file)  # gives the lock back


def is_board(path: Path) -> bool:
    """Whether a file is a board, or may become one: somebody's file of another kind must not be written to."""
    with path.open("rb") as file:
        return MAGIC.startswith(file.read(len(MAGIC)))


def _newest(file: int, path: Path) -> tuple[int, dict[str, bytes]]:
    """Number and notes of the last complete change; 0 and none in a new file."""
    if not MAGIC.startswith(os.pread(file, len(MAGIC), 0)):
        raise OSError(errno.EINVAL, "holds something else than a rendezvous", str(path))
    number, newest = 0, b""
    for slot in range(2):
        offset = FIRST_SLOT + slot * SLOT_BYTES
        head = os.pread(file, HEADER.size, offset)
        if len(head) < HEADER.size:
            continue
        its_number, length, checksum = HEADER.unpack(head)
        if its_number > number and length <= SLOT_BYTES - HEADER.size:
            data = os.pread(file, length, offset + HEADER.size)
            if len(data) == length and _checksum(its_number, data) == checksum:
                number, newest = its_number, data
    return number, unpack(json.loads(newest)) if newest else {}


def _publish(file: int, number: int, content: dict[str, bytes]) -> None:
    data = json.dumps(pack(content)).encode()
    if len(data) > SLOT_BYTES - HEADER.size:
        raise OSError(errno.EFBIG, "too many nodes for a rendezvous file; use host:port")
    record = HEADER.pack(number, len(data), _checksum(number, data)) + data
    if number == 1:
        _write(file, MAGIC, 0)
    _write(file, record, FIRST_SLOT + (number % 2) * SLOT_BYTES)


def _write(file: int, data: bytes, offset: int) -> None:
    if os.pwrite(file, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checksum(number: int, data: bytes) -> int:
    return zlib.crc32(data, number & 0xFFFFFFFF)


def pack(notes: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes as JSON can hold them."""
    return {name: value.decode("latin-1") for name, value in notes.items()}


def unpack(notes: Mapping[str, str]) -> dict[str, bytes]:
    """The way back from `pack`."""
    return {name: value.encode("latin-1") for name, value in notes.items()}
