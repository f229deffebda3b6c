"""The loss is the published one, in values and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gai_yolo.detector.assigner import assign
from gai_yolo.detector.boxes import anchor_points, boxes_from_distances, complete_iou, distances_to_sides
from gai_yolo.detector.head import RawPredictions
from gai_yolo.detector.loss import DetectionLoss

Case = dict[str, Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    """The worked case: 2 images of 128 px, 3 classes, 336 points."""
    with np.load(Path(__file__).parents[1] / "reference" / "loss_case.npz") as arrays:
        tensors = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    size = float(tensors["image_size"])
    cxcywh = tensors["gt_cxcywh"]
    tensors["boxes"] = torch.cat((cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2), dim=1) * size
    return tensors


def _assignment_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    points, strides = anchor_points(128, 128, torch.device("cpu"))
    logits = case["box_logits"].transpose(1, 2).unflatten(2, (4, 16))
    distances = logits.softmax(-1) @ torch.arange(16.0)
    return case["class_logits"].transpose(1, 2).sigmoid(), boxes_from_distances(points, distances * strides[:, None]), points


def test_assignment_equals_the_worked_case(case: Case) -> None:
    """Other positives would train another detector."""
    probabilities, predicted, points = _assignment_inputs(case)
    found = assign(probabilities, predicted, points, case["gt_image"], case["gt_class"], case["boxes"])
    positive = torch.zeros(2, 336, dtype=torch.bool)
    positive[found.image, found.point] = True
    assert torch.equal(positive, case["positive"])
    torch.testing.assert_close(case["boxes"][found.box], case["assigned_box_xyxy"][found.image, found.point], atol=1e-4, rtol=0)
    scores = torch.zeros(2, 336, 3)
    scores[found.image, found.point, case["gt_class"][found.box]] = found.score
    torch.testing.assert_close(scores, case["target_scores"].float(), atol=1e-4, rtol=1e-4)


def test_loss_and_gradients_equal_the_worked_case(case: Case) -> None:
    """Released learning rates belong to exactly this loss."""
    raw = RawPredictions(case["box_logits"].clone().requires_grad_(), case["class_logits"].clone().requires_grad_())
    sums = DetectionLoss()(raw, 128, 128, case["gt_image"], case["gt_class"], case["boxes"])
    assert sums.target_scores.item() == pytest.approx(case["target_score_sum"].item(), rel=1e-4)
    parts = sums.detached()[:3] / sums.target_scores.clamp(min=1)
    torch.testing.assert_close(parts, case["loss_box_cls_dfl"], atol=1e-4, rtol=1e-4)
    total = sums.total / sums.target_scores.clamp(min=1) * 2
    assert total.item() == pytest.approx(case["total_times_batch"].item(), rel=1e-4)
    total.backward()
    torch.testing.assert_close(raw.box_logits.grad, case["grad_box_logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(raw.class_logits.grad, case["grad_class_logits"], atol=1e-4, rtol=1e-4)


def test_loss_sums_add_up_over_any_split_of_the_batch(case: Case) -> None:
    """Otherwise the gradient would depend on the micro-batch size and the world size."""
    loss = DetectionLoss()
    whole = loss(RawPredictions(case["box_logits"], case["class_logits"]), 128, 128, case["gt_image"], case["gt_class"], case["boxes"])
    parts = torch.zeros(4, dtype=torch.float64)
    for image in range(2):
        mine = case["gt_image"] == image
        raw = RawPredictions(case["box_logits"][image : image + 1], case["class_logits"][image : image + 1])
        parts += loss(raw, 128, 128, case["gt_image"][mine] * 0, case["gt_class"][mine], case["boxes"][mine]).detached()
    torch.testing.assert_close(parts, whole.detached(), rtol=1e-6, atol=1e-5)


def test_images_without_boxes_train_the_background(case: Case) -> None:
    """An image without objects must lower its scores and never divide by zero."""
    raw = RawPredictions(case["box_logits"].clone().requires_grad_(), case["class_logits"].clone().requires_grad_())
    none = torch.zeros(0, dtype=torch.long)
    sums = DetectionLoss()(raw, 128, 128, none, none, torch.zeros(0, 4))
    assert sums.box.item() == sums.dfl.item() == sums.target_scores.item() == 0.0
    sums.total.backward()
    assert raw.class_logits.grad is not None and (raw.class_logits.grad > 0).all()
    assert raw.box_logits.grad is not None and not raw.box_logits.grad.any()


def test_no_point_is_assigned_twice_and_every_claim_is_inside() -> None:
    """Crowded identical boxes are where claims collide."""
    generator = torch.Generator().manual_seed(0)
    points, _ = anchor_points(64, 64, torch.device("cpu"))
    boxes = torch.tensor([[4.0, 4.0, 60.0, 60.0]] * 5 + [[20.0, 20.0, 23.0, 23.0]])
    predicted = boxes_from_distances(points, torch.rand(1, len(points), 4, generator=generator) * 40)
    probabilities = torch.rand(1, len(points), 2, generator=generator)
    classes = torch.tensor([0, 0, 1, 1, 0, 1])
    found = assign(probabilities, predicted, points, torch.zeros(6, dtype=torch.long), classes, boxes)
    assert len(found.point.unique()) == len(found.point) > 0
    assert 5 in found.box, "a 3 px box between the cells still finds points"
    assert ((found.score >= 0) & (found.score <= 1)).all()


def test_complete_iou_of_known_pairs() -> None:
    """CIoU is 1 for equal boxes and falls below IoU with distance and shape."""
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert complete_iou(a, a).item() == pytest.approx(1.0, abs=1e-5)
    # Disjoint, equal shape: -distance^2 / diagonal^2 of the hull = -(20^2 + 0) / (30^2 + 10^2).
    assert complete_iou(a, a + torch.tensor([20.0, 0.0, 20.0, 0.0])).item() == pytest.approx(-0.4, abs=1e-5)


def test_distances_and_boxes_are_inverse() -> None:
    """Encoding and decoding must agree on the order of the sides."""
    points = torch.tensor([[10.0, 20.0]])
    distances = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(boxes_from_distances(points, distances), torch.tensor([[9.0, 18.0, 13.0, 24.0]]))
    assert torch.equal(distances_to_sides(points, boxes_from_distances(points, distances)), distances)
