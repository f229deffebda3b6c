"""This process and its kin, as the system keeps them. Linux; elsewhere nothing is promised."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
"""Of prctl(2)."""
FORK_TICK = 0.02
"""Seconds between two looks at a fork."""


class ForkedChild:
    """A child of this process that is a fork, of this one or, made for it, of another; as much of `subprocess.Popen` as is used of it."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid, self.args = pid, args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus a signal's number, or None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = 255  # somebody else has waited for it; how it ended is not known
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """The same, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(FORK_TICK)
        return code

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Get a signal when the process that has started this one ends, however it does; at once if it has ended already."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of what dead children leave behind, which would go to process 1 otherwise. Raises `OSError`."""
    if _prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError("orphans cannot be adopted")


def set_name(name: str) -> None:
    """Name this process, in up to 15 letters, for `top` and `ps -o comm`."""
    _prctl(PR_SET_NAME, name.encode())


def has_one_thread() -> bool:
    """Whether this process has no other threads, those of libraries included."""
    return len(list(Path("/proc/self/task").iterdir())) == 1


def name_of(pid: int) -> str:
    """What `set_name` has given a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def children_of(parent: int) -> set[int]:
    """Ids of the living children of a process, zombies included."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.add(int(path.parent.name))
    return found


def _prctl(option: int, value: int | bytes) -> int:
    if sys.platform != "linux":
        return -1
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    return result
