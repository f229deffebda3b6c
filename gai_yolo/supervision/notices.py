"""What the outside world tells a running job: signals and the cloud's notices. Flags only; acting is elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from gai_yolo.errors import Ending
from gai_yolo.supervision.cloud.watch import CloudWatch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What is heeded; SIGHUP, which a terminal sends that is closed or an ssh session that drops, unless it was ignored before (nohup).
All of them may reach the whole process group, so processes that work for the training process ignore them: it ends them itself."""


@dataclass(frozen=True)
class Notice:
    """This machine, or this process, is to leave."""

    cause: str
    """For people: `SIGTERM`, or the cloud's words."""
    ending: Ending
    """How a process ends that heeds it."""
    at: float
    """When it was first seen, in seconds of the monotonic clock."""
    launcher_knows: bool
    """Whether torchrun's agent has got it too. If not it would start this process again."""


class Notices:
    """Remembers signals and asks the cloud's watcher. Must be made in the main thread.

    Ctrl-C ends a start-up at once, as in any program; while steps are made (`defer`) the first one waits for the step's end, and
    the second does not.

    A training thread that waits for a dead peer runs no handlers of Python, so signals come through a pipe as well, which any thread
    can read.
    """

    def __init__(self, cloud: CloudWatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._cloud, self._clock = cloud, clock
        self._signals: list[tuple[int, float]] = []
        self._from_cloud: Notice | None = None
        self._advised = False
        self._defers = False
        self._was_interrupted = False
        self._reading = threading.Lock()
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        heeded = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup
        self._before = {number: signal.signal(number, self._note) for number in heeded}

    def defer(self, on: bool) -> None:
        """Whether Ctrl-C waits for somebody who asks for notices."""
        self._defers = on

    def pending(self) -> Notice | None:
        """What stands now, from any thread. A signal stays; a cloud may withdraw its notice."""
        self._read_signals()
        if self._signals:
            number, at = self._signals[0]
            if number == signal.SIGINT:
                return Notice("Ctrl-C", Ending.INTERRUPTED, at, launcher_knows=True)
            return Notice(signal.Signals(number).name, Ending.LEFT, at, launcher_knows=number != signal.SIGUSR1)
        told, known = self._cloud.notice(), self._from_cloud
        if told is None or not told.leave:
            known = None
        elif known is None or known.cause != told.what:
            # Other words, such as another time, do not make the grace longer.
            known = Notice(told.what, Ending.LEFT, self._clock() if known is None else known.at, launcher_knows=False)
        self._from_cloud = known
        return known

    def take_advice(self) -> str | None:
        """The cloud's words if it says, for the first time, that this machine may go soon: nobody leaves, but the state is worth
        saving."""
        told = self._cloud.notice()
        if told is None or told.leave:
            self._advised = self._advised and told is not None
            return None
        new, self._advised = not self._advised, True
        return told.what if new else None

    def close(self) -> None:
        """Give the signals back. What was announced stays to be read, by threads, too, that look on meanwhile."""
        self._cloud.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._read_signals()
        with self._reading:  # the number of a closed end is soon that of a file which is not ours
            for end in (self._reader, self._writer):
                os.close(end)
            self._reader = -1

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            waits, self._was_interrupted = self._defers and not self._was_interrupted, True
            if not waits:
                signal.default_int_handler(number, frame)

    def _read_signals(self) -> None:
        """Take what the operating system's handler has put into the pipe, whatever the main thread was doing."""
        with self._reading, contextlib.suppress(BlockingIOError):
            while self._reader >= 0 and (numbers := os.read(self._reader, 64)):
                self._signals += [(number, self._clock()) for number in numbers if number in self._before]
