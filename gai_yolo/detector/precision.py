"""Number and memory formats of the network's input, the same in training and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The autocast context of `training.amp`; does nothing for `none`."""
    return torch.autocast(device.type, dtype=AMP_TYPES.get(amp, torch.bfloat16), enabled=amp != "none")


def to_input(images: Tensor, channels_last: bool) -> Tensor:
    """uint8 images `(B, 3, H, W)` to float 0..1, contiguous or channels-last in memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=memory_format).div_(255)
