"""Which anchor points learn which object: task-aligned assignment (Feng et al. 2021, TOOD, arXiv 2108.07755)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gai_yolo.detector.boxes import complete_iou

TOP_K = 10
ALPHA, BETA = 0.5, 6.0
SMALLEST_SIDE = 16.0
"""A box narrower than this many pixels is widened to it when looking for candidate points, else it might contain none."""


@dataclass(frozen=True)
class Assignment:
    """The points that learn an object; P of them over the whole batch."""

    image: Tensor
    """(P,) position in the batch."""
    point: Tensor
    """(P,) anchor point."""
    box: Tensor
    """(P,) row of the ground-truth boxes."""
    score: Tensor
    """(P,) target score of the box's class, 0..1."""


@torch.no_grad()
def assign(probabilities: Tensor, predicted: Tensor, points: Tensor, box_image: Tensor, classes: Tensor, boxes: Tensor) -> Assignment:
    """Assign anchor points to ground-truth boxes.

    Candidates of a box are the points strictly inside it. Each box claims the `TOP_K` candidates of the highest
    score^0.5 x CIoU^6. A point claimed more than once goes to the box with the highest CIoU among all that contain it,
    even one that did not claim it (so the worked reference case says).

    Args:
        probabilities: (B, A, classes) predicted class probabilities.
        predicted: (B, A, 4) predicted boxes, xyxy in pixels.
        points: (A, 2) anchor points in pixels.
        box_image: (M,) image of each ground-truth box; classes: (M,); boxes: (M, 4) xyxy in pixels.
    """
    num_boxes, num_points = len(boxes), len(points)
    candidate = _inside(points, boxes)
    box, point = candidate.nonzero(as_tuple=True)
    image = box_image[box]
    overlap = complete_iou(boxes[box], predicted[image, point]).clamp(min=0)
    metric = probabilities[image, point, classes[box]] ** ALPHA * overlap**BETA

    # Points outside come last in the ranking, behind candidates whose metric is zero.
    ranking = metric.new_full((num_boxes, num_points), -1.0)
    ranking[box, point] = metric
    top = ranking.topk(min(TOP_K, num_points), dim=1).indices
    claimed = torch.zeros_like(candidate).scatter_(1, top, True)[box, point]

    key = image * num_points + point
    claims = torch.zeros(predicted.shape[0] * num_points, dtype=torch.long, device=key.device).index_add_(0, key, claimed.long())
    contested = (claims[key] > 1).nonzero(as_tuple=True)[0]
    owner = claimed.index_put((contested,), _highest(key[contested], overlap[contested]))
    best_metric, best_overlap = (_largest(values, box, point, owner, candidate.shape) for values in (metric, overlap))
    box, point, image, overlap, metric = (t[owner] for t in (box, point, image, overlap, metric))
    score = metric * best_overlap[box] / (best_metric[box] + 1e-9)
    return Assignment(image, point, box, score)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(M, A) whether each point lies strictly inside each (widened) box."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).clamp(min=SMALLEST_SIDE) / 2
    low, high = centre - half, centre + half
    return ((points > low[:, None] + 1e-9) & (points < high[:, None] - 1e-9)).all(dim=-1)


def _largest(values: Tensor, box: Tensor, point: Tensor, owner: Tensor, shape: torch.Size) -> Tensor:
    """(M,) the largest value, or 0, of each box over the points that it owns. (`scatter_reduce` would need no table `(M, A)`, but PyTorch
    refuses it on a GPU where deterministic algorithms are asked for.)"""
    table = values.new_zeros(shape)
    table[box, point] = values.where(owner, 0.0)
    return table.amax(dim=1)


def _highest(key: Tensor, overlap: Tensor) -> Tensor:
    """Mask of the candidates with the highest overlap of their key, the first one among equals."""
    by_overlap = overlap.argsort(descending=True, stable=True)
    order = by_overlap[key[by_overlap].argsort(stable=True)]
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[order][1:] != key[order][:-1]
    return torch.zeros_like(first).index_put((order,), first)
