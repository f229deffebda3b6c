"""What the end of an agent means, and what follows from it. Decisions only; who acts is in launch.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gai_yolo.elastic.outcome import write
from gai_yolo.errors import INTERRUPTED, LEFT, NO_PROGRESS, Refusal

EXIT_CODES = """\
exit codes:
    0  done, or nothing left to do
    1  the script ended again and again as soon as it was started, or no endpoint answered for join_timeout
    2  refused; one line says what to mend
    3  a process had another state than the others, twice in a row: broken hardware
    4  no progress: starts from the same step without a new one
   75  left after a notice, state saved; start again elsewhere or later
  130  Ctrl-C
  143  told to end by a signal before the script could say anything
Whatever else ends the script or torchrun, both are started again, after 1 s, 2 s, 4 s, ... 60 s; after 1 s again
once they have lasted for 2 minutes.
"""

DONE, FAILED, RENDEZVOUS_LOST, IN_VAIN, CLOSED, TERMINATED = 0, 1, 69, 70, 71, 143
"""Exit codes of the agent; nobody but the launcher sees them. 70: the script ends as soon as it is started; 71: other nodes
have finished the run."""
HARDWARE = 3
LAST_WORDS = (DONE, Refusal.exit_code, HARDWARE, NO_PROGRESS, INTERRUPTED)
"""Codes of workers that must not be started again by their agent. 75 is not among them: workers also leave with it when the agent ends
them because a node has come or gone."""

SOON = 30.0
"""Seconds; who ends earlier and says nothing may have ended as it was started."""
MOST_IN_VAIN = 5
"""So many such ends in a row are enough."""
LASTED = 120.0
"""Seconds after which a failure is a new one."""
MOST_WAIT = 60.0
"""Seconds."""


@dataclass(frozen=True)
class Outcome:
    """What workers say of their end."""

    code: int
    reason: str


@dataclass(frozen=True)
class End:
    """How an agent ended."""

    code: int
    """Exit code, or minus a signal's number."""
    seconds: float
    """It lived for so long."""
    outcome: Outcome | None = None
    told: signal.Signals | None = None
    """The launcher was told to end, by this signal."""
    moved: bool = False
    """The launcher ended it, to start it at another endpoint."""


@dataclass(frozen=True)
class Verdict:
    """What to do after an end."""

    exit_code: int | None
    """None: start again."""
    reason: str
    """For people; empty: nothing to say."""
    wait: float = 0.0
    """Seconds before the next start."""


class History:
    """The ends so far."""

    def __init__(self) -> None:
        self._failures = 0
        self._in_vain = 0
        self._broken = 0

    def judge(self, end: End) -> Verdict:
        """What follows from an end, given those before it."""
        final = _final(end)
        if final is not None:
            return final
        said = end.outcome.code if end.outcome else None
        self._broken = self._broken + 1 if said == HARDWARE else 0
        if self._broken == 2 and end.outcome:
            return Verdict(HARDWARE, end.outcome.reason)
        if end.moved:
            return Verdict(None, "")
        excused = end.outcome is not None or end.code == RENDEZVOUS_LOST or end.seconds >= SOON
        self._in_vain = 0 if excused else self._in_vain + 1
        if self._in_vain >= MOST_IN_VAIN:
            return Verdict(FAILED, f"torchrun ended {MOST_IN_VAIN} times in a row within {SOON:.0f} s; its messages are above")
        self._failures = 1 if end.seconds > LASTED else self._failures + 1
        wait = backoff(self._failures)
        return Verdict(None, f"{_told_end(end)}; starting again in {wait:.0f} s", wait)


def _final(end: End) -> Verdict | None:
    """What follows whatever came before."""
    said, reason = (end.outcome.code, end.outcome.reason) if end.outcome else (None, "")
    if end.code == DONE or said == DONE:
        return Verdict(DONE, "done")
    if said in (Refusal.exit_code, NO_PROGRESS, INTERRUPTED):
        return Verdict(said, reason)
    if end.told is not None:
        return code_when_told(end.told, end.outcome)
    if end.code == CLOSED:
        return Verdict(DONE, "the other nodes have finished the job")
    if said == LEFT and end.code == TERMINATED and not end.moved:
        return Verdict(LEFT, reason)
    if end.code == IN_VAIN:
        return Verdict(FAILED, f"the script ended {MOST_IN_VAIN} times within {SOON:.0f} s of its start; its messages are above")
    return None


def code_when_told(told: signal.Signals, outcome: Outcome | None) -> Verdict:
    """What follows when the launcher itself is to end."""
    if outcome is not None and outcome.code == LEFT and told == signal.SIGINT:
        # Workers are told by SIGTERM, whatever this process was told by.
        return Verdict(INTERRUPTED, outcome.reason.replace(signal.SIGTERM.name, "Ctrl-C", 1))
    if outcome is not None and outcome.code in (HARDWARE, LEFT):
        return Verdict(outcome.code, outcome.reason)
    return Verdict(INTERRUPTED if told == signal.SIGINT else TERMINATED, f"ended by {told.name}")


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return float(min(2 ** min(failures - 1, 10), MOST_WAIT))


def read_outcome(path: Path) -> Outcome | None:
    """What workers have said, or None."""
    try:
        said = json.loads(path.read_text())
        return Outcome(int(said["code"]), str(said["reason"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Say it as a worker does; raises `OSError`."""
    write(path, outcome.code, outcome.reason)


class Starts:
    """The agent's count of the starts of its workers: what must not be started again, and what ends as it is started.

    Args:
        outcome: the file in which workers say why they end.
    """

    def __init__(self, outcome: Path, clock: Callable[[], float]) -> None:
        self._outcome, self._clock = outcome, clock
        self._started: float | None = None
        self._in_vain = 0

    def before(self, resized: bool) -> int | None:
        """To be called before workers are started: the code with which the agent is to end instead, or None.

        Args:
            resized: it was the agent that ended the workers, because a node waits.
        """
        outcome = read_outcome(self._outcome)
        if outcome is not None and outcome.code in LAST_WORDS:
            return FAILED
        self._outcome.unlink(missing_ok=True)
        if self._started is None:
            return None
        ended_soon = self._clock() - self._started < SOON and outcome is None and not resized
        self._in_vain = self._in_vain + 1 if ended_soon else 0
        return IN_VAIN if self._in_vain >= MOST_IN_VAIN else None

    def begun(self) -> None:
        """Workers are started now."""
        self._started = self._clock()


def _told_end(end: End) -> str:
    if end.outcome is not None and end.code in (FAILED, TERMINATED):
        return end.outcome.reason
    if end.code < 0:
        return f"torchrun was killed by {signal.Signals(-end.code).name}"
    if end.code == RENDEZVOUS_LOST:
        return "the rendezvous was lost"
    return f"torchrun ended with code {end.code}"
