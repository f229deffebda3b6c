"""Child processes that are not left behind by another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from gai_yolo.processes import children_of

CHILD_TICK = 0.1
"""Seconds between two looks at a child."""
REAPED_WITHIN = 10.0
"""Seconds that a killed process may take to end, as it may while a device or a network disk does not answer."""


class Child(subprocess.Popen[bytes]):
    """A process in a session of its own: a terminal's Ctrl-C reaches it through this process alone."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__(command, env=dict(environment), start_new_session=True)
        self.started = time.monotonic()

    def end(self, patience: float, hurry: Callable[[], bool]) -> int:
        """Send SIGTERM, once; SIGKILL when the patience (seconds) is over, or `hurry` says so. Returns as `poll`."""
        self.terminate()
        deadline = time.monotonic() + patience
        while (code := self.poll()) is None:
            if time.monotonic() > deadline or hurry():
                self.kill()
                return self.wait()
            time.sleep(CHILD_TICK)
        return code


def reap_orphans(own: Sequence[int] = ()) -> None:
    """Take note of the ends of adopted children, which would stay as zombies, but for those of `own`, which somebody else waits for."""
    if not hasattr(os, "waitid"):
        return  # macOS with an old Python; where orphans cannot be adopted, either
    with contextlib.suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and dead.si_pid not in own:
            os.waitpid(dead.si_pid, 0)


def end_orphans(patience: float, hurry: Callable[[], bool]) -> None:
    """End what a dead agent has left: its workers, which hold the devices and the run's lock; SIGTERM first, so that they can
    save, and SIGKILL after so many seconds. One that the kernel does not let go is left behind in the end."""
    told: set[int] = set()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline + REAPED_WITHIN:
        reap_orphans()
        left = children_of(os.getpid())
        if not left:
            return
        over = time.monotonic() > deadline or hurry()
        for pid in left if over else left - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if over else signal.SIGTERM)
        told |= left
        time.sleep(CHILD_TICK)
