"""Which sample is trained on when: pure functions of (seed, epoch, step), the same on every rank and every machine.

A step takes the next `batch_size` samples of the epoch's order and cuts them into micro-batches; a rank takes a
contiguous span of the micro-batches. So the content of a micro-batch never depends on how many processes there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The shape of an epoch.

    Args:
        num_samples: size of the training set, at least 1.
        batch_size: samples of one optimizer step over all ranks; the last step of an epoch has the rest.
        micro_batch_size: at most so many samples in one forward pass.
        max_steps: end the epoch after so many steps, or None.
    """

    num_samples: int
    batch_size: int
    micro_batch_size: int
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        steps = math.ceil(self.num_samples / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_order(self, epoch: int) -> list[int]:
        """All samples, shuffled for this epoch (1-based)."""
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch)))
        order: list[int] = generator.permutation(self.num_samples).tolist()
        return order

    def micro_batches(self, order: list[int], step: int) -> list[list[int]]:
        """The micro-batches of a step (0-based in the epoch), as even as possible, so that none is a leftover of one image."""
        samples = order[step * self.batch_size : (step + 1) * self.batch_size]
        return split_evenly(samples, self.step_size(step)[0])

    def step_size(self, step: int) -> tuple[int, int]:
        """Micro-batches and samples of a step (0-based in the epoch), over all ranks."""
        samples = min(self.batch_size, self.num_samples - step * self.batch_size)
        return math.ceil(samples / self.micro_batch_size), samples

    def rank_micro_batches(self, order: list[int], step: int, rank: int, world_size: int) -> list[list[int]]:
        """The contiguous span of a step's micro-batches that a rank computes; may be empty."""
        return split_evenly(self.micro_batches(order, step), world_size)[rank]


def split_evenly(items: list[T], parts: int) -> list[list[T]]:
    """Cut into `parts` contiguous parts whose lengths differ by at most one, longer ones first."""
    quotient, rest = divmod(len(items), parts)
    ends = [part * quotient + min(part, rest) for part in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(ends)]
