"""The checkpoints of a run: published and pruned, by whoever holds its fence.

Invariants (docs/storage.md):
- A checkpoint is a data file with a manifest beside it. The manifest gets its name last and loses it first.
- A complete checkpoint is never overwritten.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from gai_yolo.store.atomic import TempFile, hash_file, is_temporary, owner_of, write_temp_file
from gai_yolo.store.catalogue import NAMES, NO_MANIFEST, Catalogue
from gai_yolo.store.filesystem import REAL, FileSystem, Identity
from gai_yolo.store.lease import Fence
from gai_yolo.store.manifest import FOLDERS, Manifest, encode
from gai_yolo.store.retention import Decision, Policy


class Store(Catalogue):
    """The checkpoints under one run folder, for writing as long as nobody has raised the fence since."""

    def __init__(self, run: Path, fence: Fence, fs: FileSystem = REAL) -> None:
        super().__init__(run, fs)
        self.fence = fence
        self._placed: dict[Path, Identity] = {}
        self._half_removed: list[Path] = []

    def publish(self, manifest: Manifest, write: Callable[[BinaryIO], object]) -> tuple[Manifest, list[str]]:
        """Make a checkpoint; after return it survives a crash of the machine. Returns the manifest, with size and digest filled in, and
        notes for people about what stood in the way.

        Raises:
            OSError: the disk refuses; whatever was complete is still there, and trying again is right.
            RunFolderBusy: another job has taken the run over.
        """
        data, manifest_path = self.data_path(manifest), self.manifest_path(manifest)
        there = self._complete_at(manifest)
        if there is not None:
            # Left by a try whose last fsync failed, or by a start that could not read it for a while.
            self.fs.sync_folder(data.parent)
            return there, [f"{data} is complete already and stays as it is"]
        with write_temp_file(data, write, self.fence.owner, self.fs) as temp:
            manifest = replace(manifest, size=temp.size, sha256=temp.sha256, fence=self.fence.number)
            with self._draft(manifest_path, encode(manifest)) as manifest_temp:
                notes = self._place(temp, data)
                self._place(manifest_temp, manifest_path)
        self._verified[data] = (self.fs.identity(data), manifest.sha256)
        return manifest, notes

    def adopt(self, manifest: Manifest) -> Manifest:
        """Give a data file that lies there without a manifest the one it lacks; size and digest are filled in here. Whoever
        calls this has made sure that the file holds what the manifest says; raises as `publish`."""
        data, manifest_path = self.data_path(manifest), self.manifest_path(manifest)
        with self.fs.open(data) as file:
            manifest = replace(manifest, size=self.fs.identity(data).size, sha256=hash_file(file), fence=self.fence.number)
            # Whoever copied it here may have synced neither its content nor its name.
            self.fs.fsync(file.fileno())
        self.fs.sync_folder(data.parent)
        with self._draft(manifest_path, encode(manifest)) as temp:
            self._place(temp, manifest_path)
        return manifest

    def publish_text(self, path: Path, text: str, is_synced: bool = True) -> None:
        """Publish another file of the run, such as its metrics, under its fence; if not synced, a crash may take it back. Raises as
        `publish`."""
        with self._draft(path, text.encode()) as temp:
            self.replace(temp, path)
        if is_synced:
            self.fs.sync_folder(path.parent)

    def replace(self, temp: TempFile, path: Path) -> None:
        """Give a draft its name under the fence, over what is there. Not synced: for what a crash may take back."""
        self.fence.check(self.fs)
        self.fs.rename(temp.path, path)

    def _draft(self, path: Path, content: bytes) -> TempFile:
        return write_temp_file(path, lambda file: file.write(content), self.fence.owner, self.fs)

    def keep_aside(self, path: Path) -> Path | None:
        """Give what lies under a name that is about to be given another one too, which is returned; None if there is nothing, or only
        our own failed try, or if it has one already.

        Not by rename: that of a writer which was stopped here, and replaced, would take its successor's checkpoint away. The rename of the
        draft over the old name is fenced, so a link is enough."""
        if self.fs.seen(path) in (None, self._placed.get(path)):
            return None
        taken, number = set(self.fs.names(path.parent)), 1
        while (aside := path.with_name(f"{path.name}.aside-{number}")).name in taken:
            if self.is_same_file(path, aside):
                return None
            number += 1
        try:
            self.fs.link(path, aside)
        except OSError:
            self.fence.check(self.fs)
            self.fs.rename(path, aside)  # no hard links here
        return aside

    def _place(self, temp: TempFile, path: Path) -> list[str]:
        """Give a draft its name. A file that lies there and is not our own is kept under another name."""
        self.fence.check(self.fs)
        notes = []
        if path.suffix == ".pt" and (aside := self.keep_aside(path)) is not None:
            notes.append(f"{path} was there, but not complete; it is now {aside.name}")
        try:
            self.fs.rename(temp.path, path)
        except IsADirectoryError:
            self.fs.rename(path, path.with_name(f"{path.name}.aside-{os.urandom(3).hex()}"))
            self.fs.rename(temp.path, path)
        self._placed[path] = self.fs.identity(path)
        self.fs.sync_folder(path.parent)
        return notes

    def _complete_at(self, manifest: Manifest) -> Manifest | None:
        if manifest.stem not in self.stems(manifest.kind):
            return None
        there = self.look_at(manifest.kind, self.data_path(manifest))
        return there if isinstance(there, Manifest) and self.defect_of(there) is None else None

    def is_same_file(self, one: Path, other: Path) -> bool:
        """Whether two names lead to one file; not if there is nothing."""
        identity = self.fs.seen(one)
        return identity is not None and identity == self.fs.seen(other)

    def sweep(self) -> list[Path]:
        """Remove what dead writers have left: drafts of other fences, and data of snapshots that never got a manifest and
        are not newer than the newest complete one. To be called at the start, after the fence was raised and before anything
        is read: only then is nothing that was under way able to get a name any more. Returns what was removed; raises as `listing` and
        `publish`."""
        self.fence.check(self.fs)
        removed: list[Path] = []
        for left_behind in (self._foreign_drafts, self._useless_data):
            for path in left_behind():
                with contextlib.suppress(FileNotFoundError):  # NFS says so of a call that it has sent twice
                    self.fs.unlink(path)
                removed.append(path)
        return removed

    def _foreign_drafts(self) -> Sequence[Path]:
        drafts = []
        for folder in [self.run / name for name in FOLDERS.values()] + [self.run]:
            with contextlib.suppress(FileNotFoundError):
                names = self.fs.names(folder)
                drafts += [folder / name for name in names if is_temporary(name) and owner_of(name) != self.fence.owner]
        return drafts

    def _useless_data(self) -> Sequence[Path]:
        listing = self.listing()
        orphans = [defect.path for defect in listing.defects if defect.reason == NO_MANIFEST and NAMES["step"].fullmatch(defect.path.name)]
        if not orphans:
            return []
        newest = next((manifest.position.step for manifest in listing.present if self.defect_of(manifest) is None), -1)
        return [path for path in orphans if int(path.stem.removeprefix("step_")) <= newest]

    def prune(self, policy: Policy) -> list[Decision]:
        """Remove what retention lets go, manifests first; returns what was removed, raises as `publish`."""
        going = [decision for decision in self.plan_pruning(policy) if not decision.keep]
        for decision in going:
            self._remove(self.manifest_path(decision.manifest))
            self._half_removed.append(self.data_path(decision.manifest))
        # Otherwise a crash could keep a manifest and lose its data, and look like a damaged checkpoint.
        for folder in sorted({data.parent for data in self._half_removed}):
            self.fs.sync_folder(folder)
        while self._half_removed:
            self._remove(self._half_removed[0])
            self._verified.pop(self._half_removed.pop(0), None)
        return going

    def _remove(self, path: Path) -> None:
        """Take a name away, if it is there. The folder is held before the fence is read: should a `--fresh` start move it aside
        in between, and make another under its name, nothing is taken from that one."""
        with self.fs.held(path.parent) as folder:
            self.fence.check(self.fs)
            with contextlib.suppress(FileNotFoundError):
                self.fs.unlink_from(folder, path.name)
