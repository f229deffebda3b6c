"""What the average precision comes out of: how precision and recall of each class change with the confidence that is asked for.

Detections are matched by pycocotools, at IoU 0.50, boxes of all sizes, the 100 best of each image and class; what falls on a crowd
region counts neither way. So the mean of a precision curve is the class's AP at IoU 0.50.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECALLS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
"""Of the points of a precision curve, as pycocotools has them."""
CONFIDENCES: NDArray[np.float64] = np.linspace(0.0, 1.0, 1001)
"""Of the points of the other curves."""
CURVE_IOU = 0.5


@dataclass(frozen=True, eq=False)
class Curves:
    """Of one evaluation, for K classes in the order of the network's outputs."""

    precisions: NDArray[np.float64]
    """(K, 101) at `RECALLS`: the highest precision with at least that recall, 0..1; NaN for classes without a box."""
    positives: NDArray[np.int64]
    """(K,) boxes to be found."""
    hits: NDArray[np.int64]
    """(K, 1001) boxes found by detections with at least the confidence, of `CONFIDENCES`."""
    misses: NDArray[np.int64]
    """(K, 1001) such detections that find nothing."""

    @property
    def measured(self) -> NDArray[np.int64]:
        """(M,) classes with a box to be found."""
        return np.flatnonzero(self.positives)

    @property
    def precision(self) -> NDArray[np.float64]:
        """(K, 1001) share of hits in the detections; NaN where there are none."""
        detections = self.hits + self.misses
        return np.where(detections > 0, self.hits / np.maximum(detections, 1), np.nan)

    @property
    def recall(self) -> NDArray[np.float64]:
        """(K, 1001) share of boxes that are found; NaN for classes without a box."""
        positives = self.positives[:, None]
        return np.where(positives > 0, self.hits / np.maximum(positives, 1), np.nan)

    @property
    def f1(self) -> NDArray[np.float64]:
        """(K, 1001) harmonic mean of precision and recall, 2 hits / (boxes + detections); NaN for classes without a box."""
        positives = self.positives[:, None]
        return np.where(positives > 0, 2 * self.hits / np.maximum(positives + self.hits + self.misses, 1), np.nan)


@dataclass(frozen=True)
class OperatingPoint:
    """A confidence, and what detections with at least that are worth, as means over the classes that have boxes."""

    confidence: float
    f1: float
    precision: float
    """Of the classes with such detections; 0 if there are none."""
    recall: float


def best_point(curves: Curves) -> OperatingPoint | None:
    """Where the mean F1 is highest; in the middle, where it is so over a range. None if there is no box to be found."""
    measured = curves.measured
    if not len(measured):
        return None
    f1 = curves.f1[measured].mean(axis=0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    stretch = best[: int(np.argmax(np.diff(best, append=best[-1] + 2) > 1)) + 1]  # the first one without a gap
    place = int(stretch[len(stretch) // 2])
    precision = curves.precision[measured, place]
    of_detections = precision[~np.isnan(precision)]
    mean = float(of_detections.mean()) if len(of_detections) else 0.0
    return OperatingPoint(float(CONFIDENCES[place]), float(f1[place]), mean, float(curves.recall[measured, place].mean()))


def curves_of(evaluation: Any, category_ids: list[int]) -> Curves:
    """Out of a `pycocotools.cocoeval.COCOeval` that has evaluated and accumulated; K classes by their ids, in this order."""
    parameters, num_classes = evaluation.params, len(category_ids)
    column = {category_id: place for place, category_id in enumerate(parameters.catIds)}
    num_areas, num_images = len(parameters.areaRng), len(parameters.imgIds)
    positives = np.zeros(num_classes, np.int64)
    hits, misses = (np.zeros((num_classes, len(CONFIDENCES)), np.int64) for _ in range(2))
    precisions = np.full((num_classes, len(RECALLS)), np.nan)
    for number, category_id in enumerate(category_ids):
        place = column[category_id]
        points = evaluation.eval["precision"][0, :, place, 0, -1]
        precisions[number] = np.where(points > -1, points, np.nan)
        # All areas come first; an image without boxes and detections of the class is None.
        first = place * num_areas * num_images
        found = [one for one in evaluation.evalImgs[first : first + num_images] if one is not None]
        if not found:
            continue
        positives[number] = sum(int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in found)
        scores = np.concatenate([np.asarray(one["dtScores"], np.float64) for one in found])
        counted = ~np.concatenate([one["dtIgnore"][0].astype(bool) for one in found])
        is_hit = np.concatenate([one["dtMatches"][0] > 0 for one in found])
        hits[number] = _at_least(scores[counted & is_hit])
        misses[number] = _at_least(scores[counted & ~is_hit])
    return Curves(precisions, positives, hits, misses)


def _at_least(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many reach each of `CONFIDENCES`."""
    return len(scores) - np.searchsorted(np.sort(scores), CONFIDENCES, side="left")
