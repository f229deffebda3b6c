"""The one index every annotation format is read into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Category:
    """A class: `id` as the annotation file numbers it (COCO's are sparse), `name` as it is shown."""

    id: int
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One image and its boxes."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: NDArray[np.float32]
    """(N, 4) xyxy in pixels of the image as its annotator saw it."""
    classes: NDArray[np.int64]
    """(N,) positions in `Index.categories`."""
    crowd: NDArray[np.bool_]
    """(N,) True for regions that stand for many objects: ignored in training, matched specially in evaluation."""
    areas: NDArray[np.float32]
    """(N,) object area in pixels^2 as annotated (a mask's area where there is one); COCO's size classes use it."""
    orientation: int = 1
    """How the stored pixels are to be turned (EXIF's numbers, 1 to 8) before they are what width, height and boxes refer to."""


@dataclass(frozen=True)
class Sighting:
    """One record in which something is wrong, for whoever wants to see it."""

    record: str
    """File and annotation id or line."""
    path: Path
    """Of the image; there may be no such file."""
    corners: tuple[float, ...] = ()
    """xyxy of the box as it was found, if it is about one: in pixels or fractions, in the image or not, finite or not."""
    fractions: bool = False
    """Whether the corners are fractions of the image's sides."""


@dataclass(frozen=True)
class Problem:
    """Something wrong in a data set that did not stop it from being read."""

    kind: str
    """What is wrong, in plain words: `image file missing`, `box outside the image`, ..."""
    count: int
    example: str
    """The first record it was seen in: file and annotation id or line."""
    action: str
    """What was done: `clipped`, `skipped`, ..."""
    sightings: tuple[Sighting, ...] = field(default=(), compare=False, repr=False)
    """The first few, of those that are about an image; a cache of the index does not keep them."""


@dataclass(frozen=True)
class Index:
    """A split of a data set: every image that can be trained or evaluated on, in a stable order."""

    source: str
    """Where it was read from, for messages."""
    categories: tuple[Category, ...]
    images: tuple[ImageRecord, ...]
    problems: tuple[Problem, ...] = field(default=())
    content: str = ""
    """What the image files hold (`content.content_digest`); not kept in a cache of the index, because each start looks anew."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the network's outputs."""
        return [category.name for category in self.categories]

    def digest(self) -> str:
        """SHA-256 over classes, file names, sizes of images in pixels, and boxes: equal for equal data, wherever the folder lies."""
        hasher = hashlib.sha256(repr([(c.id, c.name) for c in self.categories]).encode())
        for image in self.images:
            hasher.update(f"{image.image_id} {image.path.name} {image.width}x{image.height}".encode(errors="surrogateescape"))
            if image.orientation != 1:
                hasher.update(f" turned {image.orientation}".encode())
            for array in (image.boxes, image.classes, image.crowd):
                hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()


def empty_record(image_id: int, path: Path, width: int, height: int) -> ImageRecord:
    """A record without boxes (a background image)."""
    return make_record(image_id, path, width, height, [], [])


def make_record(
    image_id: int,
    path: Path,
    width: int,
    height: int,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    crowd: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
    orientation: int = 1,
) -> ImageRecord:
    """Build a record from plain lists; areas default to the boxes' own."""
    array = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    own = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    return ImageRecord(
        image_id,
        path,
        width,
        height,
        array,
        np.asarray(classes, dtype=np.int64).reshape(-1),
        np.asarray(crowd if crowd is not None else [False] * len(array), dtype=np.bool_),
        np.asarray(areas if areas is not None else own, dtype=np.float32),
        orientation,
    )
