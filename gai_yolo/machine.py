"""What this machine gives to this process: cores and memory, as limited by affinity and control groups, and how threads wait for work;
needs no torch.

A container's limits are those of its control group (cgroup v1 or v2) and of all groups above it that can be seen. `/proc/self/cgroup`
says which group that is, `/proc/self/mountinfo` where its files are. Memory-backed folders, such as /dev/shm, count towards the
memory limit.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where /proc and the mount points are looked for."""
OWN_DISKS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay"})
"""File systems whose bytes lie in the machine that has mounted them."""
ESCAPED = re.compile(r"\\([0-7]{3})")
"""A space, say, in the table of what is mounted."""
UNLIMITED = 2**62
"""Bytes, where the system does not say."""
SPIN_COUNT = 2000
"""Turns of libgomp's waiting loop, some 0.05 ms. Between two operations of a step most threads wait for less, and waking up a sleeping one
takes as long. Its own 300,000 turns keep a core busy for milliseconds, which whoever else computes there needs: with a busy neighbour the
thread that has work waits behind one that only waits for it. Figures: docs/benchmarks.md."""
SAID_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables with which a user says it."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads of this process, and of those that it starts, sleep soon, unless the user has said how they are to wait; before
    PyTorch is imported, because they read it once. No result depends on it. Other libraries than GCC's do not look at this variable."""
    if not any(name in environment for name in SAID_BY):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def available_cores(root: Path = ROOT) -> int:
    """Cores this process may use: containers and Slurm often give fewer than the machine has.

    A quota of 2.5 cores counts as 2: a third thread would be stopped for half of each period, and the others would wait for it. Below
    1 it is 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [quota for folder in _folders("cpu", root) for quota in (_quota_v2(folder), _quota_v1(folder)) if quota is not None]
    return max(1, int(min([float(cores), *quotas])))


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be taken without swapping, and without being killed for it; `UNLIMITED` where the system does not say."""
    known = [_rest(folder, names) for folder in _folders("memory", root) for names in (V2, V1)]
    # Free pages alone would count the page cache as used.
    known.append(_table(root / "proc/meminfo").get("MemAvailable:"))
    return max(0, min([UNLIMITED, *(value for value in known if value is not None)]))


@dataclass(frozen=True)
class _Names:
    """Files of a control group that are about memory."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    """In `memory.stat`: pages of files on a disk, those that were read twice included, as in `MemAvailable`: after two epochs a data set is
    all there, and goes as soon as something else needs the room. Pages of memory-backed folders are not in these lists but in those of
    anonymous memory, though `file` and `cache` count them, too; so they stay used."""


# Above `high` a process is slowed to a crawl.
V2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def _rest(folder: Path, names: _Names) -> int | None:
    limits = [limit for limit in (_number(folder / name) for name in names.limits) if limit is not None]
    usage = _number(folder / names.usage)
    if not limits or usage is None:
        return None
    pages = _table(folder / "memory.stat")
    return min(limits) - usage + min(usage, sum(pages.get(name, 0) for name in names.reclaimable))


def _quota_v2(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    with contextlib.suppress(ValueError, ZeroDivisionError):
        return int(words[0]) / int(words[1]) if len(words) == 2 else None
    return None  # "max"


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """This process's control groups that a controller may limit, each followed by those above it."""
    groups = _groups(root)
    for where, what in _mounted(root):
        kind, top, mount = what[0], where[3], where[4]
        name = "" if kind == "cgroup2" else controller
        if kind not in ("cgroup", "cgroup2") or name not in groups or (name and name not in what[2].split(",")):
            continue
        # In a container the group's path is often the host's, of which only the group itself is mounted.
        inside = Path(groups[name]).relative_to(top) if Path(groups[name]).is_relative_to(top) else Path()
        if ".." in inside.parts:
            inside = Path()
        for group in (inside, *inside.parents):
            yield root / mount.lstrip("/") / group


def is_on_this_machine(path: Path, root: Path = ROOT) -> bool:
    """Whether a file's disk, or memory, belongs to this machine. A kind of file system that is not known may be anywhere."""
    real, kind, length = path.resolve(), "", 0
    for where, what in _mounted(root):
        place = ESCAPED.sub(lambda letter: chr(int(letter[1], 8)), where[4])
        if real.is_relative_to(place) and len(place) >= length:  # of two at one place the later covers the other
            kind, length = what[0], len(place)
    return kind in OWN_DISKS


def _groups(root: Path) -> dict[str, str]:
    """Path of this process's group by controller; under an empty name that of version 2."""
    groups: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, separator, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and (controllers or number == "0"):
            groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _mounted(root: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The fields before and behind the dash of each mount (proc_pid_mountinfo(5))."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        where, what = before.split(), after.split()
        if len(where) >= 5 and len(what) >= 3:
            yield where, what


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _number(path: Path) -> int | None:
    with contextlib.suppress(ValueError):
        return int(_text(path))
    return None  # "max", or nothing


def _table(path: Path) -> dict[str, int]:
    """Numbers by name; those in kB as bytes."""
    table: dict[str, int] = {}
    for line in _text(path).splitlines():
        name, *words = line.split() or [""]
        with contextlib.suppress(ValueError, IndexError):
            table[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return table
