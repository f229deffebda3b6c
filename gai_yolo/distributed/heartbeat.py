"""Ranks that wait for each other's work, however long it takes, and not for the dead.

A collective fails when a rank has not come to it within the process group's timeout, whatever that rank is doing. So wherever ranks may
work for different times (reading the data, evaluating, waiting for a disk) a thread of each rank takes part in a small reduction about
once a second: it tells the others that this process lives, and how often its main thread has come to a place where all meet. The
main thread goes on from such a place, into the collective itself, when all have come there. A rank that has died makes the reduction
fail at once, one that was cut off or stopped after the timeout. A main thread that hangs in its work goes on beating: to end that
process is its own watchdog's part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

BEAT_SECONDS = 1.0
"""Seconds between two beats of a rank that works; who waits answers at once."""


class Heartbeat:
    """The beats of one rank, from `start` to `end`, which all ranks call.

    Args:
        least: the least of the numbers that all ranks give, a collective. Called by one thread, which nothing else uses the same process
            group meanwhile.
    """

    def __init__(self, least: Callable[[int], int]) -> None:
        self._least = least
        self._changed = threading.Condition()
        self._mine, self._all = 0, 0
        self._is_last, self._is_left = False, False
        self._failure: RuntimeError | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._is_waiting = False

    def start(self) -> None:
        """Begin to beat; waits for nobody."""
        self._thread.start()

    def meet(self, last: bool = False) -> None:
        """Wait until all ranks have come here.

        Args:
            last: and then beat no more.

        Raises:
            RuntimeError: a rank is gone.
        """
        with self._changed:
            self._mine, self._is_last = self._mine + 1, last
            self._is_waiting = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._all >= self._mine or self._failure is not None)
            finally:
                self._is_waiting = False
            if self._all < self._mine and self._failure is not None:
                raise self._failure

    def end(self) -> None:
        """Wait until all have come here, and beat no more; raises as `meet`."""
        self.meet(last=True)
        self._thread.join()

    def leave(self) -> None:
        """Beat no more, without a word: this process ends, and so will the others, or it would not."""
        with self._changed:
            self._is_left = True
            self._changed.notify_all()

    @property
    def is_waiting(self) -> bool:
        """Whether the main thread waits for other ranks, all of which are alive."""
        return self._is_waiting and self._failure is None

    @property
    def failure(self) -> RuntimeError | None:
        """Why the beats have stopped: a rank is gone. None as long as all are there, and after `leave`."""
        return None if self._is_left else self._failure

    def _beat(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_left or self._mine > self._all, BEAT_SECONDS)
                if self._is_left:
                    return
                mine = self._mine
            try:
                least = self._least(mine)
            except RuntimeError as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._all = least
                self._changed.notify_all()
                if self._is_last and least == self._mine:
                    return
