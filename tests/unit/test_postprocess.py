"""From probabilities to detections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gai_yolo.detector.postprocess import MAX_CANDIDATES, Detections, select_detections


def one(boxes: list[list[float]], probabilities: list[list[float]], **settings: float) -> Detections:
    """Detections of a single image."""
    (found,) = select_detections(torch.tensor([boxes]), torch.tensor([probabilities]), **settings)  # type: ignore[arg-type]
    return found


def rows(found: Detections) -> list[tuple[float, int, list[float]]]:
    assert len(found.boxes) == len(found.scores) == len(found.classes)
    return [(round(s, 4), c, b) for s, c, b in zip(found.scores.tolist(), found.classes.tolist(), found.boxes.tolist(), strict=True)]


A, ALMOST_A, B = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]


def test_of_overlapping_boxes_of_one_class_the_best_stays() -> None:
    """Loss: every object is found many times."""
    found = one([ALMOST_A, A, B], [[0.6, 0.0], [0.9, 0.0], [0.3, 0.0]])
    assert rows(found) == [(0.9, 0, A), (0.3, 0, B)]
    assert found.classes.dtype == torch.int64


def test_boxes_of_other_classes_do_not_suppress_each_other() -> None:
    """Loss: a rider hides the horse."""
    assert rows(one([A, ALMOST_A], [[0.9, 0.0], [0.0, 0.8]])) == [(0.9, 0, A), (0.8, 1, ALMOST_A)]


@pytest.mark.parametrize("end", [64.0, 129.0])
def test_boxes_of_other_classes_do_not_suppress_each_other_beyond_the_border(end: float) -> None:
    """Loss: a box that reaches over the left or upper border vanishes behind an object of another class."""
    over_the_border, last = [-65.0, -65.0, -1.0, -1.0], [end - 1, end - 1, end, end]
    assert len(rows(one([[0.0, 0.0, 64.0, 64.0], over_the_border, last], [[0.9, 0.0], [0.0, 0.8], [0.7, 0.0]]))) == 3


def test_one_box_may_have_several_classes() -> None:
    """Loss: recall, where COCO counts each class by itself."""
    assert rows(one([A, B], [[0.7, 0.9, 0.0005], [0.0, 0.0, 0.5]])) == [(0.9, 1, A), (0.7, 0, A), (0.5, 2, B)]


@pytest.mark.parametrize(("iou", "kept"), [(0.89, 1), (0.91, 2), (1.0, 2)])
def test_overlap_is_compared_with_the_threshold(iou: float, kept: int) -> None:
    """Loss: neighbours in a crowd suppressed by a threshold that is not the configured one."""
    assert len(rows(one([A, ALMOST_A], [[0.9], [0.8]], iou=iou))) == kept


def test_scores_at_or_below_the_threshold_are_dropped() -> None:
    """Loss: thousands of detections of nothing; or the threshold of the command line is not the one used."""
    boxes = [A, B, [100.0, 0.0, 110.0, 10.0]]
    assert rows(one(boxes, [[0.25], [0.26], [0.1]], confidence=0.25)) == [(0.26, 0, B)]
    assert len(rows(one(boxes, [[0.0011], [0.001], [0.0]]))) == 1, "0.001 by default"
    assert rows(one([A], [[float("nan")]])) == []


def test_the_best_detections_are_kept_in_order_of_their_scores() -> None:
    """Loss: with many objects the sure ones are cut off."""
    places = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(50)]
    scores = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    found = one(places, scores.tolist(), max_detections=7)
    assert len(rows(found)) == 7
    torch.testing.assert_close(found.scores, scores.flatten().sort(descending=True).values[:7])
    assert len(rows(one(places, scores.tolist(), max_detections=300))) == 100
    many = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(301)]
    assert len(rows(one(many, [[0.5]] * 301))) == 300, "by default"


def test_images_do_not_mix_and_may_be_without_detections() -> None:
    """Loss: an empty image ends the evaluation, or detections are counted for its neighbour."""
    boxes = torch.tensor([[A, B], [A, B], [B, A]])
    probabilities = torch.tensor([[[0.9], [0.0]], [[0.0], [0.0]], [[0.5], [0.6]]])
    first, empty, last = select_detections(boxes, probabilities)
    assert rows(first) == [(0.9, 0, A)]
    assert rows(empty) == [] and empty.boxes.shape == (0, 4) and empty.classes.dtype == torch.int64
    assert rows(last) == [(0.6, 0, A), (0.5, 0, B)]
    assert select_detections(torch.zeros(0, 3, 4), torch.zeros(0, 3, 2)) == []


def test_equal_scores_keep_the_order_of_points() -> None:
    """Loss: results that differ from machine to machine in nothing but ties."""
    places = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(40)]
    found = one(places, [[0.5]] * 40)
    assert found.boxes[:, 0].tolist() == [20.0 * i for i in range(40)]


def by_hand(boxes: Tensor, scores: Tensor, iou: float) -> list[int]:
    """Greedy suppression as in the textbook."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        x1, y1 = torch.maximum(boxes[i, :2], boxes[kept, :2]).unbind(-1)
        x2, y2 = torch.minimum(boxes[i, 2:], boxes[kept, 2:]).unbind(-1)
        inside = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if not (inside / (area[i] + area[kept] - inside) > iou).any():
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_the_textbooks(seed: int) -> None:
    """Loss: a faster library that keeps other boxes."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(150, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + 5 + 20 * torch.rand(150, 2, generator=generator)), dim=1)
    probabilities = torch.rand(150, 3, generator=generator)
    (found,) = select_detections(boxes[None], probabilities[None], confidence=0.2, iou=0.4)
    expected = set()
    for label in range(3):
        points = (probabilities[:, label] > 0.2).nonzero().flatten()
        expected |= {(label, points[i].item()) for i in by_hand(boxes[points], probabilities[points, label], 0.4)}
    points_found = [(boxes == box).all(dim=1).nonzero().item() for box in found.boxes]
    assert len(expected) == len(found.boxes) > 30
    assert set(zip(found.classes.tolist(), points_found, strict=True)) == expected


def test_an_untrained_networks_flood_of_candidates_is_bounded() -> None:
    """Loss: the first evaluation, where everything is above the threshold, takes hours and all memory."""
    count = MAX_CANDIDATES // 2 + 500
    place = torch.arange(count, dtype=torch.float32)
    boxes = torch.stack((place % 7, place % 5, place % 7 + 30, place % 5 + 30), dim=1)
    probabilities = torch.linspace(0.2, 0.9, 2 * count).view(count, 2)
    (found,) = select_detections(boxes[None], probabilities[None])
    assert 0 < len(found.boxes) <= 300
    assert found.scores[0].item() == pytest.approx(0.9)
