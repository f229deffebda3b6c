"""CIoU + classification + distribution focal loss, as sums: whoever knows the whole global batch divides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from gai_yolo.detector.assigner import assign
from gai_yolo.detector.boxes import anchor_points, boxes_from_distances, complete_iou, distances_to_sides
from gai_yolo.detector.head import REG_MAX, RawPredictions


@dataclass(frozen=True)
class LossSums:
    """Un-normalised loss of some images; the loss of a batch is the sum over its parts divided by `max(target_scores, 1)`."""

    box: Tensor
    """Scalar: gain x sum of target score x (1 - CIoU)."""
    cls: Tensor
    """Scalar: gain x binary cross entropy summed over all points and classes."""
    dfl: Tensor
    """Scalar: gain x sum of target score x distribution focal loss."""
    target_scores: Tensor
    """Scalar, without gradient: sum of all target scores."""

    @property
    def total(self) -> Tensor:
        """What is differentiated."""
        return self.box + self.cls + self.dfl

    def detached(self) -> Tensor:
        """(4,) float64: box, cls, dfl, target scores, to be summed over micro-batches and ranks."""
        return torch.stack((self.box, self.cls, self.dfl, self.target_scores)).detach().double()


def normalised(sums: Tensor) -> dict[str, float]:
    """Losses of summed `LossSums.detached()`: box, cls and dfl over max(target scores, 1), and their sum `total`."""
    box, cls, dfl, target_scores = sums.tolist()
    losses = {name: value / max(target_scores, 1.0) for name, value in (("box", box), ("cls", cls), ("dfl", dfl))}
    return {"total": sum(losses.values()), **losses}


@dataclass(frozen=True, eq=False)
class DetectionLoss:
    """The loss of YOLO12 on raw predictions, with weights of its three terms."""

    box_gain: float = 7.5
    cls_gain: float = 0.5
    dfl_gain: float = 1.5
    class_weights: Tensor | None = None
    """(classes,), on the device of the predictions: of each class's part of the classification term; None: all 1."""

    def __call__(self, raw: RawPredictions, height: int, width: int, box_image: Tensor, classes: Tensor, boxes: Tensor) -> LossSums:
        """Loss sums of one micro-batch, in float32 whatever the autocast type.

        Args:
            raw: predictions for images of `height` x `width` pixels.
            box_image: (M,) image of each ground-truth box; classes: (M,) int64; boxes: (M, 4) xyxy in pixels.
        """
        box_logits = raw.box_logits.float().transpose(1, 2).reshape(len(raw.box_logits), -1, 4, REG_MAX)
        class_logits = raw.class_logits.float().transpose(1, 2)
        points, strides = anchor_points(height, width, box_logits.device)
        bins = torch.arange(REG_MAX, dtype=torch.float32, device=box_logits.device)
        predicted = boxes_from_distances(points, (box_logits.softmax(dim=-1) @ bins) * strides[:, None])

        found = assign(class_logits.detach().sigmoid(), predicted.detach(), points, box_image, classes, boxes)
        targets = torch.zeros_like(class_logits)
        targets[found.image, found.point, classes[found.box]] = found.score
        cls = binary_cross_entropy_with_logits(class_logits, targets, self.class_weights, reduction="sum")

        target = boxes[found.box]
        overlap = complete_iou(predicted[found.image, found.point], target)
        box = ((1 - overlap) * found.score).sum()
        sides = distances_to_sides(points[found.point], target) / strides[found.point, None]
        focal = distribution_focal_loss(box_logits[found.image, found.point], sides)
        dfl = (focal * found.score).sum()
        return LossSums(self.box_gain * box, self.cls_gain * cls, self.dfl_gain * dfl, found.score.sum())


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross entropy against the two bins next to the target (Li et al. 2020, arXiv 2006.04388, eq. 6), mean over four sides.

    Args:
        logits: (P, 4, 16); distances: (P, 4) in strides, clamped to 0..14.99.

    Returns:
        (P,).
    """
    distances = distances.clamp(0, REG_MAX - 1 - 0.01)
    left = distances.floor().long()
    weight_right = distances - left
    flat = logits.reshape(-1, REG_MAX)
    to_left = cross_entropy(flat, left.reshape(-1), reduction="none").view(left.shape)
    to_right = cross_entropy(flat, left.reshape(-1) + 1, reduction="none").view(left.shape)
    return (to_left * (1 - weight_right) + to_right * weight_right).mean(dim=-1)
