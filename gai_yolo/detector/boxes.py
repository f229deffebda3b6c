"""Box geometry. Boxes are xyxy: left, top, right, bottom in pixels of the network input, unless said otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRIDES = (8, 16, 32)


def anchor_points(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of all cells of the three output grids, in the order of strides 8, 16, 32, row-major.

    Args:
        height, width: size of the network input in pixels, multiples of 32.

    Returns:
        points `(A, 2)` as x, y in pixels, and the stride of each, `(A,)`.
    """
    points, strides = [], []
    for stride in STRIDES:
        sides = (torch.arange(side // stride, device=device, dtype=torch.float32) for side in (height, width))
        y, x = torch.meshgrid(*sides, indexing="ij")
        points.append((torch.stack((x, y), dim=-1).view(-1, 2) + 0.5) * stride)
        strides.append(torch.full((x.numel(),), float(stride), device=device))
    return torch.cat(points), torch.cat(strides)


def boxes_from_distances(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes from the distances of their four sides to a point.

    Args:
        points: `(..., 2)`; distances: `(..., 4)` to left, top, right, bottom, in the same unit.

    Returns:
        `(..., 4)` xyxy.
    """
    left_top, right_bottom = distances.chunk(2, dim=-1)
    return torch.cat((points - left_top, points + right_bottom), dim=-1)


def distances_to_sides(points: Tensor, boxes: Tensor) -> Tensor:
    """The inverse of `boxes_from_distances`: `(..., 4)`; negative where the point is outside."""
    left_top, right_bottom = boxes.chunk(2, dim=-1)
    return torch.cat((points - left_top, right_bottom - points), dim=-1)


def complete_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """CIoU of pairs of boxes (Zheng et al. 2020, "Distance-IoU Loss", eq. 10 to 12).

    Args:
        a, b: `(..., 4)` xyxy.

    Returns:
        `(...)`, from -1.5 to 1. The trade-off weight alpha carries no gradient, as in the paper.
    """
    a_w, a_h = a[..., 2] - a[..., 0], a[..., 3] - a[..., 1]
    b_w, b_h = b[..., 2] - b[..., 0], b[..., 3] - b[..., 1]
    overlap_w = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    overlap_h = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    intersection = overlap_w.clamp(min=0) * overlap_h.clamp(min=0)
    iou = intersection / (a_w * a_h + b_w * b_h - intersection + eps)
    hull_w = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    hull_h = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    offset_x = a[..., 0] + a[..., 2] - b[..., 0] - b[..., 2]
    offset_y = a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]
    distance = (offset_x**2 + offset_y**2) / 4 / (hull_w**2 + hull_h**2 + eps)
    shape = (4 / math.pi**2) * (torch.atan(b_w / (b_h + eps)) - torch.atan(a_w / (a_h + eps))) ** 2
    with torch.no_grad():
        alpha = shape / (shape - iou + (1 + eps))
    return iou - (distance + alpha * shape)
