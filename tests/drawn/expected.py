"""What is to be found in a drawn data set, worked out from the drawing and the documentation, not with the readers' code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gai_yolo.data.index import ImageRecord, Index
from tests.drawn.model import Box, Picture

STATES = {
    "missing": "image file missing",
    "empty": "image unreadable",
    "noise": "image unreadable",
    "dangling": "image file cannot be opened",
}


@dataclass(frozen=True)
class Written:
    """A box as a format has written it."""

    box: Box
    key: Hashable
    """Equal for records that say the same."""
    area: float | None = None


@dataclass(frozen=True)
class SeenBox:
    name: str
    corners: tuple[float, float, float, float]
    crowd: bool
    area: float


@dataclass
class SeenImage:
    size: tuple[int, int]
    orientation: int
    boxes: list[SeenBox] = field(default_factory=list)


@dataclass
class Expected:
    """What an index is to hold, or why there is to be none."""

    split: str
    class_names: list[str]
    max_bad_fraction: float
    images: dict[Path, SeenImage] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    ids: dict[Path, int] = field(default_factory=dict)
    """Where the annotations number images."""
    total: int = 0
    bad: int = 0
    spoiled: str | None = None
    """What is said of a damage for which all is refused."""

    def bad_image(self, kind: str) -> None:
        self.counts[kind] += 1
        self.total += 1
        self.bad += 1

    def picture(self, path: Path, picture: Picture, told: tuple[int, int] | None, boxes: Iterable[Written], crowds: bool = False) -> None:
        """One image that the annotations name."""
        if picture.state in STATES:
            self.bad_image(STATES[picture.state])
            return
        self.total += 1
        image = self._frame(picture, told)
        self.images[path] = image
        known: set[Hashable] = set()
        for written in boxes:
            for _ in range(written.box.copies):
                if written.key in known:
                    self.counts["box that is there twice"] += 1
                elif self._box(image, written, crowds):
                    known.add(written.key)

    def _frame(self, picture: Picture, told: tuple[int, int] | None) -> SeenImage:
        (width, height), lying = picture.size, picture.orientation >= 5
        if picture.orientation != 1:
            self.counts["image that its EXIF data turns"] += 1
        as_stored = lying and told is not None and (told[0] - told[1]) * (width - height) > 0
        image = SeenImage(picture.size, 1) if as_stored else SeenImage(picture.seen, picture.orientation)
        if told is not None and told != image.size:
            self.counts["image size differs from the annotation"] += 1
        return image

    def _box(self, image: SeenImage, written: Written, crowds: bool) -> bool:
        box, (width, height) = written.box, image.size
        assert box.name is not None
        if not all(map(math.isfinite, box.corners)):
            self.counts["box with a number that is not finite"] += 1
            return False
        limits = (width, height, width, height)
        x1, y1, x2, y2 = clipped = tuple(min(max(value, 0.0), limit) for value, limit in zip(box.corners, limits, strict=True))
        if min(x2 - x1, y2 - y1) < 0.001:
            self.counts["box without area"] += 1
            return False
        if any(abs(a - b) > 0.5 for a, b in zip(box.corners, clipped, strict=True)):
            self.counts["box outside the image"] += 1
        area = written.area
        if area is not None and not 0 < area <= width * height:
            self.counts["area that no object in the image can have"] += 1
            area = None
        own = (x2 - x1) * (y2 - y1)
        image.boxes.append(SeenBox(box.name, (x1, y1, x2, y2), box.crowd and crowds, own if area is None else area))
        return True

    @property
    def has_objects(self) -> bool:
        return any(not box.crowd for image in self.images.values() for box in image.boxes)

    def refusal(self) -> str | None:
        """What the message of the refusal is to hold; None if the split is to be read."""
        if self.spoiled is not None:
            return self.spoiled
        if self.total == 0:
            return "the split has no images"
        if self.bad > self.max_bad_fraction * self.total or self.bad == self.total:
            return f"{self.bad} of {self.total} images are missing or unreadable"
        if self.split == "train" and not self.has_objects:
            return f"none of the {len(self.images)} training images has a usable box"
        return None

    def compare(self, index: Index) -> None:
        """Assert that an index holds this and nothing else."""
        assert index.class_names == self.class_names
        assert {image.path for image in index.images} == self.images.keys()
        assert len(index.images) == len(self.images) == len({image.image_id for image in index.images})
        assert self.ids.items() <= {image.path: image.image_id for image in index.images}.items()
        for image in index.images:
            _compare_image(image, self.images[image.path], self.class_names)
        found: Counter[str] = Counter()
        for problem in index.problems:
            found[problem.kind] += problem.count
            assert problem.example and problem.action
        assert found == +self.counts


def _compare_image(image: ImageRecord, expected: SeenImage, names: list[str]) -> None:
    assert ((image.width, image.height), image.orientation) == (expected.size, expected.orientation), image.path
    rows = zip(image.classes.tolist(), image.boxes.tolist(), image.crowd.tolist(), image.areas.tolist(), strict=True)
    left = [SeenBox(names[position], tuple(corners), crowd, area) for position, corners, crowd, area in rows]
    for box in expected.boxes:
        same = next((one for one in left if _alike(one, box)), None)
        assert same is not None, f"{image.path}: {box} is not among {left}"
        left.remove(same)
    assert not left, f"{image.path}: nobody has drawn {left}"


def _alike(one: SeenBox, other: SeenBox) -> bool:
    near = all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(one.corners, other.corners, strict=True))
    return near and (one.name, one.crowd) == (other.name, other.crowd) and math.isclose(one.area, other.area, rel_tol=2e-2, abs_tol=1e-2)
