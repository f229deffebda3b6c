"""What the rows of a YOLO label file say; the rules stand in `yolo_txt.py`."""

from __future__ import annotations

import math
from pathlib import Path

from gai_yolo.data.formats.check import UNKNOWN_CLASS, Problems, RawBox, RawImage
from gai_yolo.errors import DataError

UNPARSABLE_ROW = "unparsable label row"
MORE_COLUMNS = "label row with a confidence or track"
INSIDE = 0.02
"""Fraction of the image by which keypoints may lie outside their box."""


class Rows:
    """How the label rows of a split are to be read, and what they turned out to be.

    Args:
        num_keypoints: values of a row's keypoints, 0 if it has none; None if the yaml does not say.
    """

    def __init__(self, num_classes: int, num_keypoints: int | None) -> None:
        self.num_classes, self.num_keypoints = num_classes, num_keypoints
        self.num_outlines = self.num_doubtful = 0
        self.first_doubtful = ""

    def corners(self, values: list[float], record: str, image: Path, problems: Problems) -> tuple[float, float, float, float] | None:
        """The box of a row of an image, xyxy; None if there is none to be had."""
        length = len(values)
        if length == 4 or (self.num_keypoints is not None and length == 4 + self.num_keypoints):
            return _box(values)
        if self.num_keypoints is not None:
            return None
        if length == 5 or (length == 6 and values[5] > 1 and values[5].is_integer()):
            problems.add(MORE_COLUMNS, record, "its box taken", image, _box(values), fractions=True)
            return _box(values)
        doubtful = length > 8 and any(_are_keypoints(values, dimensions) for dimensions in (2, 3))
        if doubtful:
            self.num_doubtful += 1
            self.first_doubtful = self.first_doubtful or record
        if length < 6 or length % 2:
            return _box(values) if doubtful else None
        self.num_outlines += 1
        return _bounding_box(values)

    def check(self, source: Path) -> None:
        """Refuse what may be one thing as well as the other.

        Raises:
            DataError: naming the first such row.
        """
        if self.num_doubtful and self.num_doubtful >= self.num_outlines:
            raise DataError(
                f"{self.first_doubtful}: may be a box with keypoints or an outline; write `kpt_shape: [K, 2 or 3]` into {source}, or give "
                "each row four numbers."
            )


def append_row(image: RawImage, line: str, number: int, rows: Rows, problems: Problems) -> None:
    """Give an image the box of a row, or count why it has none; `number` is that of the line, from 1."""
    try:
        first, *values = map(float, line.split())
        position = int(first)
    except (ValueError, OverflowError):
        first, position, values = 0.5, 0, []
    record = f"{image.where} {number}"
    corners = rows.corners(values, record, image.path, problems) if position == first else None
    if corners is None:
        problems.add(UNPARSABLE_ROW, record, "skipped", image.path)
    elif not 0 <= position < rows.num_classes:
        problems.add(UNKNOWN_CLASS, f"{record} (class {position})", "skipped", image.path, corners, fractions=True)
    else:
        outline = () if corners == _box(values) else tuple(values)
        image.boxes.append(RawBox(corners, position, number, outline=outline))


def _are_keypoints(values: list[float], dimensions: int) -> bool:
    """Whether what follows the first four could be points in the box that these are."""
    points = values[4:]
    if len(points) % dimensions or not all(map(math.isfinite, values)):
        return False
    x1, y1, x2, y2 = _box(values)
    seen = [points[place : place + dimensions] for place in range(0, len(points), dimensions)]
    return all(
        # A point that is not labelled is written as zeros.
        (not any(point))
        or (
            x1 - INSIDE <= point[0] <= x2 + INSIDE and y1 - INSIDE <= point[1] <= y2 + INSIDE and (dimensions == 2 or point[2] in (0, 1, 2))
        )
        for point in seen
    )


def _box(values: list[float]) -> tuple[float, float, float, float]:
    cx, cy, width, height = values[:4]
    return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2


def _bounding_box(values: list[float]) -> tuple[float, float, float, float]:
    xs, ys = values[0::2], values[1::2]
    if not all(map(math.isfinite, values)):  # min and max would pass over a NaN that is not first
        return math.nan, math.nan, math.nan, math.nan
    return min(xs), min(ys), max(xs), max(ys)
