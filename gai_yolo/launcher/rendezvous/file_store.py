"""A key-value store that the nodes of a job share, changed by one node at a time; here in memory and in a file."""

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

FILE_MAGIC = b"gai-yolo board 2\n"
OLD_FILE_MAGIC = b"gai-yolo board 1\n"
FIRST_SLOT = 4096
SLOT_BYTES = 4 << 20
"""Room for what some thousand nodes write. The file is sparse: it takes what is in it."""
SLOT_HEADER = struct.Struct(f"<QI{MAC_BYTES}s")
"""Number of the change, bytes of the content, MAC of both."""
MOST_STORE_BYTES = 64 << 20
"""Of all keys and values of a store in memory."""


class StoreRefused(OSError):
    """A file that time does not mend: of another kind, of another user, or written by somebody who does not know the job's secret."""


class KeyValueStore(Protocol):
    """Every call is atomic: no other node's call comes in between.

    Raises:
        OSError: from every call: the store cannot be reached, or not in time. What was asked for may have been done.
    """

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of these keys; None where there is none."""

    def write(self, values: Mapping[str, bytes]) -> None:
        """Set values by key."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first; returns the sum."""

    def swap(self, key: str, expected: bytes, value: bytes) -> bytes:
        """Set a value if `expected` stands there (empty: nothing); returns what stands there afterwards."""


class InMemoryKeyValueStore:
    """A store of one process."""

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content = {} if content is None else content
        self._size = sum(map(_size_of, self.content.items()))

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `KeyValueStore`."""
        return [self.content.get(key) for key in keys]

    def write(self, values: Mapping[str, bytes]) -> None:
        """See `KeyValueStore`."""
        for key, value in values.items():
            if key not in self.content:
                forget_old_rounds(self.content, key)
                self._size = sum(map(_size_of, self.content.items()))
            self._size += _size_of((key, value)) - (_size_of((key, self.content[key])) if key in self.content else 0)
            if self._size > MOST_STORE_BYTES:
                raise OSError(errno.EFBIG, "too many keys")
            self.content[key] = value

    def add(self, key: str, amount: int) -> int:
        """See `KeyValueStore`."""
        total = int(self.content.get(key, b"0")) + amount
        self.write({key: str(total).encode()})
        return total

    def swap(self, key: str, expected: bytes, value: bytes) -> bytes:
        """See `KeyValueStore`."""
        if self.content.get(key, b"") == expected:
            self.write({key: value})
        return self.content.get(key, b"")


def _size_of(item: tuple[str, bytes]) -> int:
    return len(item[0]) + len(item[1])


def forget_old_rounds(content: dict[str, bytes], key: str) -> None:
    """Drop what belongs to rendezvous rounds before the last one: torchrun's keys are `torch.rendezvous.RUN.ROUND/...`, and it
    leaves them."""
    run, number = _round_of(key)
    if number is None:
        return
    for other in list(content):
        its_run, its_number = _round_of(other)
        if its_number is not None and its_run == run and its_number < number - 1:
            del content[other]


def _round_of(key: str) -> tuple[str, int | None]:
    head, slash, _ = key.partition("/")
    run, _, number = head.rpartition(".")
    return (run, int(number)) if slash and head.startswith("torch.rendezvous.") and number.isdigit() else (head, None)


class FileKeyValueStore:
    """A store in one file on storage that all nodes share, under a lock (`flock`; NFS 4, Lustre mounted with it, and GPFS have it).

    Two slots are written by turns, each with a MAC by the job's secret: a change that was cut short, by a kill or a full disk, has not
    happened, nor has one by a stranger, and what was there before it stands. Nothing is parsed before its MAC was verified. The file does
    not grow. Nothing is promised where the file system's locks are not those of all nodes.

    Args:
        path: made if it is not there, for this user alone.
        patience: seconds to wait for the lock.

    Raises:
        StoreRefused: from every call: see there.
    """

    def __init__(self, path: Path, secret: Secret, patience: float = 20.0) -> None:
        self.path, self._secret, self._patience = path, secret, patience

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `KeyValueStore`."""
        with self._locked(fcntl.LOCK_SH) as file:
            return InMemoryKeyValueStore(self._newest(file)[1]).read(keys)

    def write(self, values: Mapping[str, bytes]) -> None:
        """See `KeyValueStore`."""
        self._change(lambda present: present.write(values))

    def add(self, key: str, amount: int) -> int:
        """See `KeyValueStore`."""
        return self._change(lambda present: present.add(key, amount))

    def swap(self, key: str, expected: bytes, value: bytes) -> bytes:
        """See `KeyValueStore`."""
        return self._change(lambda present: present.swap(key, expected, value))

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
        """Number and content as of the last complete change; 0 and nothing in a new file."""
        _check_kind(os.pread(file, len(FILE_MAGIC), 0), self.path)
        number, newest, is_foreign = 0, b"", False
        for slot in range(2):
            offset = FIRST_SLOT + slot * SLOT_BYTES
            head = os.pread(file, SLOT_HEADER.size, offset)
            its_number, length, mac = SLOT_HEADER.unpack(head) if len(head) == SLOT_HEADER.size else (0, 0, b"")
            if its_number <= number:
                continue
            data = os.pread(file, min(length, SLOT_BYTES - SLOT_HEADER.size), offset + SLOT_HEADER.size)
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
        if len(data) > SLOT_BYTES - SLOT_HEADER.size:
            raise OSError(errno.EFBIG, "too many nodes for a rendezvous file; use host:port")
        mac = self._secret.mac("board", number.to_bytes(8, "big"), data)
        if number == 1:
            _write(file, FILE_MAGIC, 0)
        _write(file, SLOT_HEADER.pack(number, len(data), mac) + data, FIRST_SLOT + (number % 2) * SLOT_BYTES)


def check_store(path: Path, secret: Secret | None = None) -> None:
    """Refuse a file that cannot be this job's store.

    Args:
        secret: with which it must have been written; None: that is not looked at.

    Raises:
        StoreRefused: see there.
        OSError: it cannot be read.
    """
    if secret is not None:
        FileKeyValueStore(path, secret).read([])
        return
    with path.open("rb") as file:
        _check_access(path, os.fstat(file.fileno()))
        _check_kind(file.read(len(FILE_MAGIC)), path)


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
    if begin.startswith(OLD_FILE_MAGIC):
        raise StoreRefused(errno.EINVAL, "was left by an older version and is not signed; remove it when no job meets there", str(path))
    if not FILE_MAGIC.startswith(begin):
        raise StoreRefused(errno.EINVAL, "is a file of another kind; name one of its own, which need not exist yet", str(path))


def _write(file: int, data: bytes, offset: int) -> None:
    if os.pwrite(file, data, offset) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def pack(values: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes as JSON can hold them."""
    return {key: value.decode("latin-1") for key, value in values.items()}


def unpack(values: Mapping[str, str]) -> dict[str, bytes]:
    """The way back from `pack`."""
    return {key: value.encode("latin-1") for key, value in values.items()}
