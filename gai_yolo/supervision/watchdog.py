"""A thread that looks after the training thread: it acts where that one cannot, because it waits for a peer, a disk or nothing.

It ends the process when the launcher is gone, when nothing moves any more, when another rank is gone while this one is busy, and when a
notice's grace runs out before the training thread has come to the end of a step. The last completed step's state is saved first, which
needs no other process.

What moves is judged by what the training thread is at. Steps, and the batches of an evaluation, are alike: one that takes far longer than
the others hangs, even if the thread computes. Everything else (reading data, scoring, drawing, closing) takes what it takes: there the
thread hangs only if it has used no processor time at all for long, that is, has not come back from one wait. Who waits for other ranks'
long work, which tell that they live, does not hang, nor who waits for a writer that writes (`progress`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from gai_yolo.errors import Ending
from gai_yolo.goodput.record import Phase
from gai_yolo.sections import ElasticConfig
from gai_yolo.supervision import outcome
from gai_yolo.supervision.notices import Notice, Notices

TICK = 0.1
"""Seconds between two looks."""
FIRST_STEP_FACTOR = 5
"""A process's first step may take so many times `step_timeout_seconds`: loaders start, kernels are chosen."""
RESERVE = 1 / 15
"""Part of the grace in which the process can still say why it ends, after saving has taken too long."""
LOST_PATIENCE = 2.0
"""Seconds in which a training thread may notice itself that another rank is gone, and say so."""
STARTING = (Phase.IMPORT, Phase.RENDEZVOUS, Phase.LOAD)
FIRST_OF_STEP = (Phase.DATA, Phase.STEP)
STEPPING = (*FIRST_OF_STEP, Phase.SNAPSHOT, Phase.REPORTING)
"""The last two also follow an evaluation, and are then no part of a step."""
BEFORE_WORK = (Phase.IMPORT, Phase.RENDEZVOUS)
"""Imports, and waiting for the others to start, which has a timeout of its own."""

T = TypeVar("T")


class Others(Protocol):
    """What is known of the other ranks."""

    @property
    def is_waiting(self) -> bool:
        """Whether the training thread waits for their long work, and all are alive."""

    @property
    def lost(self) -> str | None:
        """For people, that one is gone."""


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    grace: float = 15.0
    """Between a notice and the end of the machine. A fifth of them is left for the step's end."""
    step: float = 60.0
    """That a step, or the evaluation of a batch, may always take."""
    idle: float = 300.0
    """That the training thread may be in one wait outside of steps. Not less where steps may take long: then disks may be slow, too."""

    @classmethod
    def of(cls, config: ElasticConfig) -> Limits:
        """As configured."""
        step = config.step_timeout_seconds
        return cls(config.grace_seconds, step, max(config.timeout_seconds, FIRST_STEP_FACTOR * step))


class Watchdog:
    """Watches one process.

    Args:
        farewell: is called last before the process ends, with how it does, a sentence, and whether the
            launcher knows.
        leave: ends the process.
        activity: a number that changes when the training thread does anything; its processor time if None. To be made in that thread.
    """

    def __init__(
        self,
        notices: Notices,
        limits: Limits,
        farewell: Callable[[Ending, str, bool], None],
        leave: Callable[[int], NoReturn] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        activity: Callable[[], float] | None = None,
    ) -> None:
        self.notices, self.limits = notices, limits
        self._activity = activity or activity_of(threading.get_ident())
        self._watched_thread = threading.get_ident()
        self.others: Others | None = None
        self._farewell, self._leave, self._clock = farewell, leave, clock
        self.rescue: Callable[[], list[str]] | None = None
        """Saves the last completed step's state; returns what failed. None while there is none to save."""
        self._phase = Phase.IMPORT
        self._since = clock()
        """When the last step ended, or the steps began."""
        self._durations: deque[float] = deque(maxlen=50)
        self._steps = False
        """Whether steps are made, and not what is between epochs."""
        self._item_since: float | None = None
        """When the last batch was done, while batches are evaluated."""
        self._item_durations: deque[float] = deque(maxlen=50)
        self._active, self._active_at = self._activity(), clock()
        self._lost_at: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def enter(self, phase: Phase) -> None:
        """What the training thread does from now on."""
        if phase in FIRST_OF_STEP and not self._steps:
            self._since = self._clock()
        self._steps = phase in STEPPING and (self._steps or phase in FIRST_OF_STEP)
        self._active_at = self._clock()
        self._phase = phase

    def step_done(self) -> None:
        """The training thread has ended a step."""
        now = self._clock()
        self._durations.append(now - self._since)
        self._since = now

    def progress(self) -> None:
        """What the training thread waits for moves."""
        self._since = self._active_at = self._clock()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Hand on things that take about the same time each; one that takes far longer, with what brings it, hangs."""
        self._item_since = self._clock()
        try:
            for item in items:
                yield item
                now = self._clock()
                self._item_durations.append(now - self._item_since)
                self._item_since = now
        finally:
            self._item_since = None
            self._active_at = self._clock()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def patience(self) -> float:
        """Seconds that a step may take before it hangs."""
        return self._patience_with(self._durations)

    def _patience_with(self, durations: deque[float]) -> float:
        if len(durations) < 2:
            return FIRST_STEP_FACTOR * self.limits.step
        return max(10 * statistics.median(durations), self.limits.step)

    def look(self) -> None:
        """One look; ends the process if something is wrong."""
        if outcome.is_under_torchrun() and os.getppid() != outcome.AGENT:
            self._depart(Ending.AGENT_GONE, "the launcher's agent is gone")
        notice = self.notices.pending()
        if notice is not None and self._clock() >= notice.at + self._until_acting(notice):
            end = notice.at + (1 - 1.5 * RESERVE) * self.limits.grace
            self._depart(notice.ending, f"{notice.cause}: this process leaves", notice.launcher_knows, end)
        lost = self.others.lost if self.others is not None else None
        self._lost_at = None if lost is None else self._lost_at or self._clock()
        if lost is not None and self._lost_at is not None and self._clock() - self._lost_at >= LOST_PATIENCE:
            if notice is not None and notice.at <= self._lost_at:  # its peers were told, too, and have gone first
                self._depart(notice.ending, f"{notice.cause}: {lost}", notice.launcher_knows)
            self._depart(Ending.PEER_LOST, lost)
        hang = self._hang(self._clock())
        if hang is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):  # nowhere to write to
                faulthandler.dump_traceback(sys.stderr)
            self._depart(Ending.HUNG, f"{hang}, see the stacks above")

    def _hang(self, now: float) -> str | None:
        """What hangs, for people."""
        active = self._activity()
        if active != self._active:
            self._active, self._active_at = active, now
        if self.others is not None and self.others.is_waiting:
            self._since = self._active_at = now
        elif self._steps:
            if now - self._since > self.patience:
                return f"step hung: none for {now - self._since:.0f} s"
        elif (since := self._item_since) is not None:  # the training thread may take it away meanwhile
            if now - since > self._patience_with(self._item_durations):
                return f"{self._phase} hung: no batch for {now - since:.0f} s"
        elif self._phase not in BEFORE_WORK and now - self._active_at > self.limits.idle:
            return f"{self._phase} hung: nothing has moved for {now - self._active_at:.0f} s{place_of(self._watched_thread)}"
        return None

    def _until_acting(self, notice: Notice) -> float:
        """Seconds from a notice until this thread acts on it in the place of the training thread."""
        if self._phase in STARTING or self._phase == Phase.EVALUATION:
            return 0.0  # the state stands still
        if self._phase == Phase.CLOSING:
            return 0.6 * self.limits.grace
        patience = self.limits.grace / 5
        if self._durations and self._since + statistics.median(self._durations) > notice.at + patience:
            return 0.0  # the step will not be done by then
        return patience

    def _watch(self) -> None:
        last_look = self._clock()
        while not self._stopped.wait(TICK):
            now = self._clock()
            # Time in which this process was stopped, or the machine slept, is nobody's fault.
            missed = max(0.0, now - last_look - 10 * TICK)
            self._since += missed
            self._active_at += missed
            if (since := self._item_since) is not None:
                self._item_since = since + missed
            last_look = now
            self.look()

    def _depart(self, ending: Ending, reason: str, launcher_knows: bool = True, end: float = 0.0) -> None:
        said = threading.Lock()

        def say_and_leave(*outcome: str) -> None:
            try:
                if said.acquire(blocking=False):
                    self._farewell(ending, "; ".join((reason, *outcome)), launcher_knows)
            finally:
                self._leave(ending.exit_code)

        # Neither a disk nor a terminal that hangs may hold the process beyond the grace.
        seconds = max(self.limits.grace / 3, end - self._clock())
        _later(seconds, say_and_leave, "the state could not be saved in time")
        _later(seconds + RESERVE * self.limits.grace, self._leave, ending.exit_code)
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


def activity_of(thread: int) -> Callable[[], float]:
    """The processor time of a thread, which changes when it does anything at all; where the system does not tell, that of the process,
    which always changes."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def place_of(thread: int) -> str:
    """For people, where in this program a thread is; empty if it cannot be told."""
    frame = sys._current_frames().get(thread)
    own = [one for one in traceback.extract_stack(frame) if "gai_yolo" in one.filename] if frame is not None else []
    return f" (in {own[-1].name}, {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _later(seconds: float, action: Callable[..., object], argument: object) -> None:
    timer = threading.Timer(seconds, action, (argument,))
    timer.daemon = True
    timer.start()
