"""Which sample is trained on when: pure functions of (seed, epoch, step), the same on every rank and every machine.

A step takes the next `batch_size` samples of the epoch's order and cuts them into micro-batches; a rank takes a
contiguous span of the micro-batches. So the content of a micro-batch never depends on how many processes there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

ROUNDS = 16
"""Of the Feistel network; four do for large sets, but on five samples twelve are still not quite fair (`tests/unit/test_order.py`)."""


class Key(NamedTuple):
    """What the loader is asked for; together with the seed it determines the sample to the last bit."""

    epoch: int
    """1-based; 0 for evaluation."""
    position: int
    """Position in the index."""
    draw: int = 0
    """Tells apart the samples of an image that is drawn several times in an epoch."""


class Order:
    """The samples of one epoch in shuffled order, as a function: any part of it is computed when it is asked for, in the
    same time and memory whatever the number of samples.

    A keyed bijection of 0..N-1: a Feistel network on a rectangle of a x b >= N places, repeated for the few that fall outside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 3 and 2; round function: the finaliser of
    MurmurHash3). Shuffling, not cryptography.

    Args:
        num_samples: N, from 1 to 2^62.
        epoch: 1-based.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples, self.epoch = num_samples, epoch
        self._height = np.uint64(math.isqrt(num_samples - 1) + 1)
        self._width = np.uint64(-(-num_samples // int(self._height)))
        self._keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.num_samples

    def samples(self, start: int, stop: int) -> list[int]:
        """The samples at the positions from `start` up to but not including `stop`, cut to those that exist."""
        values = self._permuted(np.arange(start, min(stop, self.num_samples), dtype=np.uint64))
        outside = values >= self.num_samples
        while outside.any():
            values[outside] = self._permuted(values[outside])
            outside = values >= self.num_samples
        return list(values.tolist())

    def keys(self, start: int, stop: int) -> list[Key]:
        """What to ask the loader for at these positions."""
        return [Key(self.epoch, sample) for sample in self.samples(start, stop)]

    def _permuted(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        row, column = values // self._width, values % self._width
        for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
            row = (row + _mixed(column, even) % self._height) % self._height
            column = (column + _mixed(row, odd) % self._width) % self._width
        return row * self._width + column


class WeightedOrder(Order):
    """An epoch of as many samples in which images are drawn in proportion to weights: systematic sampling (Madow 1949), shuffled, so that
    an image comes as often as is expected, rounded up or down.

    Args:
        weights: (N,), above 0.
    """

    def __init__(self, weights: NDArray[np.float64], seed: int, epoch: int) -> None:
        super().__init__(len(weights), seed, epoch)
        self._ends = np.cumsum(weights)
        self._offset = float(np.random.default_rng(np.random.SeedSequence((seed, epoch, self.num_samples, 1))).random())

    def keys(self, start: int, stop: int) -> list[Key]:
        draws = self.samples(start, stop)
        marks = (np.array(draws, dtype=np.float64) + self._offset) * (self._ends[-1] / self.num_samples)
        positions = np.minimum(np.searchsorted(self._ends, marks, side="right"), self.num_samples - 1)
        return [Key(self.epoch, position, draw + 1) for position, draw in zip(positions.tolist(), draws, strict=True)]


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 bits that look random, for each value; multiplication is modulo 2^64."""
    mixed = values ^ key
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * factor
    return mixed ^ (mixed >> np.uint64(33))


@dataclass(frozen=True)
class BatchPlan:
    """The shape of an epoch.

    Args:
        num_samples: size of the training set, at least 1.
        batch_size: samples of one optimizer step over all ranks; the last step of an epoch has the rest.
        micro_batch_size: at most so many samples in one forward pass.
        max_steps: end the epoch after so many steps, or None.
        weights: (num_samples,), in proportion to which samples are drawn; None: each once.
    """

    num_samples: int
    batch_size: int
    micro_batch_size: int
    seed: int
    max_steps: int | None = None
    weights: NDArray[np.float64] | None = field(default=None, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        steps = math.ceil(self.num_samples / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def order(self, epoch: int) -> Order:
        """All samples, shuffled for this epoch (1-based)."""
        return Order(self.num_samples, self.seed, epoch) if self.weights is None else WeightedOrder(self.weights, self.seed, epoch)

    def micro_batches(self, order: Order, step: int) -> list[list[Key]]:
        """The micro-batches of a step (0-based in the epoch), as even as possible, so that none is a leftover of one image."""
        keys = order.keys(step * self.batch_size, (step + 1) * self.batch_size)
        return split_evenly(keys, self.step_size(step)[0])

    def step_size(self, step: int) -> tuple[int, int]:
        """Micro-batches and samples of a step (0-based in the epoch), over all ranks."""
        samples = min(self.batch_size, self.num_samples - step * self.batch_size)
        return math.ceil(samples / self.micro_batch_size), samples

    def rank_micro_batches(self, order: Order, step: int, rank: int, world_size: int) -> list[list[Key]]:
        """The contiguous span of a step's micro-batches that a rank computes; may be empty."""
        return split_evenly(self.micro_batches(order, step), world_size)[rank]


def split_evenly(items: Sequence[T], parts: int) -> list[list[T]]:
    """Cut into `parts` contiguous parts whose lengths differ by at most one, longer ones first."""
    quotient, rest = divmod(len(items), parts)
    ends = [part * quotient + min(part, rest) for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(ends)]
