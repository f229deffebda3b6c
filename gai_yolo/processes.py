"""This process and its kin, as the system keeps them. Linux; elsewhere nothing is promised."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
"""Of prctl(2)."""


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
