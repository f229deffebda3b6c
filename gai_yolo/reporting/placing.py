"""Where labels go: a pure function of boxes and sizes of labels, so that they do not cover each other where there is room."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FARTHEST = 8
"""Rows that a label may be away from its box's edge: farther away nobody sees whose it is."""
MOST_COVERED = 1 / 3
"""Of a picture: so much may be hidden by labels."""


def place_labels(corners: NDArray[np.int64], sizes: NDArray[np.int64], width: int, height: int) -> list[tuple[int, int] | None]:
    """A place for each label, above its box if it is free, else near it.

    Args:
        corners: (N, 4) xyxy of the boxes, in pixels of a picture of `width` x `height`; the most important first.
        sizes: (N, 2) width and height of the labels, in pixels.

    Returns:
        Left and top of each label, wholly inside of the picture and not on another label. None where there is no such place, because a
        label that covers another one makes two of them unreadable, or where labels would cover more than `MOST_COVERED` of the picture.
    """
    taken = np.zeros((0, 4), dtype=np.int64)
    places: list[tuple[int, int] | None] = []
    for box, size in zip(corners, sizes, strict=True):
        spots = np.array(_spots(box, size, width, height), dtype=np.int64).reshape(-1, 2)
        ends = spots + size
        covers = (spots[:, None] < taken[None, :, 2:]).all(axis=2) & (ends[:, None] > taken[None, :, :2]).all(axis=2)
        free = np.flatnonzero(~covers.any(axis=1))
        covered = (taken[:, 2:] - taken[:, :2]).prod(axis=1).sum() + size.prod()
        if not len(free) or covered > MOST_COVERED * width * height:
            places.append(None)
            continue
        left, top = spots[free[0]].tolist()
        places.append((left, top))
        taken = np.concatenate([taken, [[left, top, left + int(size[0]), top + int(size[1])]]])
    return places


def _spots(box: NDArray[np.int64], size: NDArray[np.int64], width: int, height: int) -> list[tuple[int, int]]:
    """Left and top of where a label may go, the best first: on the upper edge, within the box, at its lower edge, then row by row away
    from it."""
    left, top, right, bottom = box.tolist()
    tag_width, tag_height = size.tolist()
    if tag_width > width:
        return []
    # Never cut off at the right or left.
    columns = [max(0, min(x, width - tag_width)) for x in (left, right - tag_width + 1)]
    rows = [top - tag_height, top, bottom - tag_height + 1, bottom + 1]
    for step in range(1, FARTHEST):
        rows += [top - (step + 1) * tag_height, top + step * tag_height, bottom + 1 + step * tag_height]
    return [(x, y) for y in rows if 0 <= y <= height - tag_height for x in columns]
