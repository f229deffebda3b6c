"""A thread that looks after the training thread: it acts where that one cannot, because it waits for a peer, a disk or nothing.

It ends the process when the launcher is gone, when a step hangs, and when a notice's grace runs out before the training thread
has come to the end of a step. The last completed step's state is saved first, which needs no other process.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from gai_yolo.elastic.notices import Notices
from gai_yolo.elastic.outcome import is_under_torchrun
from gai_yolo.elastic.records import Phase
from gai_yolo.errors import RESTART

TICK = 0.1
"""Seconds between two looks."""
FIRST_STEP_FACTOR = 5
"""A process's first step may take so many times `step_timeout_seconds`: loaders start, kernels are chosen."""
STARTING = (Phase.IMPORT, Phase.RENDEZVOUS, Phase.LOAD)
STEPPING = (Phase.STEP, Phase.DATA, Phase.SNAPSHOT, Phase.REPORTING)


class Watchdog:
    """Watches one process.

    Args:
        grace: seconds between a notice and the end of the machine. A fifth of them is left for the step's end.
        step_timeout: seconds that a step may always take.
        farewell: is called last before the process ends, with the exit code, a sentence, and whether the
            launcher knows.
        leave: ends the process.
    """

    def __init__(
        self,
        notices: Notices,
        grace: float,
        step_timeout: float,
        farewell: Callable[[int, str, bool], None],
        leave: Callable[[int], NoReturn] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notices, self.grace, self.step_timeout = notices, grace, step_timeout
        self._farewell, self._leave, self._clock = farewell, leave, clock
        self.rescue: Callable[[], list[str]] | None = None
        """Saves the last completed step's state; returns what failed. None while there is none to save."""
        self._phase = Phase.IMPORT
        self._since = clock()
        """When the last step ended, or the steps began."""
        self._durations: deque[float] = deque(maxlen=50)
        self._parent = os.getppid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def enter(self, phase: Phase) -> None:
        """What the training thread does from now on."""
        if phase in STEPPING and self._phase not in STEPPING:
            self._since = self._clock()
        self._phase = phase

    def step_done(self) -> None:
        """The training thread has ended a step."""
        now = self._clock()
        self._durations.append(now - self._since)
        self._since = now

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def patience(self) -> float:
        """Seconds that a step may take before it hangs."""
        if len(self._durations) < 2:
            return FIRST_STEP_FACTOR * self.step_timeout
        return max(10 * statistics.median(self._durations), self.step_timeout)

    def look(self) -> None:
        """One look; ends the process if something is wrong."""
        if is_under_torchrun() and os.getppid() != self._parent:
            self._depart(RESTART, "the launcher's agent is gone")
        notice = self.notices.pending()
        if notice is not None and self._clock() >= notice.at + self._until_acting():
            self._depart(notice.exit_code, f"{notice.cause}: this process leaves", notice.launcher_knows)
        if self._phase in STEPPING and self._clock() - self._since > self.patience:
            faulthandler.dump_traceback(sys.stderr)
            self._depart(RESTART, f"step hung: none for {self._clock() - self._since:.0f} s, see the stacks above")

    def _until_acting(self) -> float:
        """Seconds from a notice until this thread acts on it in the place of the training thread."""
        if self._phase in STARTING or self._phase == Phase.EVALUATION:
            return 0.0  # the state stands still
        return 0.6 * self.grace if self._phase == Phase.CLOSING else self.grace / 5

    def _watch(self) -> None:
        last_look = self._clock()
        while not self._stopped.wait(TICK):
            now = self._clock()
            # Time in which this process was stopped, or the machine slept, is nobody's fault.
            self._since += max(0.0, now - last_look - 10 * TICK)
            last_look = now
            self.look()

    def _depart(self, exit_code: int, reason: str, launcher_knows: bool = True) -> None:
        # A disk that hangs must not hold the process beyond the grace.
        deadline = threading.Timer(self.grace / 3, self._leave, (exit_code,))
        deadline.daemon = True
        deadline.start()
        if self.rescue is not None:
            failures = self.rescue()
            reason += "; the last step's state is saved" if not failures else f"; not everywhere saved: {'; '.join(failures)}"
        self._farewell(exit_code, reason, launcher_knows)
        self._leave(exit_code)
