"""BatchNorm's running statistics as a property of the step, not of a rank.

Every micro-batch normalises with its own statistics and starts from the step's running statistics; the new running
statistics are the mean over all micro-batches of the step. So they do not depend on who computed which micro-batch, and
every rank has the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The running means and variances of a model's BatchNorm layers, taken out after each micro-batch of a step.

    Args:
        frozen: names of layers that gather none, and are left alone.
    """

    def __init__(self, model: nn.Module, frozen: Collection[str] = ()) -> None:
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and name not in frozen]
        self._names = [f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var")]
        self._running = [model.get_buffer(name) for name in self._names]
        self._counters = {name: model.get_buffer(name) for name in (f"{norm}.num_batches_tracked" for norm in norms)}
        # Weights of others have counted their own steps, and layers that were frozen none.
        self._first: dict[str, Tensor] | None = {name: counter.clone() for name, counter in self._counters.items()}
        self._in_step = False
        # Nothing, so that the lists are of something where all layers are frozen.
        self._running.append(torch.empty(0, device=next(model.parameters()).device))
        self._start = [torch.empty_like(t) for t in self._running]
        self._sizes = [t.numel() for t in self._running]
        self.size = sum(self._sizes)
        """Numbers in all statistics."""

    @torch.no_grad()
    def begin_step(self) -> None:
        """Remember the statistics that every micro-batch of the step starts from."""
        torch._foreach_copy_(self._start, self._running)
        self._in_step = True

    @torch.no_grad()
    def end_micro_batch(self) -> Tensor:
        """Take out what a forward pass left, `(size,)`, and go back to the step's start."""
        left = torch.cat(self._running)
        torch._foreach_copy_(self._running, self._start)
        return left

    @torch.no_grad()
    def end_step(self, means: Tensor, steps: int) -> None:
        """Set the means `(size,)` over all micro-batches; `steps` completed steps go into `num_batches_tracked`."""
        torch._foreach_copy_(self._running, list(torch.split(means, self._sizes)))
        self._end(steps)

    @torch.no_grad()
    def pass_over(self, steps: int) -> None:
        """End a step that is not to change anything but the count of steps."""
        torch._foreach_copy_(self._running, self._start)
        self._end(steps)

    def before_step(self, weights: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
        """The model's state dict as it was before the step that is under way, if one is; `steps` are completed."""
        if not self._in_step:
            return dict(weights)
        counters = self._first or {name: torch.full_like(counter, steps) for name, counter in self._counters.items()}
        return {**weights, **dict(zip(self._names, self._start[:-1], strict=True)), **counters}

    def _end(self, steps: int) -> None:
        for counter in self._counters.values():
            counter.fill_(steps)
        self._first = None
        self._in_step = False
