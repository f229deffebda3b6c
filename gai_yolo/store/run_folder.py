"""The folder of a run: where things lie, who may write there."""

from __future__ import annotations

import time
from pathlib import Path

from gai_yolo.errors import Refusal, refused_by
from gai_yolo.store.atomic import publish_text
from gai_yolo.store.filesystem import REAL
from gai_yolo.store.lease import Lease
from gai_yolo.store.manifest import FOLDERS
from gai_yolo.store.run_record import RunRecord, encode, read_record
from gai_yolo.store.store import Store

FOLDER_LOCK_PATIENCE = 10.0
"""Seconds to wait for a job that is just ending."""


class LockedFolder:
    """A folder of checkpoints with a lock, a fence and a run record of its own."""

    def __init__(self, path: Path, record: str, old_record: str) -> None:
        self.path, self.record_path, self._old_path = path, path / record, path / old_record
        self._lease = Lease(path)
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The checkpoints, for who holds the lock."""
        assert self._store is not None, "to be locked first"
        return self._store

    def record(self) -> RunRecord | None:
        """What this folder knows of its run, whose state it holds; None for a new one. Raises as `read_record`."""
        return read_record(self.record_path, self._old_path)

    def release(self) -> None:
        """Let another process in."""
        self._lease.release()


class RunFolder(LockedFolder):
    """`experiments/<name>/` and its parts.

    Raises:
        Refusal: a folder above it may not be entered.
    """

    def __init__(self, path: Path) -> None:
        try:
            # One folder has one lock, whatever links lead to it.
            path = path.resolve() if path.is_symlink() else path
        except OSError as error:
            refusal = Refusal(f"{path}: cannot be reached ({error.strerror}); set another experiment.folder.")
            raise refused_by(error, refusal) from None
        super().__init__(path, ".run.json", ".run_id")
        self.checkpoints = path / FOLDERS["epoch"]
        self.snapshots = path / FOLDERS["step"]
        self.tensorboard = path / "tensorboard"
        self.predictions = path / "predictions"
        self.pictures = path / "pictures"
        self.ledger = path / "ledger"
        self.metrics = self.checkpoints / "training_metrics.json"
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.training_set = path / ".training_set.index"
        self.goodput = path / "goodput"
        self._marker = path / ".fresh"

    def lock(self) -> None:
        """Become the only job that writes here, until the process ends; raises as `Lease.acquire`."""
        self._store = Store(self.path, self._lease.acquire(FOLDER_LOCK_PATIENCE))

    def move_aside(self) -> Path | None:
        """Rename the folder of an old run, with everything in it; returns where it is now, or None if there was none.

        Raises:
            Refusal: the file system does not allow it (a mount point, say).
        """
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.name}.{stamp}-{number}")
        try:
            REAL.rename(self.path, target)
        except OSError as error:
            refusal = Refusal(f"{self.path}: cannot be moved aside ({error.strerror}); set another experiment.name.")
            raise refused_by(error, refusal) from None
        return target

    def started_over_by(self) -> str | None:
        """The job that started this run with `--fresh`, or None.

        Raises:
            Refusal: it cannot be read: to take that for "no job" would let the run start over once more.
        """
        try:
            return self._marker.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise refused_by(error, Refusal(f"{self._marker}: cannot be read ({error.strerror}); make it readable.")) from None

    def mark_started_over(self, job: str) -> None:
        """Remember which job started this run with `--fresh`."""
        publish_text(self._marker, job)

    def set_record(self, record: RunRecord) -> None:
        """Remember it; durable on return. Raises `OSError`."""
        REAL.make_folder(self.path)
        publish_text(self.record_path, encode(record))

    def make(self) -> None:
        """Create the folders. Raises `Refusal` if a file is in the way or the disk refuses."""
        try:
            for folder in (self.path, self.checkpoints, self.snapshots, self.tensorboard, self.predictions):
                REAL.make_folder(folder)
        except OSError as error:
            refusal = Refusal(f"{error.filename}: cannot be created ({error.strerror}); set experiment.folder to another place.")
            raise refused_by(error, refusal) from None
