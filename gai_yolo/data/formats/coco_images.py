"""Where the images of a COCO json lie, and what else lies there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gai_yolo.data.formats.check import SPLIT_NAMES, Split, expand
from gai_yolo.data.formats.folders import Folders, is_picture
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

_PROBED_NAMES = 20
"""So many file names decide which of the usual image folders is meant."""


def image_folder(names: list[str], root: Path, place: SplitConfig, split: Split, source: Path, folders: Folders) -> Path:
    """The folder that the file names of a split are relative to: of the usual ones that which holds the most of some of them.

    Raises:
        DataError: the configured one is not there, or none of the usual ones is.
    """
    if place.images is not None:
        folder = root / expand(place.images)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; correct data.{split}.images (relative to data.path).")
        return folder
    candidates = [folder for folder in _usual_folders(root, split, source) if folder.is_dir()]
    if not candidates:
        usual = ", ".join(str(folder.relative_to(root)) for folder in _usual_folders(root, split, source))
        raise DataError(f"{root}: found no image folder of the {split} split (looked for {usual}); set data.{split}.images.")
    probed = names[:_PROBED_NAMES]
    return max(candidates, key=lambda folder: sum(_holds(folder, name, folders) for name in probed))


def _holds(folder: Path, name: str, folders: Folders) -> bool:
    try:
        return folders.holds(folders.path_inside(folder, name, ""))
    except DataError:  # it leads out of this folder
        return False


def _usual_folders(root: Path, split: Split, source: Path) -> list[Path]:
    suffix = source.stem.removeprefix("instances_")
    names = [*SPLIT_NAMES[split], f"{split}2017"] if source.stem.startswith("_") else [suffix, *SPLIT_NAMES[split], f"{split}2017"]
    usual = [root / base / name for name in names for base in ("images", ".")] + [root / "images"]
    if source.is_relative_to(root):
        usual.append(source.parent)
    return list(dict.fromkeys(usual))


def is_of_one_split(folder: Path, root: Path, config: DataConfig, split: Split, source: Path) -> bool:
    """Whether the other split's images lie elsewhere, as far as the names of folders say."""
    place, other = (config.train, config.val) if split == "train" else (config.val, config.train)
    if place.images is None:
        return folder in _usual_folders(root, split, source) and folder not in (root, root / "images", root / "annotations")
    if other.images is None:
        return False
    theirs = root / expand(other.images)
    return not folder.is_relative_to(theirs) and not theirs.is_relative_to(folder)


def unnamed(named: Sequence[Path], folder: Path, folders: Folders) -> Iterator[Path]:
    """Pictures in the image folder, and in the folders of named ones, that are none of these. Folders that hold no named image are not
    looked at: nobody has asked for what is in them, and they may be huge."""
    names: dict[Path, set[str]] = {folders.real(folder / "x").parent: set()}
    for path in named:
        real = folders.real(path)
        names.setdefault(real.parent, set()).add(real.name)
    for parent in sorted(names):
        for name in sorted(folders.names(parent) - names[parent]):
            if is_picture(name):
                yield parent / name
