"""The one index every annotation format is read into: arrays, so that a big data set's can be mapped from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

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


class Records(Sequence[ImageRecord]):
    """Images in a stable order. What is asked for by position is made when it is asked for; its arrays are views, not to be written to.

    Args:
        columns: as `columns` gives them.
        folders: of the images; `columns` has positions in it.

    Raises:
        KeyError, ValueError: the columns are of another make.
    """

    def __init__(self, columns: dict[str, NDArray[Any]], folders: Sequence[str]) -> None:
        self.columns = {name: columns[name] for name in COLUMNS}
        self.folders = tuple(folders)
        self.image_ids, self.boxes, self.classes, self.crowd, self.areas = (columns[name] for name in COLUMNS[:5])
        self._sizes, self._turns, self._first, self._name_at, self._folder_of = (columns[name] for name in COLUMNS[5:10])
        self._names = columns["names"].tobytes()
        if len(self._first) != len(self.image_ids) + 1 or self._first[-1] != len(self.boxes):
            raise ValueError("columns of different lengths")

    @classmethod
    def of(cls, images: Iterable[ImageRecord]) -> Records:
        """From single ones."""
        images = list(images)
        folders = {folder: position for position, folder in enumerate(dict.fromkeys(image.path.parent for image in images))}
        names = [image.path.name.encode(errors="surrogateescape") for image in images]
        columns: dict[str, NDArray[Any]] = {
            "image_ids": np.array([image.image_id for image in images], dtype=np.int64),
            "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes for image in images)]),
            "classes": np.concatenate([np.zeros(0, np.int64), *(image.classes for image in images)]),
            "crowd": np.concatenate([np.zeros(0, np.bool_), *(image.crowd for image in images)]),
            "areas": np.concatenate([np.zeros(0, np.float32), *(image.areas for image in images)]),
            "sizes": np.array([(image.width, image.height) for image in images], dtype=np.int32).reshape(-1, 2),
            "orientations": np.array([image.orientation for image in images], dtype=np.uint8),
            "first_boxes": np.cumsum([0, *(len(image.boxes) for image in images)], dtype=np.int64),
            "first_letters": np.cumsum([0, *map(len, names)], dtype=np.int64),
            "folders": np.array([folders[image.path.parent] for image in images], dtype=np.int32),
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        }
        return cls(columns, [str(folder) for folder in folders])

    def __len__(self) -> int:
        return len(self.image_ids)

    @overload
    def __getitem__(self, position: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, position: slice) -> list[ImageRecord]: ...
    def __getitem__(self, position: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        place = range(len(self))[position]  # negative ones count from the end; raises IndexError
        mine = slice(self._first[place], self._first[place + 1])
        width, height = self._sizes[place].tolist()
        return ImageRecord(
            image_id=int(self.image_ids[place]),
            path=Path(self.folders[self._folder_of[place]], self.name(place)),
            width=width,
            height=height,
            boxes=self.boxes[mine],
            classes=self.classes[mine],
            crowd=self.crowd[mine],
            areas=self.areas[mine],
            orientation=int(self._turns[place]),
        )

    def name(self, position: int) -> str:
        """The file's name, without its folder."""
        return self._names[self._name_at[position] : self._name_at[position + 1]].decode(errors="surrogateescape")

    def paths(self) -> Iterator[str]:
        """Of all images, as the system takes them."""
        folders = [folder.rstrip("/") + "/" for folder in self.folders]
        for position, folder in enumerate(self._folder_of.tolist()):
            yield folders[folder] + self.name(position)

    def without(self, image_ids: Collection[int]) -> Records:
        """Those with other ids."""
        return Records.of(image for image in self if image.image_id not in image_ids)

    def with_more_than(self, boxes: int) -> list[int]:
        """Positions of images with more boxes than that, crowd regions among them."""
        return list(np.flatnonzero(np.diff(self._first) > boxes).tolist())

    def class_counts(self, num_classes: int) -> NDArray[np.int64]:
        """(num_classes,) boxes of each class, crowd regions left out."""
        return np.bincount(self.classes[~self.crowd], minlength=num_classes)

    def hash_into(self, hasher: Any) -> None:
        """Names, sizes and boxes."""
        boxes, classes, crowd = self.boxes.tobytes(), self.classes.tobytes(), self.crowd.tobytes()
        first, sizes, turns = self._first.tolist(), self._sizes.tolist(), self._turns.tolist()
        for position, image_id in enumerate(self.image_ids.tolist()):
            width, height = sizes[position]
            start, end = first[position], first[position + 1]
            text = f"{image_id} {self.name(position)} {width}x{height}"
            if turns[position] != 1:
                text += f" turned {turns[position]}"
            hasher.update(text.encode(errors="surrogateescape"))
            hasher.update(boxes[16 * start : 16 * end])
            hasher.update(classes[8 * start : 8 * end])
            hasher.update(crowd[start:end])


COLUMNS = (
    *("image_ids", "boxes", "classes", "crowd", "areas"),
    *("sizes", "orientations", "first_boxes", "first_letters", "folders", "names"),
)
"""What `Records` are made of: (N,) or (boxes,) each, but for `boxes` (boxes, 4), `sizes` (N, 2), the `first_` (N + 1,), and letters."""


@dataclass(frozen=True)
class Recorded:
    """What follows from an index and takes long to find out, kept with it in a cache."""

    digest: str
    sample: NDArray[np.int64]
    """Positions of the images whose bytes are looked at (`content.sample_positions`)."""
    stamps: NDArray[np.int64]
    """(N, 2) size in bytes and modification time in ns of each image file when they were looked at."""
    parts: NDArray[np.uint8] | None = None
    """`content.part_digests` of the sample; not in a cache of the index, because each start looks anew."""


@dataclass(frozen=True)
class Index:
    """A split of a data set: every image that can be trained or evaluated on, in a stable order."""

    source: str
    """Where it was read from, for messages."""
    categories: tuple[Category, ...]
    images: Records
    problems: tuple[Problem, ...] = field(default=())
    content: str = ""
    """What the image files hold (`content.content_digest`); not in a cache of the index, because each start looks anew."""
    recorded: Recorded | None = None
    lost: frozenset[int] = frozenset()
    """Positions of images that are gone since the run began; grey is trained on in their place."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the network's outputs."""
        return [category.name for category in self.categories]

    def digest(self) -> str:
        """SHA-256 over classes, file names, sizes of images in pixels, and boxes: equal for equal data, wherever the folder lies."""
        if self.recorded is not None:
            return self.recorded.digest
        hasher = hashlib.sha256(repr([(c.id, c.name) for c in self.categories]).encode())
        self.images.hash_into(hasher)
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
