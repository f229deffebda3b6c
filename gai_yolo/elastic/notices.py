"""What the outside world tells a running job."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """Ctrl-C. Python's own KeyboardInterrupt is lost where it strikes inside a destructor or a callback; this remembers it.

    Must be made in the main thread.
    """

    def __init__(self) -> None:
        self._seen = False
        self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        signal.default_int_handler(number, frame)

    def check(self) -> None:
        """To be called at every step boundary.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before.
        """
        if self._seen:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGINT, self._before)
