"""Which class is taken for which, and in which images a detector does worst.

Unlike COCO's, this matching knows no classes: a detection of the wrong class in the right place is a mix-up, and not a miss beside an
invention. Detections from a confidence on are taken by descending score; each takes the box that it overlaps most, of those that are
still free and that it overlaps by an IoU threshold at least. A detection that takes none, and of which at least that share lies in a
crowd region of its class, is ignored, and so are crowd regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.index import ImageRecord, Index
from gai_yolo.evaluation.coco_metrics import ImageDetections

CONFUSION_CONFIDENCE, CONFUSION_IOU = 0.25, 0.5
"""Unless asked otherwise."""


@dataclass(frozen=True)
class ImageResult:
    """How an image came out."""

    position: int
    """In the index."""
    image_id: int
    right: int
    """Boxes that were found, as what they are."""
    mixed_up: int
    """Boxes that were found as something else."""
    missed: int
    invented: int
    """Detections where there is nothing."""

    @property
    def score(self) -> float:
        """F1: the share of what is right in boxes and detections together, 0..1; 1 where there are neither."""
        wrong = 2 * self.mixed_up + self.missed + self.invented
        return 2 * self.right / (2 * self.right + wrong) if self.right or wrong else 1.0


@dataclass(frozen=True, eq=False)
class Confusion:
    """Of all images."""

    matrix: NDArray[np.int64]
    """(K + 1, K + 1): boxes of a class (row) that were found as a class (column). Last row: detections of nothing; last column: boxes
    that were not found. The sum of a class's row is the number of its boxes."""
    images: list[ImageResult]
    """Each image once, in the order of the index."""
    confidence: float
    iou: float

    def worst(self, most: int) -> list[ImageResult]:
        """Images with something wrong: the lowest scores, of equal ones those with the most errors."""
        wrong = [one for one in self.images if one.score < 1]
        return sorted(wrong, key=lambda one: (one.score, -(one.mixed_up + one.missed + one.invented)))[:most]

    def best(self, most: int) -> list[ImageResult]:
        """Images with something right: the highest scores, of equal ones those with the most boxes."""
        return sorted((one for one in self.images if one.right), key=lambda one: (-one.score, -one.right))[:most]


def confusion_of(
    index: Index,
    detections: Sequence[ImageDetections],
    confidence: float = CONFUSION_CONFIDENCE,
    iou: float = CONFUSION_IOU,
) -> Confusion:
    """Compare detections with the boxes of an index; an image without an entry is one in which nothing was found.

    Args:
        confidence: detections below it do not count.
        iou: of a match at least, above 0 and up to 1.
    """
    found = {one.image_id: one for one in detections}
    background = len(index.categories)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    images = []
    for position, record in enumerate(index.images):
        rows, columns = _pairs(record, found.get(record.image_id), background, confidence, iou)
        np.add.at(matrix, (rows, columns), 1)
        right, missed, invented = (int(mask.sum()) for mask in (rows == columns, columns == background, rows == background))
        images.append(ImageResult(position, record.image_id, right, len(rows) - right - missed - invented, missed, invented))
    return Confusion(matrix, images, confidence, iou)


def match(overlaps: NDArray[np.float64], same_class: NDArray[np.bool_], iou: float) -> NDArray[np.int64]:
    """The box that each detection takes.

    Args:
        overlaps: (D, N) IoU of detections, by descending score, with boxes.
        same_class: (D, N) whether they are of one class; decides between boxes that overlap equally.

    Returns:
        (D,) positions of boxes, each at most once; -1 for none.
    """
    taken = np.full(len(overlaps), -1, np.int64)
    free = np.ones(overlaps.shape[1], np.bool_)
    for number in np.flatnonzero((overlaps >= iou).any(axis=1)).tolist():
        open_to_it = np.flatnonzero(free & (overlaps[number] >= iou))
        if len(open_to_it):
            order = np.lexsort((~same_class[number, open_to_it], -overlaps[number, open_to_it]))
            taken[number] = open_to_it[order[0]]
            free[taken[number]] = False
    return taken


def overlap(boxes: NDArray[np.float64], others: NDArray[np.float64], of_first: bool = False) -> NDArray[np.float64]:
    """(N, M) IoU of boxes (N, 4) and (M, 4), xyxy; or, `of_first`, the share of the first one's area that lies in the other. 0 where an
    area is."""
    upper, lower = np.maximum(boxes[:, None, :2], others[None, :, :2]), np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (lower - upper).clip(min=0).prod(axis=2)
    area, other_area = (np.asarray((one[:, 2:] - one[:, :2]).clip(min=0).prod(axis=1)) for one in (boxes, others))
    whole = np.broadcast_to(area[:, None], shared.shape) if of_first else area[:, None] + other_area[None, :] - shared
    return np.asarray(np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0))


def _pairs(
    record: ImageRecord, found: ImageDetections | None, background: int, confidence: float, iou: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each box, and of each detection that takes none."""
    truth, crowd = record.boxes[~record.crowd].astype(np.float64), record.boxes[record.crowd].astype(np.float64)
    classes, of_crowd = record.classes[~record.crowd], record.classes[record.crowd]
    columns = np.full(len(truth), background, np.int64)
    if found is None:
        return classes, columns
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= confidence]
    boxes, labels = found.boxes[order].astype(np.float64), found.classes[order]
    taken = match(overlap(boxes, truth), labels[:, None] == classes[None, :], iou)
    columns[taken[taken >= 0]] = labels[taken >= 0]
    on_crowd = (overlap(boxes, crowd, of_first=True) >= iou) & (labels[:, None] == of_crowd[None, :])
    invented = labels[(taken < 0) & ~on_crowd.any(axis=1)]
    return np.concatenate([classes, np.full(len(invented), background, np.int64)]), np.concatenate([columns, invented])
