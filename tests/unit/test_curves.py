"""Precision and recall over confidence, out of pycocotools' own matching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gai_yolo.data.index import Category, Index, Records, make_record
from gai_yolo.evaluation.coco_metrics import ImageDetections, measure
from gai_yolo.evaluation.confusion import confusion_of
from gai_yolo.evaluation.curves import CONFIDENCES, best_point
from tests.unit.test_coco_metrics import random_case


def at(confidence: float) -> int:
    """The point of the curves."""
    return int(np.argmin(np.abs(CONFIDENCES - confidence)))


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_a_precision_curve_is_the_ap_of_the_class(seed: int) -> None:
    """Loss: a picture that shows another detector than the table."""
    index, detections = random_case(seed)
    metrics, curves = measure(index, detections)
    for place, (_, ap50) in enumerate(metrics.per_class.values()):
        assert (curves.positives[place] == 0) == (ap50 == -1)
        if ap50 >= 0:
            assert curves.precisions[place].mean() == pytest.approx(ap50, abs=1e-12)
    assert curves.positives.tolist() == index.images.class_counts(3).tolist()


def test_hand_worked_curves() -> None:
    """Loss: a confidence is recommended at which the detector is not what the picture says.

    Two cats, found at 0.9 and 0.5, and an invention at 0.7: from 0.5 down precision 2/3 and recall 1, above it 1/2 and 1/2 up to 0.7, then
    1 and 1/2, above 0.9 nothing. A dog that is never found; no unicorn.
    """
    boxes: list[list[float]] = [[0, 0, 50, 50], [100, 100, 150, 150], [0, 100, 50, 150]]
    index = Index(
        "test",
        (Category(1, "cat"), Category(2, "dog"), Category(9, "unicorn")),
        Records.of([make_record(1, Path("a.jpg"), 200, 200, boxes, [0, 0, 1])]),
    )
    found = np.array([boxes[0], boxes[1], [60, 0, 90, 30]], np.float32)
    one = ImageDetections(1, found, np.array([0.9, 0.5, 0.7], np.float32), np.zeros(3, np.int64))
    curves = measure(index, [one])[1]
    for confidence, precision, recall, f1 in ((0.0, 2 / 3, 1, 0.8), (0.5, 2 / 3, 1, 0.8), (0.6, 0.5, 0.5, 0.5), (0.8, 1, 0.5, 2 / 3)):
        assert curves.precision[0, at(confidence)] == pytest.approx(precision)
        assert curves.recall[0, at(confidence)] == pytest.approx(recall)
        assert curves.f1[0, at(confidence)] == pytest.approx(f1)
    assert np.isnan(curves.precision[0, at(0.95)]) and curves.f1[0, at(0.95)] == 0, "no detection, no precision"
    assert curves.f1[1].max() == 0 and np.isnan(curves.f1[2]).all()
    best = best_point(curves)
    assert best is not None
    assert 0 < best.confidence < 0.5 and best.confidence == pytest.approx(0.25, abs=0.01), "in the middle of the stretch"
    assert (best.f1, best.precision, best.recall) == pytest.approx((0.4, 2 / 3, 0.5))


def test_a_perfect_detector_is_perfect_everywhere() -> None:
    """Loss: an error of the arithmetic that lowers every detector alike and shows nowhere."""
    index, _ = random_case(1)
    perfect = [
        ImageDetections(r.image_id, r.boxes[~r.crowd], np.full(int((~r.crowd).sum()), 0.9, np.float32), r.classes[~r.crowd])
        for r in index.images
    ]
    metrics, curves = measure(index, perfect)
    measured = curves.measured
    assert metrics.stats["mAP50-95"] == pytest.approx(1.0)
    assert curves.precisions[measured] == pytest.approx(np.ones((len(measured), 101)))
    assert curves.f1[measured, : at(0.9)] == pytest.approx(np.ones((len(measured), at(0.9))))
    best = best_point(curves)
    assert best is not None and (best.f1, best.precision, best.recall) == pytest.approx((1.0, 1.0, 1.0))
    matrix = confusion_of(index, perfect).matrix
    assert matrix.tolist() == np.diag([*index.images.class_counts(3).tolist(), 0]).tolist()


def test_nothing_to_find_has_no_best_confidence() -> None:
    """Loss: a crash, or a recommendation out of nothing."""
    index = Index("test", (Category(1, "cat"),), Records.of([make_record(1, Path("a.jpg"), 9, 9, [], [])]))
    _, curves = measure(index, [])
    assert best_point(curves) is None and not len(curves.measured)
