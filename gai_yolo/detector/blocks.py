"""The building blocks of YOLO12 (Tian, Ye, Doermann, arXiv 2502.12524).

Attribute names (`cv1`, `m`, `attn.qkv`, ...) are those of the released state dicts, so that weights load by name.
All blocks map `(B, c_in, H, W)` to `(B, c_out, H', W')`; spatial size changes only where a stride is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEAD_CHANNELS = 32
"""Of an attention head, where there are so many."""


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU (or no activation)."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if activate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Two 3x3 convolutions with a residual connection where the channels allow it."""

    def __init__(self, c_in: int, c_out: int, expansion: float = 0.5) -> None:
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 3)
        self.cv2 = Conv(hidden, c_out, 3)
        self.residual = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.residual else y


class C3k(nn.Module):
    """Cross-stage block: one of two 1x1 paths goes through two bottlenecks."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(c_in, hidden)
        self.cv3 = Conv(2 * hidden, c_out)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, expansion=1.0) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))  # type: ignore[no-any-return]


class C3k2(nn.Module):
    """Split in two, chain `repeats` units on the last part, concatenate every intermediate result."""

    def __init__(self, c_in: int, c_out: int, repeats: int, c3k: bool, expansion: float = 0.5) -> None:
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, 2 * hidden)
        self.cv2 = Conv((2 + repeats) * hidden, c_out)
        self.m = nn.ModuleList(C3k(hidden, hidden) if c3k else Bottleneck(hidden, hidden) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, dim=1))
        for unit in self.m:
            parts.append(unit(parts[-1]))
        return self.cv2(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


class AreaAttention(nn.Module):
    """Self-attention inside `areas` horizontal strips of the feature map, plus a convolutional position term on the values.

    H x W must be divisible by `areas`; inputs whose sides are multiples of 32 pixels always are.
    """

    def __init__(self, channels: int, areas: int) -> None:
        super().__init__()
        self.head_channels = min(channels, HEAD_CHANNELS)
        self.heads = channels // self.head_channels
        self.areas = areas
        self.qkv = Conv(channels, 3 * channels, activate=False)
        self.proj = Conv(channels, channels, activate=False)
        self.pe = Conv(channels, channels, kernel=7, groups=channels, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        length = height * width // self.areas
        # Row-major positions, so that a contiguous chunk of them is a horizontal strip; each head's q, k, v lie together.
        tokens = self.qkv(x).flatten(2).transpose(1, 2)
        tokens = tokens.reshape(batch * self.areas, length, self.heads, 3 * self.head_channels)
        q, k, v = tokens.split(self.head_channels, dim=-1)
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self.proj(self._to_map(out, x) + self.pe(self._to_map(v, x)))  # type: ignore[no-any-return]

    @staticmethod
    def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
        batch, channels, height, width = like.shape
        return tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class ABlock(nn.Module):
    """Area attention and a convolutional MLP, each with a residual connection."""

    def __init__(self, channels: int, mlp_ratio: float, areas: int) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.attn = AreaAttention(channels, areas)
        self.mlp = nn.Sequential(Conv(channels, hidden), Conv(hidden, channels, activate=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class A2C2f(nn.Module):
    """R-ELAN: chain units and concatenate every intermediate result; optionally scaled and added to the input.

    Args:
        areas: strips of the attention, or None for units without attention.
        mlp_ratio: hidden channels of the MLP over its input channels.
        scaled_residual: output = x + gamma * block(x) (needs c_in == c_out), gamma starting at 0.01.
    """

    def __init__(
        self, c_in: int, c_out: int, repeats: int, areas: int | None, mlp_ratio: float = 2.0, scaled_residual: bool = False
    ) -> None:
        super().__init__()
        hidden = c_out // 2
        assert areas is None or hidden % min(hidden, HEAD_CHANNELS) == 0, f"{hidden} channels do not split into heads of {HEAD_CHANNELS}"
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv((1 + repeats) * hidden, c_out)
        self.m = nn.ModuleList(
            C3k(hidden, hidden) if areas is None else nn.Sequential(*(ABlock(hidden, mlp_ratio, areas) for _ in range(2)))
            for _ in range(repeats)
        )
        self.gamma = nn.Parameter(torch.full((c_out,), 0.01)) if scaled_residual else None

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for unit in self.m:
            parts.append(unit(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, dim=1))
        return y if self.gamma is None else x + self.gamma.view(1, -1, 1, 1) * y
