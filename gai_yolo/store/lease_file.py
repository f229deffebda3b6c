"""A lock for file systems without flock: a file that names its owner, who renews it every few seconds.

What a lock of the operating system does by itself when its owner dies, others have to find out here: an owner whose file has not
changed for a while, by the clock of who looks, is taken for dead, and its file is replaced. That may be an error, of a machine that slept
say; so what such an owner writes afterwards must be fenced (`lease.Fence`), as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gai_yolo.store.atomic import is_temporary

RENEWED_EVERY = 5.0
"""Seconds between two renewals."""
STALE = 60.0
"""Seconds without one after which the owner is taken for dead; much more than `RENEWED_EVERY` and `SETTLED` together."""
SETTLED = 1.0
"""Seconds after which who has replaced a dead owner's file looks whether somebody else has, too."""
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says where there is none."""


def has_flock(path: Path) -> bool:
    """Whether files beside `path`, which is made if it is not there, can be locked by the operating system. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_FLOCK
    finally:
        os.close(descriptor)
    return True


class LeaseFile:
    """The lock, whose file's folder must be there."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep) -> None:
        self.path, self._clock, self._sleep = path, clock, sleep
        self._nonce = os.urandom(8).hex()
        self._beats = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, patience: float) -> bool:
        """Become the owner; returns whether that is so. An owner that renews its file is waited for as long as told, one that does not
        until it counts as dead. Raises `OSError`."""
        started = seen_at = self._clock()
        seen: bytes | None = None
        while not self._create():
            now, content = self._clock(), self._read()
            if content is None:
                continue  # just released
            if content != seen:
                moves = seen is not None
                seen, seen_at = content, now
                if moves and now - started >= patience:
                    return False
            elif _died_here(content) or now - seen_at >= STALE:
                self._write()
                self._sleep(SETTLED)
                if self._is_ours():
                    break
                seen = None
            elif now - started >= max(patience, STALE + 2 * RENEWED_EVERY):
                return False
            self._sleep(min(RENEWED_EVERY / 10, 0.5))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Let another one in."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self.path.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):  # a disk that is away for a while
                content = self._read()
                if content is None:
                    continue  # a share that is not mounted just now: who has taken over left a file of its own
                if not self._is_ours(content):
                    return
                self._write()

    def _create(self) -> bool:
        """Whether nobody else was the owner."""
        if self.path.exists():
            return False
        temp = self._temp_file()
        try:
            os.link(temp, self.path)
        except FileExistsError:
            pass
        except OSError:
            temp.rename(self.path)  # no hard links here either; of two at once the later one stays, and both look
            self._sleep(SETTLED)
        finally:
            temp.unlink(missing_ok=True)
        return self._is_ours()

    def _write(self) -> None:
        self._temp_file().rename(self.path)

    def _temp_file(self) -> Path:
        self._beats += 1
        owner = {**_machine(), "pid": os.getpid(), "nonce": self._nonce, "beat": self._beats}
        # One name for all: a full disk, which takes names and no content, would be left a file for each beat.
        temp = self.path.with_name(f".{self.path.name}~{self._nonce}~0.tmp")
        assert is_temporary(temp.name)
        temp.write_text(json.dumps(owner))
        return temp

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_ours(self, content: bytes | None = None) -> bool:
        content = self._read() if content is None else content
        return bool(_owner(content or b"").get("nonce") == self._nonce)


def _owner(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _machine() -> dict[str, str]:
    """Among which processes a process id means something; empty where the system does not say. The kernel gives a namespace's name anew
    only when it is gone, and its processes with it."""
    machine = {"host": socket.gethostname(), "boot": "", "pid_namespace": ""}
    with contextlib.suppress(OSError):
        machine["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return machine


def _died_here(content: bytes) -> bool:
    """Whether the owner was a process of this machine since it was started, and is gone. Containers share a boot, and on the host's network
    its name, and not their processes: then only time tells."""
    owner = _owner(content)
    pid, here = owner.get("pid"), _machine()
    # The file of an older version does not say its namespace: that one is waited for until it is stale, which costs a minute, once. To
    # guess wrong would cost two writers.
    if not all(here.values()) or not here.items() <= owner.items() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
