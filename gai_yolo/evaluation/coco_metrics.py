"""COCO's twelve numbers and the average precision of each class, as pycocotools computes them.

Only the bridge is ours: the index and the detections become pycocotools' in-memory tables, and its arithmetic is left alone
(Lin et al. 2014, https://cocodataset.org/#detection-eval). A detection counts among the 100 best of its image and class.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.index import Index
from gai_yolo.evaluation.curves import Curves, curves_of

STAT_NAMES = (
    *("mAP50-95", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""Names of pycocotools' `stats`, in its order. Precision is averaged over IoU 0.50:0.95 unless the name says otherwise."""

UNDEFINED = -1.0
"""What pycocotools answers where there is no object to find (no small ones, none of this class)."""


@dataclass(frozen=True)
class ImageDetections:
    """What the network found in one image, after non-maximum suppression."""

    image_id: int
    boxes: NDArray[np.float32]
    """(N, 4) xyxy in pixels of the image file."""
    scores: NDArray[np.float32]
    """(N,) in [0, 1]."""
    classes: NDArray[np.int64]
    """(N,) positions in `Index.categories`."""


@dataclass(frozen=True)
class CocoMetrics:
    """The result of one evaluation; every value lies in [0, 1] or is `UNDEFINED`."""

    stats: dict[str, float]
    """The twelve numbers under `STAT_NAMES`."""
    per_class: dict[str, tuple[float, float]]
    """Class name -> (AP at IoU 0.50:0.95, AP at IoU 0.50), in the order of the network's outputs."""


def coco_metrics(index: Index, detections: Sequence[ImageDetections]) -> CocoMetrics:
    """The numbers of `measure` alone."""
    return measure(index, detections)[0]


def measure(index: Index, detections: Sequence[ImageDetections]) -> tuple[CocoMetrics, Curves]:
    """Score detections against the boxes of an index; returns the numbers, and the curves that they come out of.

    Each image appears at most once in `detections`; an image left out counts as one in which nothing was found, and images
    that are not in the index are ignored. The order of `detections` does not matter: ties between equal scores are broken
    by image id, and inside one image by the order given. Crowd boxes are matched as COCO does: what falls on them is
    neither right nor wrong.
    """
    # Imported here because evaluation is loaded with the job, and a restart should not wait for what it needs an epoch later.
    from pycocotools.cocoeval import COCOeval

    # pycocotools reports its progress with print; redirecting is process-wide but lasts only for the evaluation.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_table(index, _truths(index)), _table(index, _results(index, detections)), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {name: float(value) for name, value in zip(STAT_NAMES, evaluation.stats, strict=True)}
    return CocoMetrics(stats, _per_class(index, evaluation)), curves_of(evaluation, [category.id for category in index.categories])


def _table(index: Index, annotations: Iterable[dict[str, Any]]) -> Any:
    """A pycocotools table; built by hand on both sides because its `loadRes` fails on an empty list."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": record.image_id, "width": record.width, "height": record.height} for record in index.images],
        # Ids start at 1: pycocotools marks a match by the id of its partner, and an id of 0 would read as "no match".
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": category.id, "name": category.name} for category in index.categories],
    }
    coco.createIndex()
    return coco


def _truths(index: Index) -> Iterator[dict[str, Any]]:
    for record in index.images:
        for box, position, crowd, area in zip(_xywh(record.boxes), record.classes, record.crowd, record.areas, strict=True):
            category = index.categories[position].id
            yield {"image_id": record.image_id, "category_id": category, "bbox": box, "area": float(area), "iscrowd": int(crowd)}


def _results(index: Index, detections: Sequence[ImageDetections]) -> Iterator[dict[str, Any]]:
    known = set(index.images.image_ids.tolist())
    ids = [found.image_id for found in detections]
    assert len(set(ids)) == len(ids), "an image was evaluated twice"
    for found in sorted(detections, key=lambda item: item.image_id):
        if found.image_id not in known:
            continue
        boxes = _xywh(found.boxes)
        for place in np.argsort(-found.scores, kind="stable"):
            box, category, score = boxes[place], index.categories[found.classes[place]].id, float(found.scores[place])
            yield {"image_id": found.image_id, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": score}


def _xywh(boxes: NDArray[np.float32]) -> list[list[float]]:
    """(N, 4) xyxy -> N lists of left, top, width, height; in float64, so that the subtraction adds no rounding."""
    wide = boxes.reshape(-1, 4).astype(np.float64)
    wide[:, 2:] -= wide[:, :2]
    return list(wide.tolist())


def _per_class(index: Index, evaluation: Any) -> dict[str, tuple[float, float]]:
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area, max detections); -1 for absent classes
    column = {category_id: place for place, category_id in enumerate(evaluation.params.catIds)}
    result = {}
    for name, category in zip(distinct_names(index), index.categories, strict=True):
        values = precision[:, :, column[category.id], 0, -1]
        result[name] = (_mean(values), _mean(values[0]))
    return result


def distinct_names(index: Index) -> list[str]:
    """Of the classes. Two may share a name in a careless file; neither may hide the other."""
    repeated = Counter(index.class_names)
    return [one.name if repeated[one.name] == 1 else f"{one.name} ({one.id})" for one in index.categories]


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED
