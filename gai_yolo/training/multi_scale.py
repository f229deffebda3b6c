"""The side of the network's input as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STRIDE = 32
STREAM = 0x5CA1E
"""Keeps these draws apart from all others that follow from the seed."""


@dataclass(frozen=True)
class InputSize:
    """What `augment.multi_scale` says."""

    image_size: int
    """Pixels; a multiple of 32."""
    spread: float
    """Up to this fraction below and above it; 0: always `image_size`."""
    seed: int

    def at(self, step: int) -> int:
        """Of step `step` (0-based): a multiple of 32, all that are allowed are equally likely."""
        if not self.spread:
            return self.image_size
        # On 32 px the last feature map has one value, of which BatchNorm cannot have a variance where an image is alone.
        least = max(2, math.ceil(self.image_size * (1 - self.spread) / STRIDE))
        most = math.floor(self.image_size * (1 + self.spread) / STRIDE)
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, STREAM, step)))
        return STRIDE * int(rng.integers(least, most + 1))
