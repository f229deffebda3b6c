"""When the state is to be saved, on whatever tier. It may depend on clocks: what is trained does not depend on when it is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gai_yolo.config import Config
from gai_yolo.sections import SnapshotsConfig, TrainingConfig
from gai_yolo.store.manifest import Manifest

ASSUMED_OF_DISK, ASSUMED_OF_MEMORY = 100e6, 300e6
"""Bytes a second of a disk, and of serialising, hashing and writing into memory, that were not measured yet."""
FIRST_AFTER = 10.0
"""`auto` saves for the first time, which measures the tier, after so many seconds at most."""


@dataclass(frozen=True)
class Cost:
    """What one save costs, in seconds."""

    write: float
    """From the request until it is complete."""
    stall: float
    """That the training loop stood still for the copy."""
    cpu: float
    """Of processor time beside the training, over the cores it may take them from."""


def young_daly(write: float, between_failures: float) -> float:
    """Seconds between snapshots that lose the least time: sqrt(2 C M) - C while C < M / 2, else M.

    Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", first order; Young 1974.
    """
    if write >= between_failures / 2:
        return between_failures
    return math.sqrt(2 * write * between_failures) - write


def automatic_interval(cost: Cost, between_failures: float, max_overhead: float) -> float:
    """The seconds of Young and Daly, or more where they would slow training down by more than `max_overhead`.

    At most one snapshot is on its way to the disk at a time, so the interval is never shorter than the write either.
    """
    return max(young_daly(cost.write, between_failures), (cost.stall + cost.cpu) / max_overhead, cost.write)


class Schedule:
    """Counts steps and seconds since the last save.

    Args:
        config: the interval, in steps, in seconds, or by cost.
        step: at the beginning.
        guess: of the cost, until it was measured.
        most_lost: steps that may be lost at most; None if no number was promised.
    """

    def __init__(
        self, config: SnapshotsConfig, step: int, guess: Cost, most_lost: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config, self._cost, self._most_lost, self._clock = config, guess, most_lost, clock
        self._last_step, self._last_time = step, clock()
        self._measured = False

    @classmethod
    def of_disk(cls, config: SnapshotsConfig, step: int, size: int, clock: Callable[[], float] = time.monotonic) -> Schedule:
        """As `snapshots` says, of states of so many bytes."""
        return cls(config, step, Cost(write=size / ASSUMED_OF_DISK, stall=0.0, cpu=0.0), clock=clock)

    @classmethod
    def of_memory(
        cls, steps: int | Literal["auto"], config: SnapshotsConfig, step: int, size: int, clock: Callable[[], float] = time.monotonic
    ) -> Schedule:
        """As `elastic.memory_interval_steps` says. One step may end while the state before it is written, so states are saved one step more
        often than may be lost; with `auto` as often as `max_overhead` allows, however seldom machines fail."""
        most_lost = None if steps == "auto" else steps
        by = {"interval_steps": most_lost and max(1, most_lost - 1), "interval_seconds": "auto", "hours_between_failures": 0.0}
        seconds = size / ASSUMED_OF_MEMORY
        return cls(config.model_copy(update=by), step, Cost(write=seconds, stall=0.0, cpu=seconds), most_lost, clock)

    @classmethod
    def never(cls) -> Schedule:
        """Of a tier on which states are saved at once only."""
        return cls(SnapshotsConfig(interval_seconds=None), 0, Cost(0.0, 0.0, 0.0))

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` completed steps is to be saved."""
        if self.config.interval_steps is not None:
            return step - self._last_step >= self.config.interval_steps
        seconds = self.interval_seconds
        return seconds is not None and self._clock() - self._last_time >= seconds

    def outruns(self, step: int) -> bool:
        """Whether step `step` must not begin as long as the last save is under way: more steps than may be would be lost with it."""
        most, steps = self._most_lost, self.config.interval_steps
        return most is not None and steps is not None and step - self._last_step > most - steps

    @property
    def interval_seconds(self) -> float | None:
        """Seconds between two saves; None if they do not go by time."""
        if self.config.interval_steps is not None or self.config.interval_seconds is None:
            return None
        if self.config.interval_seconds != "auto":
            return self.config.interval_seconds
        automatic = automatic_interval(self._cost, 3600 * self.config.hours_between_failures, self.config.max_overhead)
        return automatic if self._measured else min(automatic, FIRST_AFTER)

    def saved(self, step: int) -> None:
        """A state was handed over after `step` steps."""
        self._last_step, self._last_time = step, self._clock()

    def measured(self, cost: Cost) -> None:
        """A write has ended; the mean of old and new cost is what the next interval reckons with."""
        old = self._cost if self._measured else cost
        self._cost = Cost((old.write + cost.write) / 2, (old.stall + cost.stall) / 2, (old.cpu + cost.cpu) / 2)
        self._measured = True


def asks_for(training: TrainingConfig, epoch: int) -> bool:
    """Whether the interval of checkpoints asks for one after an epoch."""
    return epoch % training.checkpoint_interval == 0 or epoch == training.epochs


def bytes_to_come(config: Config, epoch: int, size: int, present: Sequence[Manifest]) -> int:
    """Bytes of disk that the rest of a run after `epoch` completed epochs will take beyond what its present checkpoints do, about; a state
    takes `size`."""
    settings, training = config.snapshots, config.training
    mid_epoch = settings.interval_steps is not None or settings.interval_seconds is not None
    have_steps = sum(manifest.kind == "step" for manifest in present)
    steps = max(0, settings.keep + 1 - have_steps) if mid_epoch else 0
    due = sum(asks_for(training, one) for one in range(epoch + 1, training.epochs + 1))
    if settings.keep_epochs != "all":
        for_ever = training.epochs // settings.keep_every if settings.keep_every else 0
        due = min(due, settings.keep_epochs + for_ever + 1)
    best = 1 + 2  # where the best is none of those that are due; best.pt, and the draft of the next one
    return (steps + due + best) * size
