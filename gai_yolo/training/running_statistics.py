"""BatchNorm's running statistics as a property of the step, not of a rank.

Every micro-batch normalises with its own statistics and starts from the step's running statistics; the new running
statistics are the mean over all micro-batches of the step. So they do not depend on who computed which micro-batch, and
every rank has the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Averages the running means and variances of a model over the micro-batches of a step.

    Args:
        sum_over_ranks: sums a tensor over all ranks in place.
    """

    def __init__(self, model: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self._running: list[Tensor] = []
        self._counters: list[Tensor] = []
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
            self._running += [norm.running_mean, norm.running_var]
            self._counters.append(norm.num_batches_tracked)
        self._sum_over_ranks = sum_over_ranks
        self._start = [torch.empty_like(t) for t in self._running]
        self._sums = [torch.empty_like(t) for t in self._running]

    @torch.no_grad()
    def begin_step(self) -> None:
        """Remember the statistics that every micro-batch of the step starts from."""
        torch._foreach_copy_(self._start, self._running)
        torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def end_micro_batch(self, counts: bool = True) -> None:
        """Take in what a forward pass left, and go back to the step's start; `counts=False` only goes back."""
        if counts:
            torch._foreach_add_(self._sums, self._running)
        torch._foreach_copy_(self._running, self._start)

    @torch.no_grad()
    def end_step(self, num_micro_batches: int, steps: int) -> None:
        """Set the mean over the `num_micro_batches` of all ranks; `steps` completed steps go into `num_batches_tracked`."""
        flat = self._sum_over_ranks(torch.cat(self._sums)) / num_micro_batches
        torch._foreach_copy_(self._running, list(torch.split(flat, [t.numel() for t in self._running])))
        for counter in self._counters:
            counter.fill_(steps)
