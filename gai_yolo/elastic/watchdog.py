"""A thread that looks after the training thread: it acts where that one cannot, because it waits for a peer, a disk or nothing.

It ends the process when the launcher is gone, when a step hangs, and when a notice's grace runs out before the training thread
has come to the end of a step. The last completed step's state is saved first, which needs no other process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from gai_yolo.elastic import outcome
from gai_yolo.elastic.notices import Notices
from gai_yolo.elastic.records import Phase
from gai_yolo.errors import RESTART

TICK = 0.1
"""Seconds between two looks."""
FIRST_STEP_FACTOR = 5
"""A process's first step may take so many times `step_timeout_seconds`: loaders start, kernels are chosen."""
RESERVE = 1 / 15
"""Part of the grace in which the process can still say why it ends, after saving has taken too long."""
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
        if outcome.is_under_torchrun() and os.getppid() != outcome.AGENT:
            self._depart(RESTART, "the launcher's agent is gone")
        notice = self.notices.pending()
        if notice is not None and self._clock() >= notice.at + self._until_acting():
            end = notice.at + (1 - 1.5 * RESERVE) * self.grace
            self._depart(notice.exit_code, f"{notice.cause}: this process leaves", notice.launcher_knows, end)
        if self._phase in STEPPING and self._clock() - self._since > self.patience:
            with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):  # nowhere to write to
                faulthandler.dump_traceback(sys.stderr)
            self._depart(RESTART, f"step hung: none for {self._clock() - self._since:.0f} s, see the stacks above")

    def _until_acting(self) -> float:
        """Seconds from a notice until this thread acts on it in the place of the training thread."""
        if self._phase in STARTING or self._phase == Phase.EVALUATION:
            return 0.0  # the state stands still
        if self._phase == Phase.CLOSING:
            return 0.6 * self.grace
        notice, patience = self.notices.pending(), self.grace / 5
        if notice is not None and self._durations and self._since + statistics.median(self._durations) > notice.at + patience:
            return 0.0  # the step will not be done by then
        return patience

    def _watch(self) -> None:
        last_look = self._clock()
        while not self._stopped.wait(TICK):
            now = self._clock()
            # Time in which this process was stopped, or the machine slept, is nobody's fault.
            self._since += max(0.0, now - last_look - 10 * TICK)
            last_look = now
            self.look()

    def _depart(self, exit_code: int, reason: str, launcher_knows: bool = True, end: float = 0.0) -> None:
        said = threading.Lock()

        def say_and_leave(*outcome: str) -> None:
            try:
                if said.acquire(blocking=False):
                    self._farewell(exit_code, "; ".join((reason, *outcome)), launcher_knows)
            finally:
                self._leave(exit_code)

        # Neither a disk nor a terminal that hangs may hold the process beyond the grace.
        seconds = max(self.grace / 3, end - self._clock())
        _later(seconds, say_and_leave, "the state could not be saved in time")
        _later(seconds + RESERVE * self.grace, self._leave, exit_code)
        say_and_leave(*self._save())

    def _save(self) -> list[str]:
        """Save what there is to save; returns how that went, for people."""
        rescue = self.rescue  # the training thread may take it away meanwhile
        if rescue is None:
            return []
        try:
            failures = rescue()
        except Exception as error:
            # Whatever it is, the process must end, and say so.
            failures = [f"{type(error).__name__}: {error}"]
        return [f"not everywhere saved: {'; '.join(failures)}" if failures else "the last step's state is saved"]


def _later(seconds: float, action: Callable[..., object], argument: object) -> None:
    timer = threading.Timer(seconds, action, (argument,))
    timer.daemon = True
    timer.start()
