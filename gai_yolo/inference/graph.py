"""The network as other programs are to see it: images to boxes and scores, or to detections, in operations that every format has."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gai_yolo.detector import YOLO12
from gai_yolo.detector.blocks import Conv


@dataclass(frozen=True)
class Selection:
    """Thresholds of the non-maximum suppression inside of a file, as `select_detections` takes them."""

    confidence: float = 0.25
    """Scores at or below it are dropped."""
    iou: float = 0.7
    """Boxes of one class that overlap more than this are one object."""
    max_detections: int = 300
    """Kept for one image; outputs have this many rows."""


def deployable(network: YOLO12, half: bool) -> YOLO12:
    """A copy for use only: each BatchNorm is part of the convolution before it.

    Args:
        half: in fp16, but for the decoding of boxes, whose numbers of pixels fp16 does not hold to less than half a pixel.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for block in network.modules():
        if isinstance(block, Conv):
            # In float32, so that fp16 rounds once.
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()  # type: ignore[assignment]
    if half:
        network.half()
        network.head.dfl.float()
    return network


def in_float64(network: YOLO12) -> YOLO12:
    """A copy that computes in float64 what `Detect.decode` then makes boxes and scores of, in float32."""
    network = copy.deepcopy(network).double()
    network.head.dfl.float()
    return network


def number_format(network: nn.Module) -> torch.dtype:
    """In which it computes, and takes images."""
    return next(network.parameters()).dtype


class Predicting(nn.Module):
    """Images `(B, 3, H, W)` RGB in 0..1 to boxes `(B, A, 4)` xyxy in pixels of the input, and scores `(B, A, classes)` in 0..1.
    Both are float32."""

    def __init__(self, network: YOLO12) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = self.network(images)
        return boxes, scores


class PredictingAnywhere(Predicting):
    """The same, to be traced: the anchor points come from a compiled function, since a trace would keep the device of its example."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.network.raw(images)
        points, strides = _compiled_anchor_points(images)
        return self.network.head.decode_at(raw, points, strides)


def _anchor_points(images: Tensor) -> tuple[Tensor, Tensor]:
    """`boxes.anchor_points` in TorchScript's language."""
    points: list[Tensor] = []
    strides: list[Tensor] = []
    for stride in [8, 16, 32]:
        ys = torch.arange(images.shape[2] // stride, device=images.device, dtype=torch.float32)
        xs = torch.arange(images.shape[3] // stride, device=images.device, dtype=torch.float32)
        y, x = torch.meshgrid([ys, xs], indexing="ij")
        points.append((torch.stack((x, y), dim=-1).view(-1, 2) + 0.5) * stride)
        strides.append(torch.full((x.numel(),), float(stride), device=images.device))
    return torch.cat(points), torch.cat(strides)


def _compiled_anchor_points(images: Tensor) -> tuple[Tensor, Tensor]:
    compiled = torch.jit.script(_anchor_points)  # is compiled once: PyTorch remembers it
    points, strides = compiled(images)
    return points, strides


def _suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, most: int) -> Tensor:
    """Greedy class-wise suppression in plain tensor operations, so that a file needs nothing but PyTorch.

    Args:
        boxes: `(N, 4)` xyxy, scores and labels `(N,)`, by descending score.

    Returns:
        Positions of at most `most` that are kept, by descending score.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = torch.arange(scores.shape[0], device=boxes.device)
    kept: list[Tensor] = []
    while left.shape[0] > 0 and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        top_left = torch.max(boxes[best, :2], boxes[left, :2])
        bottom_right = torch.min(boxes[best, 2:], boxes[left, 2:])
        overlap = (bottom_right - top_left).clamp(min=0.0).prod(dim=1)
        same = (overlap / (areas[best] + areas[left] - overlap) > iou) & (labels[left] == labels[best])
        left = left[~same]
    return torch.stack(kept) if len(kept) > 0 else left


class Selecting(nn.Module):
    """Images to the detections of each, for TorchScript; the same in ONNX's operators is `onnx_file.with_selection`.

    Returns boxes `(B, M, 4)`, scores `(B, M)`, classes `(B, M)` int64 and count `(B,)` int64, M = `max_detections`; rows from an image's
    count on are zeros.
    """

    def __init__(self, predicting: nn.Module, selection: Selection, most_candidates: int) -> None:
        super().__init__()
        self.predicting = predicting
        self.confidence, self.iou, self.max_detections = selection.confidence, selection.iou, selection.max_detections
        self.most_candidates = most_candidates

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes, scores = self.predicting(images)
        batch, most = boxes.shape[0], self.max_detections
        out_boxes = torch.zeros([batch, most, 4], device=boxes.device)
        out_scores = torch.zeros([batch, most], device=boxes.device)
        out_classes = torch.zeros([batch, most], dtype=torch.int64, device=boxes.device)
        count = torch.zeros([batch], dtype=torch.int64, device=boxes.device)
        for number in range(batch):
            found = (scores[number] > self.confidence).nonzero()
            point, label = found[:, 0], found[:, 1]
            values, order = torch.sort(scores[number][point, label], stable=True, dim=0, descending=True)
            order = order[: self.most_candidates]
            point, label, values = point[order], label[order], values[: self.most_candidates]
            keep = _suppressed(boxes[number][point], values, label, self.iou, most)
            kept = keep.shape[0]
            out_boxes[number, :kept] = boxes[number][point[keep]]
            out_scores[number, :kept] = values[keep]
            out_classes[number, :kept] = label[keep]
            count[number] = kept
        return out_boxes, out_scores, out_classes, count
