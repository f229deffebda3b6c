"""A notice board: names and bytes that the nodes of a job leave for each other, changed by one node at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from gai_yolo.launcher.rendezvous.secret import MAC_BYTES, Secret, SecretError, check_owner

T = TypeVar("T")

MAGIC = b"gai-yolo board 2\n"
OLD_MAGIC = b"gai-yolo board 1\n"
FIRST_SLOT = 4096
SLOT_BYTES = 4 << 20
"""Room for the notes of some thousand nodes. The file is sparse: it takes what its notes take."""
HEADER = struct.Struct(f"<QI{MAC_BYTES}s")
"""Number of the change, bytes of the notes, MAC of both."""
MOST_BYTES = 64 << 20
"""Of all notes of a board in memory."""


class StoreRefused(OSError):
    """A file that time does not mend: of another kind, of another user, or written by somebody who does not know the job's secret."""


class KeyValueStore(Protocol):
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


class InMemoryKeyValueStore:
    """A board of one process."""

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content = {} if content is None else content
        self._size = sum(map(_size_of, self.content.items()))

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """See `KeyValueStore`."""
        return [self.content.get(name) for name in names]

    def write(self, notes: Mapping[str, bytes]) -> None:
        """See `KeyValueStore`."""
        for name, value in notes.items():
            if name not in self.content:
                forget_old_rounds(self.content, name)
                self._size = sum(map(_size_of, self.content.items()))
            self._size += _size_of((name, value)) - (_size_of((name, self.content[name])) if name in self.content else 0)
            if self._size > MOST_BYTES:
                raise OSError(errno.EFBIG, "too many notes")
            self.content[name] = value

    def add(self, name: str, amount: int) -> int:
        """See `KeyValueStore`."""
        total = int(self.content.get(name, b"0")) + amount
        self.write({name: str(total).encode()})
        return total

    def swap(self, name: str, expected: bytes, value: bytes) -> bytes:
        """See `KeyValueStore`."""
        if self.content.get(name, b"") == expected:
            self.write({name: value})
        return self.content.get(name, b"")


def _size_of(note: tuple[str, bytes]) -> int:
    return len(note[0]) + len(note[1])


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


class FileKeyValueStore:
    """A board in one file on storage that all nodes share, under a lock (`flock`; NFS 4, Lustre mounted with it, and GPFS have it).

    Two slots are written by turns, each with a MAC by the job's secret: a change that was cut short, by a kill or a full disk, has not
    happened, nor has one by a stranger, and the notes before it stand. Nothing is parsed before its MAC was verified. The file does not
    grow. Nothing is promised where the file system's locks are not those of all nodes.

    Args:
        path: made if it is not there, for this user alone.
        patience: seconds to wait for the lock.

    Raises:
        BoardRefused: from every call: see there.
    """

    def __init__(self, path: Path, secret: Secret, patience: float = 20.0) -> None:
        self.path, self._secret, self._patience = path, secret, patience

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """See `KeyValueStore`."""
        with self._locked(fcntl.LOCK_SH) as file:
            return InMemoryKeyValueStore(self._newest(file)[1]).read(names)

    def write(self, notes: Mapping[str, bytes]) -> None:
        """See `KeyValueStore`."""
        self._change(lambda present: present.write(notes))

    def add(self, name: str, amount: int) -> int:
        """See `KeyValueStore`."""
        return self._change(lambda notes: notes.add(name, amount))

    def swap(self, name: str, expected: bytes, value: bytes) -> bytes:
        """See `KeyValueStore`."""
        return self._change(lambda notes: notes.swap(name, expected, value))

    def _change(self, action: Callable[[InMemoryKeyValueStore], T]) -> T:
        with self._locked(fcntl.LOCK_EX) as file:
            number, content = self._newest(file)
            before = dict(content)
            result = action(InMemoryKeyValueStore(content))
            if content != before:
                self._publish(file, number + 1, content)
            return result

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[int]:
        # Readers, too: the lock is what makes a network file system read anew.
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            _check_access(self.path, os.fstat(file))
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

    def _newest(self, file: int) -> tuple[int, dict[str, bytes]]:
        """Number and notes of the last complete change; 0 and none in a new file."""
        _check_kind(os.pread(file, len(MAGIC), 0), self.path)
        number, newest, is_foreign = 0, b"", False
        for slot in range(2):
            offset = FIRST_SLOT + slot * SLOT_BYTES
            head = os.pread(file, HEADER.size, offset)
            its_number, length, mac = HEADER.unpack(head) if len(head) == HEADER.size else (0, 0, b"")
            if its_number <= number:
                continue
            data = os.pread(file, min(length, SLOT_BYTES - HEADER.size), offset + HEADER.size)
            if self._secret.verifies(mac, "board", its_number.to_bytes(8, "big"), data):
                number, newest = its_number, data
            elif its_number > 1 or len(data) == length:  # a first change that was cut short is nobody's fault
                is_foreign = True
        if is_foreign and number == 0:
            raise StoreRefused(
                errno.EPERM,
                "was not written with this job's secret; give all launchers the same one, or remove the file if no job meets there",
                str(self.path),
            )
        return number, unpack(json.loads(newest)) if newest else {}

    def _publish(self, file: int, number: int, content: dict[str, bytes]) -> None:
        data = json.dumps(pack(content)).encode()
        if len(data) > SLOT_BYTES - HEADER.size:
            raise OSError(errno.EFBIG, "too many nodes for a rendezvous file; use host:port")
        mac = self._secret.mac("board", number.to_bytes(8, "big"), data)
        if number == 1:
            _write(file, MAGIC, 0)
        _write(file, HEADER.pack(number, len(data), mac) + data, FIRST_SLOT + (number % 2) * SLOT_BYTES)


def check_store(path: Path, secret: Secret | None = None) -> None:
    """Refuse a file that cannot be this job's board.

    Args:
        secret: with which it must have been written; None: that is not looked at.

    Raises:
        BoardRefused: see there.
        OSError: it cannot be read.
    """
    if secret is not None:
        FileKeyValueStore(path, secret).read([])
        return
    with path.open("rb") as file:
        _check_access(path, os.fstat(file.fileno()))
        _check_kind(file.read(len(MAGIC)), path)


def _check_access(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise StoreRefused(errno.EINVAL, "is no file; name another one", str(path))
    try:
        check_owner(path, status)
    except SecretError as error:
        raise StoreRefused(errno.EPERM, str(error).removeprefix(f"{path}: ").removesuffix("."), str(path)) from None
    if status.st_mode & 0o022:
        raise StoreRefused(errno.EPERM, "can be written to by other users; chmod 600, or remove it if no job meets there", str(path))


def _check_kind(begin: bytes, path: Path) -> None:
    if begin.startswith(OLD_MAGIC):
        raise StoreRefused(errno.EINVAL, "was left by an older version and is not signed; remove it when no job meets there", str(path))
    if not MAGIC.startswith(begin):
        raise StoreRefused(errno.EINVAL, "is a file of another kind; name one of its own, which need not exist yet", str(path))


def _write(file: int, data: bytes, offset: int) -> None:
    if os.pwrite(file, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def pack(notes: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes as JSON can hold them."""
    return {name: value.decode("latin-1") for name, value in notes.items()}


def unpack(notes: Mapping[str, str]) -> dict[str, bytes]:
    """The way back from `pack`."""
    return {name: value.encode("latin-1") for name, value in notes.items()}
