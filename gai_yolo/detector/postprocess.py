"""From decoded predictions to detections: confidence threshold and class-wise non-maximum suppression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CANDIDATES = 30_000
"""Boxes of one image that enter non-maximum suppression, the highest scores first: bounds time and memory."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, by descending score."""

    boxes: Tensor
    """(N, 4) xyxy in pixels of the network input."""
    scores: Tensor
    """(N,) 0..1."""
    classes: Tensor
    """(N,) int64."""


@torch.no_grad()
def select_detections(
    boxes: Tensor, probabilities: Tensor, confidence: float = 0.001, iou: float = 0.7, max_detections: int = 300
) -> list[Detections]:
    """Keep the detections of each image; one box may be kept for several classes.

    Args:
        boxes: (B, A, 4) xyxy; probabilities: (B, A, classes).
        confidence: scores at or below it are dropped; iou: boxes of one class that overlap more than this are one object.
    """
    # Takes seconds to import, which a job that has just been started again does not have before its first step.
    from torchvision.ops import batched_nms

    results = []
    for image_boxes, image_probabilities in zip(boxes, probabilities, strict=True):
        point, label = (image_probabilities > confidence).nonzero(as_tuple=True)
        scores = image_probabilities[point, label]
        # Stable, so that equal scores keep the order of points whatever the library.
        order = scores.sort(descending=True, stable=True).indices[:MAX_CANDIDATES]
        point, label, scores = point[order], label[order], scores[order]
        # torchvision moves classes apart by the largest coordinate, which is too little where coordinates are negative.
        candidates = image_boxes[point] - image_boxes.min()
        keep = batched_nms(candidates, scores, label, iou)[:max_detections]
        results.append(Detections(image_boxes[point[keep]], scores[keep], label[keep]))
    return results


def to_file_pixels(boxes: Tensor, letterbox: Tensor, width: int, height: int) -> Tensor:
    """Boxes `(N, 4)` xyxy in pixels of the network input, in those of the image file, and inside of it.

    Args:
        letterbox: (3,): scale, left and top padding in pixels, with x_input = x_file * scale + left.
        width, height: of the image file, in pixels.
    """
    scale, left, top = letterbox.tolist()
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(((boxes - boxes.new_tensor([left, top, left, top])) / scale).clamp(min=0), limit)
