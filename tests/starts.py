"""Starts of a job that lasted as long as a test says: the real recorder under a clock that tests move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gai_yolo.errors import Ending
from gai_yolo.goodput.record import Phase, Record
from gai_yolo.goodput.recorder import Recorder

EPOCH = 1_700_000_000.0
"""When simulated jobs begin, seconds since 1970."""
TICK = 1 / 64
"""Seconds. Multiples of it are exact also after `EPOCH`, so sums may be compared exactly."""


class Clock:
    """Stands still until it is moved; serves as both clocks of a recorder."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Node:
    """The first process of a node in one start.

    Args:
        began: seconds after `EPOCH`.
        number: of the start; all nodes of a number are one start unless `start` says otherwise.
        folder: where the record goes; None: it stays in memory.
    """

    def __init__(
        self, began: float, number: int = 1, node: str = "a", world_size: int = 1, start: str | None = None, folder: Path | None = None
    ) -> None:
        self.clock = Clock(EPOCH + began)
        self.recorder = Recorder(EPOCH + began, self.clock, self.clock)
        self.identity: dict[str, Any] = {"number": number, "start": f"s{number}" if start is None else start, "node": node}
        self.identity |= {"rank": 0, "world_size": world_size}
        if folder is not None:
            self.recorder.open(folder, **self.identity)

    def spend(self, phase: Phase, seconds: float) -> None:
        """Stay in a phase for so long."""
        self.recorder.enter(phase)
        self.clock.now += seconds

    def load(self, origin: int, source: str = "durable", known: int = 0, total_steps: int = 1000) -> None:
        """Start up in 2 + 1 + 1 seconds and go on from a step."""
        for phase, seconds in ((Phase.IMPORT, 2.0), (Phase.RENDEZVOUS, 1.0), (Phase.LOAD, 1.0)):
            self.spend(phase, seconds)
        self.recorder.started_from(origin, 1 + origin // 100, source, known, total_steps, total_steps // 100)

    def steps(self, first: int, last: int, seconds: float = 1.0) -> None:
        """Make these steps, each in so long."""
        for step in range(first, last + 1):
            self.spend(Phase.STEP, seconds)
            self.recorder.step_done(step, 1 + (step - 1) // 100)

    def end(self, ending: Ending | None = None, words: str | None = None) -> Record:
        """The record that is left, after the last word or without one."""
        if ending is not None:
            self.recorder.ended(ending, words)
        self.recorder.close()
        return self.record()

    def record(self) -> Record:
        """The record up to now."""
        return replace(self.recorder.record(), **self.identity)
