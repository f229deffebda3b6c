"""What is checked while a data set is read, the same for every annotation format.

A reader turns its files into `RawImage`s and `build_index` does the rest: finds missing and unreadable images, takes the
real image sizes, clips boxes and leaves out impossible ones. Everything that was mended or left out is counted in
`Problems`; only what makes the data set useless is refused.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.header import SIDES_CHANGE, Header, image_size
from gai_yolo.data.index import Category, ImageRecord, Index, Problem, Records, Sighting, make_record
from gai_yolo.errors import DataError
from gai_yolo.machine import available_cores

Split = Literal["train", "val", "test"]
"""A training knows the first two; where one is read by `test`, its places in the configuration are those of `val`."""
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What folders and files of a split are called, the most usual name first (Roboflow writes `valid`)."""
MIN_SIDE = 1e-3
"""Pixels; a shorter side is what remains of a mis-click or of rounded fractions, and IoU with it is noise."""
CLIP_TOLERANCE = 0.5
"""Pixels; written decimals are rounded, so less than this beyond the border is clipped without being counted."""
MOST_SIGHTINGS = 12
"""Records of one kind of problem that are kept to be looked at."""

MISSING = "image file missing"
OTHER_SIZE = "image size differs from the annotation"
TURNED = "image that its EXIF data turns"
OUTSIDE = "box outside the image"
DEGENERATE = "box without area"
NOT_FINITE = "box with a number that is not finite"
UNKNOWN_CLASS = "box of an unknown class"
SAME_BOX = "box that is there twice"
SAME_IMAGE = "image that is named twice"
NO_OBJECTS_AREA = "area that no object in the image can have"
NOT_NAMED = "image that no annotation names"
AS_STORED = "not turned, as its annotated size wants it"
"""What is done with a `TURNED` image whose boxes refer to the pixels as stored."""


class RawBox(NamedTuple):
    """A box as an annotation file gives it, not yet checked."""

    corners: tuple[float, float, float, float]
    """xyxy, in pixels or, if the image says so, in fractions of its sides."""
    position: int
    """Position of its class in the categories."""
    record: int | str
    """Number of the annotation, line or object, for messages."""
    crowd: bool = False
    area: float | None = None
    """Pixels^2 as annotated; None takes the box's own."""
    outline: tuple[float, ...] = ()
    """Of which it is the bounding box, if it is: other outlines may have the same."""


@dataclass(slots=True)
class RawImage:
    """An image as an annotation file gives it, not yet checked."""

    image_id: int
    path: Path
    where: str
    """What a box's record number is appended to in messages: `train.json, annotation`."""
    boxes: list[RawBox] = field(default_factory=list)
    size: tuple[float, float] | None = None
    """Width and height as annotated, if they are."""
    fractions: bool = False
    """The corners are fractions of the sides (YOLO)."""


class Problems:
    """Counts what is wrong in a split, by kind, and keeps the first example of each; of those about an image, the first few."""

    def __init__(self) -> None:
        self._counts = Counter[tuple[str, str]]()
        self._examples: dict[tuple[str, str], str] = {}
        self._seen: defaultdict[tuple[str, str], list[Sighting]] = defaultdict(list)
        self.num_bad_images = 0
        self.first_bad = ""

    def add(
        self, kind: str, example: str, action: str, path: Path | None = None, corners: tuple[float, ...] = (), fractions: bool = False
    ) -> None:
        """Count one; `example` is kept if it is the first of its kind. What it is about: image and box, as of a `Sighting`."""
        self._counts[kind, action] += 1
        self._examples.setdefault((kind, action), example)
        seen = self._seen[kind, action]
        if path is not None and len(seen) < MOST_SIGHTINGS:
            seen.append(Sighting(example, path, corners, fractions))

    def add_many(self, kind: str, count: int, example: str, action: str) -> None:
        """Count several at once; nothing if there are none."""
        if count:
            self._counts[kind, action] += count
            self._examples.setdefault((kind, action), example)

    def add_box(self, kind: str, image: RawImage, box: RawBox, action: str) -> None:
        """Count one about a box."""
        self.add(kind, f"{image.where} {box.record}", action, image.path, box.corners, image.fractions)

    def add_bad_image(self, kind: str, example: str, path: Path | None = None) -> None:
        """Count one image that cannot be used; these are held against `max_bad_fraction`."""
        self.add(kind, example, "image skipped", path)
        self.num_bad_images += 1
        self.first_bad = self.first_bad or f"{kind}: {example}"

    def freeze(self) -> tuple[Problem, ...]:
        """All kinds, in the order in which they were first seen."""
        return tuple(
            Problem(kind, count, self._examples[kind, action], action, tuple(self._seen.get((kind, action), ())))
            for (kind, action), count in self._counts.items()
        )


def build_index(
    source: str, categories: Sequence[Category], images: Sequence[RawImage], problems: Problems, max_bad_fraction: float, folders: Folders
) -> Index:
    """Check every image and box and build the index, in the order of `images`.

    Raises:
        DataError: there are no images, or more than `max_bad_fraction` of them are missing or unreadable (those that
            the reader has already counted in `problems` included).
    """
    total = len(images) + problems.num_bad_images
    if total == 0:
        raise DataError(f"{source}: the split has no images; check data.path and the split's annotations and images.")
    images = _each_once(images, folders, problems)
    present = [image for image in images if folders.holds(image.path)]
    for image in images:
        if not folders.holds(image.path):
            problems.add_bad_image(MISSING, str(image.path), image.path)
    # Opening a header is waiting for the disk or the network, hence more threads than cores.
    with ThreadPoolExecutor(max_workers=min(32, 4 * available_cores())) as pool:
        sizes = list(pool.map(lambda image: image_size(image.path, folders.doubt), present))
    for image, size in zip(present, sizes, strict=True):
        if isinstance(size, str):
            problems.add_bad_image(size, str(image.path), image.path)
    bad = problems.num_bad_images
    if bad > max_bad_fraction * total or bad == total:
        raise DataError(
            f"{source}: {bad} of {total} images are missing or unreadable, more than data.max_bad_fraction = {max_bad_fraction:g} allows "
            f"({problems.first_bad}); restore the files or correct data.path."
        )
    records = [_checked(image, size, problems) for image, size in zip(present, sizes, strict=True) if not isinstance(size, str)]
    return Index(source, tuple(categories), Records.of(records), problems.freeze())


def _as_seen(image: RawImage, header: Header, problems: Problems) -> Header:
    """What the annotator saw: the annotated size tells, if it can; else the image upright, as every viewer shows it."""
    width, height, orientation = header
    if orientation == 1:
        return header
    changes, told = orientation >= SIDES_CHANGE, image.size
    if changes and told is not None and told[0] != told[1] and width != height and (told[0] > told[1]) == (width > height):
        problems.add(TURNED, str(image.path), AS_STORED, image.path)
        return Header(width, height)
    problems.add(TURNED, str(image.path), "turned upright, which its boxes refer to", image.path)
    return Header(height, width, orientation) if changes else header


def _each_once(images: Sequence[RawImage], folders: Folders, problems: Problems) -> list[RawImage]:
    """One image for each file, with the boxes of all its names."""
    found: dict[Path, RawImage] = {}
    for image in images:
        first = found.setdefault(folders.real(image.path), image)
        if first is not image:
            example = f"{image.path} (image {image.image_id}, and image {first.image_id})"
            problems.add(SAME_IMAGE, example, "counted once, with the boxes of both", image.path)
            first.boxes += image.boxes
    return list(found.values())


def _checked(image: RawImage, header: Header, problems: Problems) -> ImageRecord:
    width, height, orientation = _as_seen(image, header, problems)
    if image.size is not None and image.size != (width, height):
        example = f"{image.path}: {image.size[0]:g} x {image.size[1]:g}, really {width} x {height}"
        problems.add(OTHER_SIZE, example, "real size used", image.path)
    kept: list[RawBox] = []
    corners: list[list[float]] = []
    seen: set[RawBox] = set()
    for box in image.boxes:
        same = box._replace(record="")
        if same in seen:
            problems.add_box(SAME_BOX, image, box, "counted once")
        elif (clipped := _clipped(box, width, height, image, problems)) is not None:
            seen.add(same)
            kept.append(box)
            corners.append(clipped)
    classes, crowd = [box.position for box in kept], [box.crowd for box in kept]
    areas = [_area(box, clipped, width * height, image, problems) for box, clipped in zip(kept, corners, strict=True)]
    return make_record(image.image_id, image.path, width, height, corners, classes, crowd, areas, orientation)


def _area(box: RawBox, corners: list[float], most: float, image: RawImage, problems: Problems) -> float:
    if box.area is not None:
        if 0.0 < box.area <= most:
            return box.area
        problems.add_box(NO_OBJECTS_AREA, image, box, "that of its box taken")
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def _clipped(box: RawBox, width: int, height: int, image: RawImage, problems: Problems) -> list[float] | None:
    """The corners in pixels, within the image; None if nothing is left of the box."""
    limits = (width, height, width, height)
    corners = [value * limit if image.fractions else value for value, limit in zip(box.corners, limits, strict=True)]
    if not all(map(math.isfinite, corners)):
        problems.add_box(NOT_FINITE, image, box, "skipped")
        return None
    clipped = [float(np.float32(min(max(value, 0.0), limit))) for value, limit in zip(corners, limits, strict=True)]
    if clipped[2] - clipped[0] <= MIN_SIDE or clipped[3] - clipped[1] <= MIN_SIDE:
        problems.add_box(DEGENERATE, image, box, "skipped")
        return None
    if max(abs(a - b) for a, b in zip(corners, clipped, strict=True)) > CLIP_TOLERANCE:
        problems.add_box(OUTSIDE, image, box, "clipped")
    return clipped
