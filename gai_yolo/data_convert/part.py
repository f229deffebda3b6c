"""A split on its way into a new data set: what is written of it, and what a format cannot hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data.index import ImageRecord, Index

Form = Literal["coco", "yolo", "voc"]

WRITTEN_BY = "written by gai-yolo"
"""In every file that has room for it."""
CROWD_LEFT_OUT = "crowd region"
AREA = "area that is not that of the box"
TWIN = "box that is the same as another once it is clipped, or reduced to its bounding box"
IMAGE_ID = "image id"
CLASS_ID = "class id"
AREA_TOLERANCE = 1e-3
"""Fraction; areas that differ by less are the box's own, rounded."""

Corners = tuple[float, float, float, float]
"""xyxy, pixels, each a float32's value."""


@dataclass
class Part:
    """One split to be written."""

    split: Split
    index: Index
    names: list[str]
    """Of the images, in the order of the index, below the folder of the split's images."""
    problems: Problems = field(default_factory=Problems)
    """What is written otherwise than it was, or not at all."""
    boxes: Counter[int] = field(default_factory=Counter)
    """Written, by class position, without crowd regions."""
    crowds: int = 0
    """Written."""
    background_images: int = 0

    def lines(
        self, record: ImageRecord, name: str, line: Callable[[int, Corners, bool, float], str], crowds: bool = False, areas: bool = False
    ) -> list[str]:
        """What is written for the boxes of an image, each once.

        Args:
            line: of class position, corners, crowd and area.
            crowds: the format knows crowd regions; otherwise they are left out, as training leaves them out.
            areas: the format has areas; otherwise they are those of the boxes.
        """
        found: dict[str, None] = {}
        columns = (record.classes.tolist(), record.boxes.tolist(), record.crowd.tolist(), record.areas.tolist())
        for number, (position, corners, crowd, area) in enumerate(zip(*columns, strict=True), start=1):
            if crowd and not crowds:
                self.problems.add(
                    CROWD_LEFT_OUT, f"{name}, box {number}", "left out, as training does; a metric no longer ignores what is found there"
                )
                continue
            text = line(position, tuple(corners), crowd, area)
            if text in found:
                self.problems.add(TWIN, f"{name}, box {number}", "written once")
                continue
            found[text] = None
            if not areas and abs(area - own_area(corners)) > AREA_TOLERANCE * area:
                self.problems.add(AREA, f"{name}, box {number}: {area:.6g}", "lost; that of the box counts")
            if crowd:
                self.crowds += 1
            else:
                self.boxes[position] += 1
        self.background_images += not found
        return list(found)

    def tell_of_image_ids(self) -> None:
        """Of a format that has none: readers number images in the order of their paths."""
        order = sorted(range(len(self.names)), key=lambda position: PurePosixPath(self.names[position]))
        ids = self.index.images.image_ids[order].tolist()
        changed = [(place, old, new) for new, (place, old) in enumerate(zip(order, ids, strict=True), start=1) if old != new]
        if changed:
            place, old, new = changed[0]
            self.problems.add_many(IMAGE_ID, len(changed), f"{self.names[place]}: {old}, now {new}", "images are numbered by their names")


def own_area(corners: list[float]) -> float:
    """Pixels^2."""
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def decimal(value: float) -> str:
    """The shortest decimal of which the same float32 is read; a whole number without a point."""
    return str(int(value)) if value.is_integer() else str(np.float32(value))


def tell_of_class_ids(parts: list[Part], problems: Problems) -> None:
    """Of a format that has none: readers number classes from 0, which are ids from 1."""
    categories = parts[0].index.categories
    changed = [(one, number) for number, one in enumerate(categories, start=1) if one.id != number]
    if changed:
        one, number = changed[0]
        problems.add_many(CLASS_ID, len(changed), f"{one.name}: {one.id}, now {number}", "classes are numbered by their place in the list")
