"""What images are called in a new data set: as before, below their split's folder, unless a format cannot have that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from gai_yolo.data.formats.check import SPLIT_NAMES, Problems, Split
from gai_yolo.data.formats.folders import IMAGE_SUFFIXES, plain_name
from gai_yolo.data.index import Index

SAME_NAME = "image with the name of another"
HARD_NAME = "image whose name not every reader takes"
IMAGE_FOLDERS = frozenset({"images", "JPEGImages"})
SETS_OF_IMAGES = frozenset({"100k", "10k"})
"""Of BDD100K, below `images`."""
SUFFIX_OF = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "DIB": ".dib", "WEBP": ".webp", "TIFF": ".tif", "PPM": ".ppm"}


def names_in(index: Index, root: Path, split: Split) -> list[str]:
    """Names of a split's images below the folder of its images, with `/`: the same whatever format the data set has.

    Args:
        root: folder of the data set; of images elsewhere what they have in common is left out.
    """
    paths = [Path(os.path.normpath(path)) for path in index.images.paths()]
    base = Path(os.path.normpath(root))
    strangers = {path.parent for path in paths if not path.is_relative_to(base)}
    common = Path(os.path.commonpath(strangers)) if strangers else base
    kinds = (IMAGE_FOLDERS, SETS_OF_IMAGES, frozenset(one for name in SPLIT_NAMES[split] for one in (name, f"{name}2017")))
    return [_inside(path.relative_to(base if path.is_relative_to(base) else common), kinds) for path in paths]


def _inside(path: Path, kinds: Sequence[frozenset[str]]) -> str:
    folders, left = list(path.parts[:-1]), list(kinds)
    while folders and (kind := next((one for one in left if folders[0] in one), None)) is not None:
        left.remove(kind)
        folders.pop(0)
    return "/".join((*folders, path.name))


def usable_names(names: Sequence[str], index: Index, by_stem: bool, problems: Problems) -> list[str]:
    """The names under which images are written; each other one is told.

    Args:
        names: of the images of `index`.
        by_stem: labels are files of the images' names with another suffix, so that two images may not differ in it alone.
    """
    written: list[str] = []
    taken: set[str] = set()
    for position, name in enumerate(names):
        soft = "/".join(_softened(part) for part in name.split("/"))
        if PurePosixPath(soft).suffix.lower() not in IMAGE_SUFFIXES:
            soft += _true_suffix(index.images[position].path)
        if soft != name:
            problems.add(HARD_NAME, f"{name}: {soft}", "renamed", index.images[position].path)
        free = _free(soft, taken, by_stem)
        if free != soft:
            problems.add(SAME_NAME, f"{index.images[position].path}: {free}", "renamed", index.images[position].path)
        taken.add(_key(free, by_stem))
        written.append(free)
    return written


def _softened(part: str) -> str:
    """A name without what is hidden, cannot be printed, or is cut off or taken for something else by a reader."""
    soft = "".join(letter if letter.isprintable() and letter != "\\" else "_" for letter in part)
    for start in (".", " ", "__MACOSX"):
        if soft.startswith(start):
            soft = f"_{soft[1:]}"
    return f"{soft[:-1]}_" if soft.endswith((" ", ":")) else soft


def _free(name: str, taken: set[str], by_stem: bool) -> str:
    path, number, free = PurePosixPath(name), 1, name
    while _key(free, by_stem) in taken:
        number += 1
        free = str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
    return free


def _key(name: str, by_stem: bool) -> str:
    return plain_name(str(PurePosixPath(name).with_suffix("")) if by_stem else name)


def _true_suffix(path: Path) -> str:
    """By what the file holds: programs that look for images go by suffixes."""
    try:
        with Image.open(path) as image:
            return SUFFIX_OF.get(image.format or "", ".jpg")
    except (OSError, ValueError, SyntaxError):
        return ".jpg"
