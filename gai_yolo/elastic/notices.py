"""What the outside world tells a running job: signals and the cloud's notices. Flags only; acting is elsewhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from gai_yolo.elastic.metadata import CloudWatch
from gai_yolo.errors import INTERRUPTED, LEFT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Notice:
    """This machine, or this process, is to leave."""

    cause: str
    """For people: `SIGTERM`, or the cloud's words."""
    exit_code: int
    at: float
    """When it was first seen, in seconds of the monotonic clock."""
    launcher_knows: bool
    """Whether torchrun's agent has got it too. If not it would start this process again."""


class Notices:
    """Remembers signals and asks the cloud's watcher. Must be made in the main thread.

    Ctrl-C ends a start-up at once, as in any program; while steps are made (`defer`) the first one waits for the step's end, and
    the second does not.
    """

    def __init__(self, cloud: CloudWatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._cloud, self._clock = cloud, clock
        self._signals: list[tuple[int, float]] = []
        self._from_cloud: Notice | None = None
        self._advised = False
        self._defers = False
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def defer(self, on: bool) -> None:
        """Whether Ctrl-C waits for somebody who asks for notices."""
        self._defers = on

    def pending(self) -> Notice | None:
        """What stands now. A signal stays; a cloud may withdraw its notice."""
        if self._signals:
            number, at = self._signals[0]
            if number == signal.SIGINT:
                return Notice("Ctrl-C", INTERRUPTED, at, launcher_knows=True)
            return Notice(signal.Signals(number).name, LEFT, at, launcher_knows=number != signal.SIGUSR1)
        told = self._cloud.notice()
        if told is None or not told.leave:
            self._from_cloud = None
        elif self._from_cloud is None or self._from_cloud.cause != told.what:
            self._from_cloud = Notice(told.what, LEFT, self._clock(), launcher_knows=False)
        return self._from_cloud

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
        """Give the signals back."""
        self._cloud.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        pressed_before = any(earlier == number for earlier, _ in self._signals)
        self._signals.append((number, self._clock()))
        if number == signal.SIGINT and (pressed_before or not self._defers):
            signal.default_int_handler(number, frame)
