"""States that are not to be gone on from any more, moved to where nobody looks for them; none is ever deleted here."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from gai_yolo.store.atomic import publish
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import REAL, FileSystem
from gai_yolo.store.manifest import FOLDERS, Kind, Position

ASIDE = "aside"
"""In a run folder: what was moved aside, a folder each time, laid out like a run folder."""


def free_name(folder: Path, name: str) -> Path:
    """A path in a folder that nothing has, after a name and the time; of two nodes at the same moment, each gets its own."""
    return folder / f"{name}{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"


def names_beyond(run: Path, position: Position | None, fs: FileSystem = REAL) -> list[tuple[Kind, str]]:
    """Kinds and stems of what lies under the names of checkpoints newer than a position, or of all; damaged ones too. Raises as
    `Catalogue.listing`."""
    found: list[tuple[Kind, str]] = []
    for kind in FOLDERS:
        limit = -1 if position is None else position.epoch if kind == "epoch" else position.step
        found += [(kind, stem) for stem in Catalogue(run, fs).stems(kind) if int(stem.partition("_")[2]) > limit]
    return found


def move_beyond(run: Path, position: Position, target: Path, fs: FileSystem = REAL) -> list[str]:
    """Move what is newer than a position into a folder of the same file system.

    A checkpoint is complete in its new place before it is none in the old one any more, so whatever breaks this off loses nothing; it
    may be done again.

    Returns:
        Names relative to `run`.

    Raises:
        OSError: the disk refuses.
        CheckpointError: as `Catalogue.listing`.
    """
    moved = []
    for kind, stem in sorted(names_beyond(run, position, fs), reverse=True):
        here, there = run / FOLDERS[kind], target / FOLDERS[kind]
        fs.make_folder(there)
        data, manifest = f"{stem}.pt", f"{stem}.json"
        names = fs.names(here)
        if manifest in names:
            content = fs.content(here / manifest)
            publish(there / manifest, lambda file, content=content: file.write(content), fs)  # type: ignore[misc]
        if data in names:
            fs.rename(here / data, there / data)
            fs.sync_folder(there)
            fs.sync_folder(here)  # or a crash might keep the data here, and not the manifest
            moved.append(f"{FOLDERS[kind]}/{data}")
        if manifest in names:
            fs.unlink(here / manifest)
        fs.sync_folder(here)
    return moved


def bring(source: Path, target: Path, fs: FileSystem = REAL) -> None:
    """Copy a folder of states to a disk, every file of it complete there or absent, then let the source go. Raises `OSError`."""
    # Data before manifests, as everywhere.
    for path in sorted((path for path in source.glob("*/*") if path.is_file()), key=lambda path: path.suffix == ".json"):
        there = target / path.relative_to(source)
        if there.exists() and there.stat().st_size == path.stat().st_size:
            continue
        fs.make_folder(there.parent)
        with fs.open(path) as file:
            publish(there, lambda temp, file=file: shutil.copyfileobj(file, temp, 8 << 20), fs)  # type: ignore[misc]
    shutil.rmtree(source)
