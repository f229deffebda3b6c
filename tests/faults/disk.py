"""A disk in memory that forgets what was not synced: every state that a crash may leave can be built and looked at.

The model, which is weaker than what any journalling file system does:
- A file's content is on the disk after fsync of that file. Before, each write may be there, or not, or torn at the
  boundaries of 4 KiB blocks; blocks in between that were not written hold zeros.
- A change of a name (create, rename, link, unlink) is on the disk after fsync of its folder. Before, each change may be there
  or not, independently of the others and of their order; a rename is there as a whole or not at all.
- fsync of a file says nothing of its name, fsync of a folder nothing of the contents.
- A folder that was made is a change of a name in the folder above it; while that is not on the disk, nothing in it is there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from gai_yolo.store.filesystem import FileSystem, Identity

BLOCK = 4096
FOLDER = -1
"""In place of an inode."""
MOST_EXHAUSTIVE = 7
"""Up to so many unsynced changes of names, or blocks of a file, all their subsets are built, beyond it a sample."""

Files = dict[Path, bytes]
T = TypeVar("T")


@dataclass(frozen=True)
class Operation:
    """One call, as the log holds it."""

    kind: str
    """create, mkdir, write, fsync, rename, link, unlink, sync, mark"""
    path: Path = Path()
    target: Path = Path()
    inode: int = -1
    offset: int = 0
    data: bytes = b""
    note: object = None
    """Of marks, which are put into the log by a test."""


class MemoryDisk(FileSystem):
    """Implements the thin layer, keeps a log, and can leave out syncs.

    Args:
        files: what is there, on the disk, at the beginning.
        hard_links: whether `link` and `clone` work.
    """

    def __init__(self, files: Files | None = None, hard_links: bool = True) -> None:
        self.hard_links = hard_links
        self.contents: dict[int, bytearray] = {}
        self.entries: dict[Path, int] = {}
        self.log: list[Operation] = []
        self.folders: set[Path] = set()
        """Those that were made."""
        self._descriptors: dict[int, int] = {}
        self._paths: dict[int, Path] = {}
        self._numbers = itertools.count(1)
        self._clock = itertools.count(1)
        self._modified: dict[int, int] = {}
        for path, content in (files or {}).items():
            inode = next(self._numbers)
            self.contents[inode], self.entries[path] = bytearray(content), inode
        self.start = dict(self.entries), {inode: bytes(content) for inode, content in self.contents.items()}

    def files(self) -> Files:
        """What is there, synced or not."""
        return {path: bytes(self.contents[inode]) for path, inode in self.entries.items() if inode != FOLDER}

    def mark(self, note: object) -> None:
        """Remember in the log what has been promised by now."""
        self.log.append(Operation("mark", note=note))

    def syncs(self, _operation: Operation) -> bool:
        """Whether a sync does what it says; to be overridden."""
        return True

    # --- the thin layer ----------------------------------------------------------------------------------------------------

    def create(self, path: Path) -> int:
        if path in self.entries:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        inode = next(self._numbers)
        self.contents[inode], self.entries[path] = bytearray(), inode
        self.log.append(Operation("create", path, inode=inode))
        return self._descriptor(inode, path)

    def mkdir(self, folder: Path) -> None:
        if self._is_folder(folder):
            return
        if not self._is_folder(folder.parent):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))
        self.folders.add(folder)
        self.entries[folder] = FOLDER
        self.log.append(Operation("mkdir", folder, inode=FOLDER))

    def write(self, descriptor: int, data: memoryview) -> int:
        inode = self._descriptors[descriptor]
        content = self.contents[inode]
        self.log.append(Operation("write", self._paths[descriptor], inode=inode, offset=len(content), data=bytes(data)))
        content += data
        self._modified[inode] = next(self._clock)
        return len(data)

    def fsync(self, descriptor: int) -> None:
        self._sync(Operation("fsync", self._paths[descriptor], inode=self._descriptors[descriptor]))

    def close(self, descriptor: int) -> None:
        del self._descriptors[descriptor]

    def rename(self, source: Path, target: Path) -> None:
        inode = self._inode(source)
        del self.entries[source]
        self.entries[target] = inode
        self.log.append(Operation("rename", source, target, inode))

    def link(self, source: Path, target: Path) -> None:
        if not self.hard_links:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(target))
        if target in self.entries:
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        self.entries[target] = self._inode(source)
        self.log.append(Operation("link", source, target, self.entries[target]))

    def clone(self, source: int, target: int) -> None:
        if not self.hard_links:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        self.write(target, memoryview(bytes(self.contents[self._descriptors[source]])))

    def unlink(self, path: Path) -> None:
        inode = self._inode(path)
        del self.entries[path]
        self.log.append(Operation("unlink", path, inode=inode))

    @contextlib.contextmanager
    def held(self, folder: Path) -> Iterator[int]:
        yield self._descriptor(-1, folder)

    def unlink_from(self, folder: int, name: str) -> None:
        self.unlink(self._paths[folder] / name)

    def sync_folder(self, folder: Path) -> None:
        self._sync(Operation("sync", folder))

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in self.entries if path.parent == folder)

    def identity(self, path: Path) -> Identity:
        inode = self._inode(path)
        return Identity(1, inode, len(self.contents[inode]), self._modified.get(inode, 0))

    def open(self, path: Path) -> BinaryIO:
        inode = self._inode(path)
        return _Reader(bytes(self.contents[inode]), self._descriptor(inode, path))

    def free_bytes(self, _folder: Path) -> int:
        return 10**12

    def _sync(self, operation: Operation) -> None:
        if self.syncs(operation):
            self.log.append(operation)

    def _is_folder(self, path: Path) -> bool:
        """Folders that files are in need not be made."""
        return path in self.folders or any(path in one.parents for one in self.entries)

    def _inode(self, path: Path) -> int:
        if path not in self.entries:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return self.entries[path]

    def _descriptor(self, inode: int, path: Path) -> int:
        descriptor = next(self._numbers)
        self._descriptors[descriptor], self._paths[descriptor] = inode, path
        return descriptor


class _Reader(io.BytesIO):
    def __init__(self, content: bytes, descriptor: int) -> None:
        super().__init__(content)
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


@dataclass
class _Durable:
    """What is on the disk for sure, and what may be."""

    entries: dict[Path, int]
    contents: dict[int, bytes]
    changes: dict[Path, list[Operation]] = field(default_factory=dict)
    """Unsynced changes of names, by folder."""
    writes: dict[int, list[Operation]] = field(default_factory=dict)
    """Unsynced writes, by file."""
    folders: set[Path] = field(default_factory=set)
    """All that were made."""

    def take(self, operation: Operation) -> None:
        if operation.kind == "write":
            self.writes.setdefault(operation.inode, []).append(operation)
        elif operation.kind == "fsync":
            done = self.writes.pop(operation.inode, [])
            self.contents[operation.inode] = _written(self.contents.get(operation.inode, b""), done)
        elif operation.kind == "sync":
            for change in self.changes.pop(operation.path, []):
                _apply(self.entries, change)
        elif operation.kind != "mark":
            if operation.kind == "mkdir":
                self.folders.add(operation.path)
            self.changes.setdefault(operation.path.parent, []).append(operation)

    def states(self, rng: random.Random) -> Iterator[Files]:
        pending = [change for changes in self.changes.values() for change in changes]
        for chosen in _subsets(pending, rng):
            for order in (chosen, chosen[::-1]) if len(chosen) > 1 else (chosen,):
                entries = dict(self.entries)
                for change in order:
                    _apply(entries, change)
                yield from self._contents_of(self._within_folders(entries), rng)

    def _within_folders(self, entries: dict[Path, int]) -> dict[Path, int]:
        """The files whose folders are all there."""
        lost = self.folders - entries.keys()
        return {path: inode for path, inode in entries.items() if inode != FOLDER and lost.isdisjoint(path.parents)}

    def _contents_of(self, entries: dict[Path, int], rng: random.Random) -> Iterator[Files]:
        unsynced = sorted({inode for inode in entries.values() if self.writes.get(inode)})
        # One file at a time is torn in each way, while the others have lost all or nothing.
        rest = [{inode: self._variants(inode, rng)[which] for inode in unsynced} for which in (0, -1)]
        choices = [{**others, inode: variant} for others in rest for inode in unsynced for variant in self._variants(inode, rng)]
        for choice in choices or [{}]:
            yield {path: choice.get(inode, self.contents.get(inode, b"")) for path, inode in entries.items()}

    def _variants(self, inode: int, rng: random.Random) -> list[bytes]:
        before, writes = self.contents.get(inode, b""), self.writes[inode]
        whole = _written(before, writes)
        blocks = range(0, len(whole), BLOCK)
        torn: dict[bytes, None] = {}
        for kept in _subsets(list(blocks), rng):
            content = b"".join(whole[b : b + BLOCK] if b in kept else bytes(len(whole[b : b + BLOCK])) for b in blocks)
            torn[content] = torn[content[: max(kept, default=-BLOCK) + BLOCK]] = None
        return [before, *torn, whole]


def states_now(disk: MemoryDisk, seed: int) -> Iterator[Files]:
    """Every state that a crash may leave now."""
    durable = _durable_at_first(disk)
    for operation in disk.log:
        durable.take(operation)
    return durable.states(random.Random(seed))


def _durable_at_first(disk: MemoryDisk) -> _Durable:
    entries, contents = disk.start
    return _Durable(dict(entries), dict(contents))


def crash_states(disk: MemoryDisk, seed: int = 0) -> Iterator[tuple[int, Files]]:
    """Every state that a crash may leave behind each prefix of the log: the length of the prefix, and the files."""
    rng = random.Random(seed)
    durable = _durable_at_first(disk)
    for length, operation in enumerate([Operation("mark"), *disk.log]):
        durable.take(operation)
        if operation.kind != "mark" or length == 0:
            for files in durable.states(rng):
                yield length, files


def _subsets(items: list[T], rng: random.Random) -> Iterator[list[T]]:
    if len(items) <= MOST_EXHAUSTIVE:
        for bits in itertools.product((False, True), repeat=len(items)):
            yield [item for item, bit in zip(items, bits, strict=True) if bit]
        return
    yield []
    yield items
    for _ in range(2**MOST_EXHAUSTIVE):
        yield [item for item in items if rng.random() < 0.5]


def _apply(entries: dict[Path, int], change: Operation) -> None:
    if change.kind in ("create", "mkdir"):
        entries[change.path] = change.inode
    elif change.kind == "unlink":
        entries.pop(change.path, None)
    else:
        if change.kind == "rename":
            entries.pop(change.path, None)
        entries[change.target] = change.inode


def _written(before: bytes, writes: list[Operation]) -> bytes:
    content = bytearray(before)
    for write in writes:
        content[len(content) :] = bytes(max(0, write.offset - len(content)))
        content[write.offset : write.offset + len(write.data)] = write.data
    return bytes(content)
