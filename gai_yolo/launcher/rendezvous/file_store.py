"""A key-value store in a file that all nodes share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from gai_yolo.launcher.rendezvous.key_values import Answer, InMemoryKeyValueStore, KeyValueStore, Read, Request
from gai_yolo.launcher.rendezvous.secret import MAC_BYTES, Secret, SecretError, check_owner

FILE_MAGIC = b"gai-yolo board 2\n"
OLD_FILE_MAGIC = b"gai-yolo board 1\n"
FIRST_SLOT = 4096
SLOT_BYTES = 4 << 20
"""Room for what some thousand nodes write. The file is sparse: it takes what is in it."""
SLOT_HEADER = struct.Struct(f"<QI{MAC_BYTES}s")
"""Number of the change, bytes of the content, MAC of both."""


class StoreRefused(OSError):
    """A file that time does not mend: of another kind, of another user, or written by somebody who does not know the job's secret."""


class FileKeyValueStore(KeyValueStore):
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

    def answer(self, asked: Request) -> Answer:
        with self._locked(fcntl.LOCK_SH if isinstance(asked, Read) else fcntl.LOCK_EX) as file:
            number, content = self._newest(file)
            before = dict(content)
            result = InMemoryKeyValueStore(content).answer(asked)
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

    def _newest(self, file: int) -> tuple[int, dict[str, str]]:
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
        return number, json.loads(newest) if newest else {}

    def _publish(self, file: int, number: int, content: dict[str, str]) -> None:
        data = json.dumps(content).encode()
        if len(data) > SLOT_BYTES - SLOT_HEADER.size:
            raise OSError(errno.EFBIG, "too many nodes for a rendezvous file; use host:port")
        mac = self._secret.mac("board", number.to_bytes(8, "big"), data)
        if number == 1:
            _write(file, FILE_MAGIC, 0)
        _write(file, SLOT_HEADER.pack(number, len(data), mac) + data, FIRST_SLOT + (number % 2) * SLOT_BYTES)


def check_store(path: Path) -> None:
    """Refuse a file that cannot be a job's store; with which secret it was written is not looked at.

    Raises:
        StoreRefused: see there.
        OSError: it cannot be read.
    """
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
