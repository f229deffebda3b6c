"""Writes COCO json: `annotations/{split}.json` and `images/{split}`.

Ids of images and classes are kept; annotations are numbered from 1. Numbers are the shortest decimals of which the very same float32
boxes and areas are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gai_yolo.data.formats.check import Problems
from gai_yolo.data_convert.part import WRITTEN_BY, Corners, Part, decimal, own_area


def write_coco(root: Path, parts: Sequence[Part]) -> None:
    """The json of each split; images are not written. Raises `OSError`."""
    (root / "annotations").mkdir()
    for part in parts:
        with (root / "annotations" / f"{part.split}.json").open("x", encoding="ascii", buffering=1 << 20) as file:
            file.writelines(_json(part))


def check_coco(_parts: Sequence[Part], _problems: Problems) -> None:
    """It holds all that an index has."""


def _json(part: Part) -> Iterator[str]:
    """One text for each image: a big data set's annotations need not be in memory as objects."""
    categories = [{"id": category.id, "name": category.name, "supercategory": ""} for category in part.index.categories]
    yield f'{{"info": {json.dumps({"description": WRITTEN_BY})},\n"licenses": [],\n"categories": {json.dumps(categories)},\n"images": ['
    for position, (image, name) in enumerate(zip(part.index.images, part.names, strict=True)):
        about = {"id": image.image_id, "file_name": name, "width": image.width, "height": image.height}
        yield f"{',' if position else ''}\n{json.dumps(about)}"
    yield '],\n"annotations": ['
    number = 0
    for image, name in zip(part.index.images, part.names, strict=True):
        ids = [category.id for category in part.index.categories]
        most = image.width * image.height

        def line(position: int, corners: Corners, crowd: bool, area: float, ids: list[int] = ids, most: int = most) -> str:
            said = _area(corners, area, most)
            return f'"category_id": {ids[position]}, "bbox": [{_bbox(corners)}], "area": {said}, "iscrowd": {int(crowd)}'

        for text in part.lines(image, name, line, crowds=True, areas=True):
            number += 1
            yield f'{"," if number > 1 else ""}\n{{"id": {number}, "image_id": {image.image_id}, {text}}}'
    yield "]}\n"


def _bbox(corners: Corners) -> str:
    x, y = decimal(corners[0]), decimal(corners[1])
    return f"{x}, {y}, {_length(float(x), corners[2])}, {_length(float(y), corners[3])}"


def _length(start: float, end: float) -> str:
    """The shortest of some decimals that lead from a start to the same float32 again."""
    exact = end - start
    for digits in (0, 2, 4, 6):
        rounded = round(exact, digits)
        if np.float32(start + rounded) == end:
            return str(int(rounded)) if rounded.is_integer() else repr(rounded)
    return repr(exact)


def _area(corners: Corners, area: float, most: int) -> str:
    own = own_area([*corners])
    if np.float32(own) == area:  # rounded up it might be more than the image has, which no object can have
        return str(int(own)) if own.is_integer() else repr(own)
    return decimal(area) if area <= most else str(most)
