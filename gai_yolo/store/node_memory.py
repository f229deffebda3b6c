"""A run's folder in the memory-backed storage of a node, such as /dev/shm."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from gai_yolo.errors import Refusal
from gai_yolo.store.atomic import publish_text
from gai_yolo.store.lease import Lease
from gai_yolo.store.manifest import FOLDERS
from gai_yolo.store.store import Store

LOCK_PATIENCE = 5.0
"""Seconds to wait for a process of this node that is just ending."""


class NodeMemory:
    """One folder for each run and user of a node, with a lock and a fence like those of a run folder.

    Its content counts only as long as the run folder is that of the same run: a run that was deleted or started over must not
    come back from memory.

    Args:
        base: memory-backed storage.
        run: the run folder; need not exist.
    """

    def __init__(self, base: Path, run: Path) -> None:
        self._owner = base.expanduser() / f"gai-yolo-{os.getuid()}"
        absolute = str(run.absolute())
        self.path = self._owner / f"{run.name}-{hashlib.sha256(absolute.encode()).hexdigest()[:12]}"
        self._lease = Lease(self.path)
        self._run_id = self.path / "run_id"
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The checkpoints, for who has opened it."""
        assert self._store is not None, "open() first"
        return self._store

    def open(self, run_id: str, patience: float = LOCK_PATIENCE) -> None:
        """Become the process that keeps this node's state of a run; what another run has left there is removed.

        Args:
            patience: seconds to wait for another process that is just ending.

        Raises:
            Refusal: another process does, or the folder cannot be made or is somebody else's.
        """
        try:
            self._owner.mkdir(mode=0o700, exist_ok=True)
            if self._owner.lstat().st_uid != os.getuid() or self._owner.is_symlink():
                raise Refusal(f"{self._owner}: belongs to another user; set elastic.memory_folder to another place, or null the interval.")
            store = Store(self.path, self._lease.acquire(patience))
            if self.run_id() != run_id:
                self._clear()
            for folder in FOLDERS.values():
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            publish_text(self._run_id, run_id)
            store.sweep()
        except OSError as error:
            self._lease.release()
            raise Refusal(f"{error.filename or self.path}: cannot be used ({error.strerror}).") from None
        except Refusal:
            self._lease.release()
            raise
        self._store = store

    def run_id(self) -> str | None:
        """Whose state this is; None if there is none."""
        try:
            return self._run_id.read_text(errors="replace")
        except OSError:
            return None

    def remove(self) -> None:
        """Give the memory back: the run is finished, and on the disk."""
        with contextlib.suppress(OSError):
            self._clear()

    def release(self) -> None:
        """Let another process in."""
        self._lease.release()

    def _clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)
