"""A run's folder in the memory-backed storage of a node, such as /dev/shm."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gai_yolo.errors import CheckpointError, Refusal, refused_by
from gai_yolo.machine import available_memory
from gai_yolo.store.aside import free_name, move_beyond, names_beyond
from gai_yolo.store.atomic import publish_text
from gai_yolo.store.filesystem import REAL
from gai_yolo.store.manifest import FOLDERS, Position
from gai_yolo.store.run_folder import LockedFolder
from gai_yolo.store.run_record import RecordError, RunRecord, encode
from gai_yolo.store.store import Store

MEMORY_LOCK_PATIENCE = 5.0
"""Seconds to wait for a process of this node that is just ending."""
AGAIN = "set elastic.memory_folder to another place, or null the interval."


def free_memory(store: Store) -> int:
    """Bytes that fit into a store in memory: what the folder's file system has room for, and what the machine or its container may
    still take."""
    return min(store.fs.free_bytes(store.run), available_memory())


class NodeMemory(LockedFolder):
    """One folder for each run and user of a node, with a lock, a fence and a run record like those of a run folder.

    Which run its content counts for is decided by who opens it (`membership.decision`): a run that was deleted or started over must not
    come back from memory.

    Args:
        base: memory-backed storage.
        run: the run folder; need not exist.
    """

    def __init__(self, base: Path, run: Path) -> None:
        self._owner = base.expanduser() / f"gai-yolo-{os.getuid()}"
        absolute = str(run.absolute())
        path = self._owner / f"{run.name}-{hashlib.sha256(absolute.encode()).hexdigest()[:12]}"
        super().__init__(path, "run.json", "run_id")
        self._aside_prefix = f"{self.path.name}.aside-"

    def open(self, patience: float | None = None) -> None:
        """Become the process that keeps this node's state of a run, waiting so many seconds (None: `MEMORY_LOCK_PATIENCE`) for one that is
        just ending. What is left of a removal that was interrupted is removed.

        Raises:
            Refusal: another process does, or the folder cannot be used or is somebody else's.
        """
        try:
            self._owner.mkdir(mode=0o700, exist_ok=True)
            if self._owner.lstat().st_uid != os.getuid() or self._owner.is_symlink():
                raise Refusal(f"{self._owner}: belongs to another user; {AGAIN}")
            store = Store(self.path, self._lease.acquire(MEMORY_LOCK_PATIENCE if patience is None else patience))
            if not self.record_path.exists() and not self._old_path.exists():
                self._clear()
        except OSError as error:
            self._lease.release()
            raise refused_by(error, Refusal(f"{error.filename or self.path}: cannot be used ({error.strerror}).")) from None
        self._store = store

    def keep(self, record: RunRecord) -> None:
        """From now on this is the memory of a run; raises as `Store.sweep`."""
        for folder in FOLDERS.values():
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        try:
            known = self.record()
        except (RecordError, CheckpointError):
            known = None
        if known != record:
            publish_text(self.record_path, encode(record))
        self.store.sweep()

    def set_aside(self, beyond: Position | None = None) -> Path | None:
        """Move the states that are newer than a position, or all there is, to another name in memory. Returns where they are now, None if
        there were none; raises as `move_beyond`."""
        target = free_name(self._owner, self._aside_prefix)
        if beyond is not None:
            return target if move_beyond(self.path, beyond, target) else None
        if not self.path.exists():
            return None
        if not names_beyond(self.path, None):
            self._clear()
            return None
        REAL.rename(self.path, target)
        return target

    def asides(self) -> Sequence[Path]:
        """Where states are that were moved aside, and are still in memory."""
        return sorted(self._owner.glob(f"{self._aside_prefix}*"))

    def remove(self) -> None:
        """Give the memory back: the run is finished, and on the disk."""
        with contextlib.suppress(OSError):
            self._clear()

    def _clear(self) -> None:
        for path in (self.record_path, self._old_path):
            path.unlink(missing_ok=True)  # first, so that what an interruption leaves is known for what it is
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)
