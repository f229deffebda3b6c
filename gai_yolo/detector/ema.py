"""The exponential moving average of the weights, which is what is evaluated and delivered."""

from __future__ import annotations

import copy
import math

import torch

from gai_yolo.detector import YOLO12


class EMA:
    """A copy of the model that follows it slowly: decay x (1 - exp(-updates / tau)), so that it follows fast at the start.

    Args:
        model: is copied as it is now.
    """

    def __init__(self, model: YOLO12, decay: float, tau: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.tau = decay, tau
        self.updates = 0
        """Calls of `update` so far."""

    @torch.no_grad()
    def update(self, model: YOLO12) -> None:
        """Move towards the weights and BatchNorm statistics of `model`; integer buffers are copied."""
        self.updates += 1
        weight = 1 - self.decay * (1 - math.exp(-self.updates / self.tau))
        followers, leaders = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in followers.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([followers[n] for n in floats], [leaders[n] for n in floats], weight)
        for name in followers.keys() - set(floats):
            followers[name].copy_(leaders[name])
