"""From decoded predictions to detections."""

from __future__ import annotations

import torch

from gai_yolo.detector.postprocess import select_detections

BOXES = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.5], [20.0, 20.0, 30.0, 30.0]]])


def test_overlapping_boxes_of_one_class_are_one_object() -> None:
    """Doubled detections halve the precision."""
    probabilities = torch.tensor([[[0.8, 0.0], [0.9, 0.0], [0.7, 0.0]]])
    found = select_detections(BOXES, probabilities)[0]
    assert found.scores.tolist() == torch.tensor([0.9, 0.7]).tolist()
    assert torch.equal(found.boxes, BOXES[0, [1, 2]])


def test_classes_do_not_suppress_each_other_and_a_box_may_have_several() -> None:
    """COCO scores every class of a box on its own."""
    probabilities = torch.tensor([[[0.8, 0.6], [0.0, 0.5], [0.0, 0.0]]])
    found = select_detections(BOXES, probabilities)[0]
    assert list(zip(found.classes.tolist(), found.boxes.tolist(), strict=True)) == [(0, BOXES[0, 0].tolist()), (1, BOXES[0, 0].tolist())]


def test_threshold_and_maximum_keep_the_highest_scores() -> None:
    """The cut must fall on the worst detections."""
    boxes = torch.arange(50.0)[:, None] * 20 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    scores = torch.linspace(0.0, 0.98, 50)
    found = select_detections(boxes[None], scores[None, :, None], confidence=0.5, max_detections=7)[0]
    assert found.scores.tolist() == scores.flip(0)[:7].tolist()
    assert select_detections(boxes[None], scores[None, :, None], confidence=0.5)[0].scores.min() > 0.5


def test_nothing_found_gives_empty_detections_for_each_image() -> None:
    """An image without detections must stay in the list."""
    found = select_detections(BOXES.repeat(2, 1, 1), torch.zeros(2, 3, 2))
    assert [one.boxes.shape for one in found] == [(0, 4), (0, 4)]
