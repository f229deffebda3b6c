"""The detection head: three levels of box distributions and class logits, and their decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gai_yolo.detector.blocks import Conv
from gai_yolo.detector.boxes import STRIDES, anchor_points, boxes_from_distances

REG_MAX = 16
BOX_CHANNELS = 4 * REG_MAX
"""Fewest hidden channels of a box branch in the published sizes."""


class RawPredictions(NamedTuple):
    """What the network says, before decoding; A anchor points in the order of strides 8, 16, 32, row-major."""

    box_logits: Tensor
    """(B, 64, A): 16 bins for each of left, top, right, bottom."""
    class_logits: Tensor
    """(B, classes, A)."""


class DistributionExpectation(nn.Module):
    """Expected distance of a 16-bin distribution, `(..., 16)` logits -> `(...)` in strides (Li et al. 2020, arXiv 2006.04388).

    The weights 0..15 are a frozen parameter under the name that released weights give it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(REG_MAX, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data.copy_(torch.arange(REG_MAX, dtype=torch.float32).view(1, REG_MAX, 1, 1))

    def forward(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1) @ self.conv.weight.view(REG_MAX)


class Detect(nn.Module):
    """Two branches on each of three feature maps.

    Args:
        channels: of the P3, P4, P5 feature maps.
        box_channels: fewest hidden ones of a box branch.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], box_channels: int = BOX_CHANNELS) -> None:
        super().__init__()
        self.num_classes = num_classes
        hidden_box = max(channels[0] // 4, box_channels)
        hidden_class = max(channels[0], min(num_classes, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, hidden_box, 3), Conv(hidden_box, hidden_box, 3), nn.Conv2d(hidden_box, 4 * REG_MAX, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(Conv(c, c, 3, groups=c), Conv(c, hidden_class)),
                nn.Sequential(Conv(hidden_class, hidden_class, 3, groups=hidden_class), Conv(hidden_class, hidden_class)),
                nn.Conv2d(hidden_class, num_classes, 1),
            )
            for c in channels
        )
        self.dfl = DistributionExpectation()
        # About five objects on a 640 px image are expected before anything is learned.
        for box_branch, class_branch, stride in zip(self.cv2, self.cv3, STRIDES, strict=True):
            nn.init.constant_(box_branch[-1].bias, 1.0)  # type: ignore[index]
            nn.init.constant_(class_branch[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))  # type: ignore[index]

    def forward(self, features: Sequence[Tensor]) -> RawPredictions:
        """Feature maps `(B, c, H/stride, W/stride)` of the three strides to raw predictions."""
        boxes = [branch(x).flatten(2) for branch, x in zip(self.cv2, features, strict=True)]
        classes = [branch(x).flatten(2) for branch, x in zip(self.cv3, features, strict=True)]
        return RawPredictions(torch.cat(boxes, dim=2), torch.cat(classes, dim=2))

    def decode(self, raw: RawPredictions, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Boxes `(B, A, 4)` xyxy in pixels of the `height` x `width` input, and probabilities `(B, A, classes)`."""
        return self.decode_at(raw, *anchor_points(height, width, raw.box_logits.device))

    def decode_at(self, raw: RawPredictions, points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the anchor points given, as `anchor_points` returns them."""
        logits = raw.box_logits.float().transpose(1, 2).reshape(raw.box_logits.shape[0], -1, 4, REG_MAX)
        distances = self.dfl(logits) * strides[:, None]
        return boxes_from_distances(points, distances), raw.class_logits.float().sigmoid().transpose(1, 2)
