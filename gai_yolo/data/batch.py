"""What the loader hands to the training step and to evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """Images of one size with the boxes of all of them in one list."""

    images: Tensor
    """(B, 3, S, S) uint8, RGB."""
    box_image: Tensor
    """(M,) int64: the position in the batch of the image each box belongs to."""
    classes: Tensor
    """(M,) int64 class positions."""
    boxes: Tensor
    """(M, 4) float32 xyxy in pixels of the network input."""
    image_ids: Tensor
    """(B,) int64 ids as in the index."""
    letterbox: Tensor
    """(B, 3) float32: scale, left padding and top padding in pixels, with x_input = x_file * scale + left. Evaluation only."""
    unreadable: Tensor
    """(K,) int64 ids of images that could not be decoded and were replaced by grey without boxes."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; asynchronous from pinned memory."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins memory."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))
