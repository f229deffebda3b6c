"""A validation as plain data, for `validation.json` and `--json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from gai_yolo.evaluation.coco_metrics import distinct_names
from gai_yolo.evaluation.confusion import ImageResult
from gai_yolo.evaluation.curves import CONFIDENCES, CURVE_IOU, RECALLS
from gai_yolo.inference.validate import ValidationReport

VALIDATION_FORMAT = 1
IMAGES_EACH_WAY = 8
"""The best and the worst images, so many of each."""
CURVE_STEP = 10
"""Every so manieth point of the curves over confidence is written."""


def document(report: ValidationReport) -> dict[str, Any]:
    """Everything that was found; what is undefined, because there is nothing to be found, is None."""
    model, evaluation, config, question = report.model, report.evaluation, report.config, report.question
    training, data = config.training, config.data
    return {
        "format": VALIDATION_FORMAT,
        "checkpoint": str(model.path),
        "position": model.position,
        "data": str(data.path),
        "split": question.split,
        "source": report.index.source,
        "images": len(evaluation.index),
        "boxes": int(report.curves.positives.sum()),
        "unreadable": evaluation.unreadable,
        "settings": {
            "image_size": data.image_size,
            **config.evaluation.model_dump(include={"batch_size", "confidence", "iou", "max_detections"}),
            **training.model_dump(include={"amp", "channels_last", "threads", "exact"}),
            "device": report.device,
        },
        "notes": report.notes,
        "losses": evaluation.losses,
        "metrics": {name: _known(value) for name, value in evaluation.metrics.stats.items()},
        "classes": classes(report),
        "best_confidence": None if report.best is None else {**vars(report.best), "iou": CURVE_IOU},
        "confusion": {
            "confidence": report.confusion.confidence,
            "iou": report.confusion.iou,
            "rows": "what is there; the last one: background",
            "columns": "what it is taken for; the last one: nothing",
            "matrix": report.confusion.matrix.tolist(),
        },
        "image_score": "F1 of the image at the confidence and IoU of `confusion`",
        "worst_images": [image_row(report, one) for one in report.confusion.worst(IMAGES_EACH_WAY)],
        "best_images": [image_row(report, one) for one in report.confusion.best(IMAGES_EACH_WAY)],
        "curves": _curves(report),
    }


def as_json(report: ValidationReport) -> str:
    """Content of `validation.json`, in ASCII."""
    return json.dumps(document(report), indent=1, allow_nan=False) + "\n"


def classes(report: ValidationReport) -> list[dict[str, Any]]:
    """What is known of each class, in the order of the network's outputs."""
    curves, index = report.curves, report.evaluation.index
    f1 = curves.f1
    images = _images_of_classes(report)
    rows = []
    for place, (name, (ap, ap50)) in enumerate(report.evaluation.metrics.per_class.items()):
        is_measured = bool(curves.positives[place])
        best = int(np.argmax(f1[place])) if is_measured else 0
        rows.append(
            {
                "name": name,
                "boxes": int(curves.positives[place]),
                "images": images[place],
                "AP50-95": _known(ap),
                "AP50": _known(ap50),
                "best_f1": float(f1[place, best]) if is_measured else None,
                # Where nothing is ever right no confidence is better than another.
                "best_f1_confidence": float(CONFIDENCES[best]) if is_measured and f1[place, best] > 0 else None,
            }
        )
    assert [row["name"] for row in rows] == distinct_names(index)
    return rows


def image_row(report: ValidationReport, one: ImageResult) -> dict[str, Any]:
    """What became of the boxes of an image."""
    counts = {"right": one.right, "mixed_up": one.mixed_up, "missed": one.missed, "invented": one.invented}
    return {"image_id": one.image_id, "file": str(report.evaluation.index.images[one.position].path), "score": one.score, **counts}


def _images_of_classes(report: ValidationReport) -> list[int]:
    """Images with a box of each class, crowd regions left out."""
    records, num_classes = report.evaluation.index.images, len(report.index.categories)
    owners = np.repeat(np.arange(len(records)), np.diff(records.columns["first_boxes"]))[~records.crowd]
    pairs = np.unique(np.stack([records.classes[~records.crowd], owners]), axis=1)
    return [int(count) for count in np.bincount(pairs[0], minlength=num_classes)]


def _curves(report: ValidationReport) -> dict[str, Any]:
    curves = report.curves
    over_confidence = {"f1": curves.f1, "precision": curves.precision, "recall": curves.recall}
    return {
        "iou": CURVE_IOU,
        "recalls": _numbers(RECALLS),
        "precision_at_recalls": [_numbers(row) for row in curves.precisions],
        "confidences": _numbers(CONFIDENCES[::CURVE_STEP]),
        **{f"{name}_at_confidences": [_numbers(row[::CURVE_STEP]) for row in rows] for name, rows in over_confidence.items()},
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 6) for value in values]


def _known(value: float) -> float | None:
    return value if value >= 0 else None
