"""Child processes that neither outlive this one nor are left behind by another. Linux; elsewhere nothing is promised."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
TICK = 0.1
"""Seconds between two looks at a child."""
KILLED_WITHIN = 10.0
"""Seconds that a killed process may take to end, as it may while a device or a network disk does not answer."""


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Get a signal when the process that has started this one ends, however it does; at once if it has ended already."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of what dead children leave behind, which would go to process 1 otherwise.

    Raises:
        OSError: the system does not allow it.
    """
    if _prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError("orphans cannot be adopted")


def set_name(name: str) -> None:
    """Name this process, in up to 15 letters, for `top` and `ps -o comm`."""
    _prctl(PR_SET_NAME, name.encode())


class Child:
    """A process in a session of its own: a terminal's Ctrl-C reaches it through this process alone."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        self._started = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def poll(self) -> int | None:
        """Exit code, minus a signal's number, or None while it runs."""
        return self._process.poll()

    def end(self, patience: float, hurry: Callable[[], bool]) -> int:
        """Send SIGTERM, once; SIGKILL when the patience (seconds) is over, or `hurry` says so. Returns as `poll`."""
        self._process.terminate()
        deadline = time.monotonic() + patience
        while (code := self.poll()) is None:
            if time.monotonic() > deadline or hurry():
                self._process.kill()
                return self._process.wait()
            time.sleep(TICK)
        return code


def reap_orphans(own: Sequence[int] = ()) -> None:
    """Take note of the deaths of adopted children, which would stay as zombies.

    Args:
        own: children that somebody else waits for.
    """
    if not hasattr(os, "waitid"):
        return  # macOS with an old Python; where orphans cannot be adopted, either
    with contextlib.suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and dead.si_pid not in own:
            os.waitpid(dead.si_pid, 0)


def end_orphans(patience: float, hurry: Callable[[], bool]) -> None:
    """End what a dead agent has left: its workers, which hold the devices and the run's lock; SIGTERM first, so that they can
    save, and SIGKILL after so many seconds. One that the kernel does not let go is left behind in the end."""
    told: set[int] = set()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline + KILLED_WITHIN:
        reap_orphans()
        left = children_of(os.getpid())
        if not left:
            return
        over = time.monotonic() > deadline or hurry()
        for pid in left if over else left - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if over else signal.SIGTERM)
        told |= left
        time.sleep(TICK)


def children_of(parent: int) -> set[int]:
    """Ids of the living children of a process, zombies included."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.add(int(path.parent.name))
    return found


def name_of(pid: int) -> str:
    """What `set_name` has given a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _prctl(option: int, value: int | bytes) -> int:
    if sys.platform != "linux":
        return -1
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    return result
