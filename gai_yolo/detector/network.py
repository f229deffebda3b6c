"""YOLO12: backbone with area attention, path-aggregation neck, three-level head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gai_yolo.detector.blocks import A2C2f, C3k2, Conv
from gai_yolo.detector.head import BOX_CHANNELS, Detect, RawPredictions


@dataclass(frozen=True)
class Scale:
    """Multipliers of one size of the network."""

    depth: float
    width: float
    max_channels: int
    c3k_everywhere: bool
    """C3k units in layers 2 and 4 too."""
    scaled_residual: bool
    """Learned residual scaling and the narrower MLP in the attention stages."""
    box_channels: int = BOX_CHANNELS
    """Fewest hidden channels of the head's box branches."""

    def channels(self, of_full: int) -> int:
        """Of a layer that has so many in a network whose width is 1: a multiple of 8."""
        return math.ceil(min(of_full, self.max_channels) * self.width / 8) * 8


SCALES = {
    "n": Scale(0.50, 0.25, 1024, False, False),
    "s": Scale(0.50, 0.50, 1024, False, False),
    "m": Scale(0.50, 1.00, 512, True, False),
    "l": Scale(1.00, 1.00, 512, True, True),
    "x": Scale(1.00, 1.50, 512, True, True),
    "debug": Scale(0.25, 1 / 32, 512, False, False, box_channels=16),  # no published size: for tests, where nothing is learned
}
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Concat(nn.Module):
    """Concatenate along channels."""

    def forward(self, current: Tensor, skip: Tensor) -> Tensor:
        return torch.cat((current, skip), dim=1)


class YOLO12(nn.Module):
    """The detector.

    In training mode `model(images)` returns `RawPredictions`; in eval mode it returns boxes `(B, A, 4)` as xyxy in pixels
    of the input and probabilities `(B, A, classes)`, A = HW/64 + HW/256 + HW/1024 anchor points.

    Args:
        size: n, s, m, l or x; or debug, the same blocks with hardly a channel each.
        num_classes: at least 1.

    Raises:
        ValueError: unknown size or no classes.
    """

    def __init__(self, size: str = "n", num_classes: int = 80) -> None:
        super().__init__()
        if size not in SCALES:
            raise ValueError(f"unknown YOLO12 size {size!r}; choose one of {', '.join(SCALES)}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.size = size
        self.num_classes = num_classes
        self.model = _layers(SCALES[size], num_classes)

    @property
    def head(self) -> Detect:
        """The detection head."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    def forward(self, images: Tensor) -> RawPredictions | tuple[Tensor, Tensor]:
        """Images `(B, 3, H, W)`, RGB in 0..1, H and W multiples of 32.

        Raises:
            ValueError: H or W is no multiple of 32.
        """
        raw = self.raw(images)
        return raw if self.training else self.head.decode(raw, *images.shape[-2:])

    def raw(self, images: Tensor) -> RawPredictions:
        """Undecoded predictions in either mode; arguments and errors as in `forward`."""
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError(f"image sides must be multiples of 32, got {images.shape[-2]} x {images.shape[-1]}")
        m = self.model
        p3 = m[4](m[3](m[2](m[1](m[0](images)))))
        p4 = m[6](m[5](p3))
        p5 = m[8](m[7](p4))
        up4 = m[11](m[10](m[9](p5), p4))
        out3 = m[14](m[13](m[12](up4), p3))
        out4 = m[17](m[16](m[15](out3), up4))
        out5 = m[20](m[19](m[18](out4), p5))
        raw: RawPredictions = m[21]((out3, out4, out5))
        return raw


def _layers(scale: Scale, num_classes: int) -> nn.ModuleList:
    width = scale.channels

    def repeats(count: int) -> int:
        return max(round(count * scale.depth), 1)

    def attention(channels: int, areas: int) -> A2C2f:
        mlp_ratio = 1.2 if scale.scaled_residual else 2.0
        return A2C2f(width(channels), width(channels), repeats(4), areas, mlp_ratio, scale.scaled_residual)

    def fusion(c_in: int, channels: int) -> A2C2f:
        return A2C2f(c_in, width(channels), repeats(2), areas=None)

    def downsample(channels: int, to: int) -> Conv:
        return Conv(width(channels), width(to), 3, 2)

    p3, p4, p5, n3 = width(512), width(512), width(1024), width(256)
    return nn.ModuleList(
        (
            Conv(3, width(64), 3, 2),
            downsample(64, 128),
            C3k2(width(128), width(256), repeats(2), scale.c3k_everywhere, expansion=0.25),
            downsample(256, 256),
            C3k2(width(256), p3, repeats(2), scale.c3k_everywhere, expansion=0.25),
            downsample(512, 512),
            attention(512, areas=4),
            downsample(512, 1024),
            attention(1024, areas=1),
            nn.Upsample(scale_factor=2, mode="nearest"),
            Concat(),
            fusion(p5 + p4, 512),
            nn.Upsample(scale_factor=2, mode="nearest"),
            Concat(),
            fusion(p4 + p3, 256),
            downsample(256, 256),
            Concat(),
            fusion(n3 + p4, 512),
            downsample(512, 512),
            Concat(),
            C3k2(p4 + p5, p5, repeats(2), c3k=True),
            Detect(num_classes, (n3, p4, p5), scale.box_channels),
        )
    )


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The autocast context of `training.amp`; does nothing for `none`."""
    return torch.autocast(device.type, dtype=AMP_TYPES.get(amp, torch.bfloat16), enabled=amp != "none")


def to_input(images: Tensor, channels_last: bool) -> Tensor:
    """uint8 images `(B, 3, H, W)` to float 0..1, contiguous or channels-last in memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=memory_format).div_(255)
