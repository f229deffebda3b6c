"""When a mid-epoch snapshot is due. It may depend on clocks: what is trained does not depend on when it is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gai_yolo.sections import SnapshotsConfig

ASSUMED_BYTES_PER_SECOND = 100e6
"""Of a disk that was not measured yet."""
FIRST_AFTER = 10.0
"""`auto` takes its first snapshot, which measures the disk, after so many seconds at most."""


@dataclass(frozen=True)
class Cost:
    """What one snapshot costs, in seconds."""

    write: float
    """From the request until it is complete on the disk."""
    stall: float
    """That the training loop stood still for the copy."""
    cpu: float
    """Of processor time in the writer, over the cores it may take them from."""


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


class SnapshotSchedule:
    """Counts steps and seconds since the last snapshot.

    Args:
        expected_bytes: size of a snapshot, for a first guess of its cost.
    """

    def __init__(self, config: SnapshotsConfig, step: int, expected_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._clock = config, clock
        self._last_step, self._last_time = step, clock()
        self._cost = Cost(write=expected_bytes / ASSUMED_BYTES_PER_SECOND, stall=0.0, cpu=0.0)
        self._measured = False

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is due after `step` completed steps."""
        if self.config.interval_steps is not None:
            return step - self._last_step >= self.config.interval_steps
        interval = self.interval_seconds
        return interval is not None and self._clock() - self._last_time >= interval

    @property
    def interval_seconds(self) -> float | None:
        """Seconds between snapshots; None if they do not go by time."""
        if self.config.interval_steps is not None or self.config.interval_seconds is None:
            return None
        if self.config.interval_seconds != "auto":
            return self.config.interval_seconds
        automatic = automatic_interval(self._cost, 3600 * self.config.hours_between_failures, self.config.max_overhead)
        return automatic if self._measured else min(automatic, FIRST_AFTER)

    def saved(self, step: int) -> None:
        """A snapshot or an epoch checkpoint was handed over after `step` steps."""
        self._last_step, self._last_time = step, self._clock()

    def measured(self, cost: Cost) -> None:
        """A write has ended; the mean of old and new cost is what the next interval reckons with."""
        old = self._cost if self._measured else cost
        self._cost = Cost((old.write + cost.write) / 2, (old.stall + cost.stall) / 2, (old.cpu + cost.cpu) / 2)
        self._measured = True
