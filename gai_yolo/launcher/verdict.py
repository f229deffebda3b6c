"""What the end of an agent means, and what follows from it. Decisions only; who acts is in supervisor.py."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gai_yolo.errors import HARDWARE, INTERRUPTED, LAST_WORDS, LEFT, RESTART, Ending
from gai_yolo.supervision.outcome import Outcome, clear_outcome, read_outcome

EXIT_CODES = """\
exit codes:
    0  done, or nothing left to do
    1  the script failed again and again as soon as it was started, or no endpoint answered for join_timeout
    2  refused; one line says what to mend
    3  a process had another state than the others, twice in a row: broken hardware
    4  no progress: starts from the same step that failed, and none made a new one
   75  left after a notice, state saved; start again elsewhere or later
  130  Ctrl-C
  143  told to end by a signal before the script could say anything
Whatever else ends the script or torchrun, both are started again, after 1 s, 2 s, 4 s, ... 60 s; after 1 s again
once they have lasted for 2 minutes. What time or another node can mend (another job in the run folder, a full disk, a
share that does not answer) is waited for, and one line says for what; a process that is killed ends no job, however often.
"""

DONE, FAILED, RENDEZVOUS_LOST, IN_VAIN, CLOSED, KILLED_AT_ONCE, OBSTRUCTED, TERMINATED = 0, 1, 69, 70, 71, 72, 73, 143
"""Exit codes of the agent; nobody but the launcher sees them. 70: the script fails as soon as it is started; 71: other nodes
have finished the run; 72: processes are killed as soon as they are started; 73: they wait for something."""
FINAL = LAST_WORDS - {Ending.FINISHED, Ending.HARDWARE}
"""Those of `LAST_WORDS` after which the launcher ends, too."""

SOON_SECONDS = 30.0
"""Seconds; who ends earlier may have ended as it was started."""
MOST_AT_ONCE = 3
"""So many such ends in a row, and the agent ends, for the launcher to wait before the next start."""
MOST_VAIN_ENDS = 5
"""So many such ends in a row that were faults of the script are enough..."""
LEAST_VAIN_SECONDS = 30.0
"""...if there was so much time from the first start to the last end: a disk may have had a bad moment."""
LASTED = 120.0
"""Seconds after which a failure is a new one."""
MOST_BACKOFF = 60.0
"""Seconds."""
MOST_WAIT_FOR_OBSTACLE = 30.0
"""Seconds between two looks whether what stood in the way is gone."""


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
        self._vain, self._vain_seconds = 0, 0.0
        self._broken = 0
        self._obstacles, self._told_obstacle = 0, ""

    def judge(self, end: End) -> Verdict:
        """What follows from an end, given those before it."""
        final = _final(end)
        if final is not None:
            return final
        said = end.outcome.ending if end.outcome else None
        self._broken = self._broken + 1 if said == Ending.HARDWARE else 0
        if self._broken == 2 and end.outcome:
            return Verdict(HARDWARE, end.outcome.reason)
        if end.moved:
            return Verdict(None, "")
        if said != Ending.WAITING or end.seconds > LASTED:  # nothing in the way, or something else
            self._obstacles, self._told_obstacle = 0, ""
        if said == Ending.WAITING and end.outcome:
            return self._wait_for(end.outcome.reason)
        ends = MOST_AT_ONCE if end.code == IN_VAIN else 1
        self._vain = self._vain + ends if _is_vain(end) else 0
        self._vain_seconds = self._vain_seconds + end.seconds if self._vain else 0.0
        if self._vain >= MOST_VAIN_ENDS and self._vain_seconds >= LEAST_VAIN_SECONDS:
            who = "the script" if end.code == IN_VAIN or end.outcome else "torchrun"
            times = f"{self._vain} times in a row within {SOON_SECONDS:.0f} s of its start"
            return Verdict(FAILED, f"{who} ended {times}; its messages are above")
        self._failures = 1 if end.seconds > LASTED else self._failures + 1
        wait = backoff(self._failures)
        self._vain_seconds += wait if self._vain else 0.0
        return Verdict(None, f"{_told_end(end)}; starting again in {wait:.0f} s", wait)

    def _wait_for(self, reason: str) -> Verdict:
        """Says what is waited for once, not at each try."""
        self._vain, self._vain_seconds = 0, 0.0
        self._obstacles += 1
        wait = min(backoff(self._obstacles), MOST_WAIT_FOR_OBSTACLE)
        told, self._told_obstacle = self._told_obstacle, reason
        return Verdict(None, "" if told == reason else f"waiting: {reason} Trying again in {wait:.0f} s, and so on", wait)


def _is_vain(end: End) -> bool:
    """Whether the script, or the agent, failed as it was started: an end that says nothing, or a failure; not by a signal."""
    if end.code in (RENDEZVOUS_LOST, KILLED_AT_ONCE, OBSTRUCTED) or end.code < 0 or (end.code != IN_VAIN and end.seconds >= SOON_SECONDS):
        return False
    return end.outcome is None or end.outcome.ending == Ending.FAILED


def _final(end: End) -> Verdict | None:
    """What follows whatever came before."""
    said, reason = (end.outcome.ending, end.outcome.reason) if end.outcome else (None, "")
    if end.code == DONE or said == Ending.FINISHED:
        return Verdict(DONE, "done")
    if said is not None and said in FINAL:
        return Verdict(said.exit_code, reason)
    if end.told is not None:
        return code_when_told(end.told, end.outcome)
    if end.code == CLOSED:
        return Verdict(DONE, "the other nodes have finished the job")
    if said == Ending.LEFT and end.code == TERMINATED and not end.moved:
        return Verdict(said.exit_code, reason)
    return None


def code_when_told(told: signal.Signals, outcome: Outcome | None) -> Verdict:
    """What follows when the launcher itself is to end."""
    if outcome is not None and outcome.ending == Ending.LEFT and told == signal.SIGINT:
        # Workers are told by SIGTERM, whatever this process was told by.
        return Verdict(INTERRUPTED, outcome.reason.replace(signal.SIGTERM.name, "Ctrl-C", 1))
    if outcome is not None and outcome.ending in (Ending.HARDWARE, Ending.LEFT):
        return Verdict(outcome.ending.exit_code, outcome.reason)
    return Verdict(INTERRUPTED if told == signal.SIGINT else TERMINATED, f"ended by {told.name}")


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return float(min(2 ** min(failures - 1, 10), MOST_BACKOFF))


class RestartCounter:
    """The agent's count of the starts of its workers: what must not be started again, and what ends as it is started.

    Args:
        outcome: the file in which workers say why they end.
        exit_codes: of the workers of the last start that have ended, minus a signal's number.
    """

    def __init__(self, outcome: Path, clock: Callable[[], float], exit_codes: Callable[[], Sequence[int]]) -> None:
        self._outcome, self._clock, self._exit_codes = outcome, clock, exit_codes
        self._started: float | None = None
        self._failures = self._kills = 0
        self._has_waited = False

    def before(self, resized: bool) -> int | None:
        """To be called before workers are started: the code with which the agent is to end instead, or None. `resized`: it was the agent
        that ended the former ones, because a node waits."""
        outcome = read_outcome(self._outcome)
        if outcome is not None and outcome.ending in LAST_WORDS:
            return FAILED
        has_waited, self._has_waited = self._has_waited, outcome is not None and outcome.ending == Ending.WAITING
        soon = self._started is not None and self._clock() - self._started < SOON_SECONDS
        if self._has_waited and not resized and (soon or has_waited):
            return OBSTRUCTED  # what is said stays for the launcher; also if imports and index take long each time
        if not soon or resized or (outcome is not None and outcome.ending != Ending.FAILED):
            self._failures = self._kills = 0
        elif have_failed(self._exit_codes()):
            self._failures, self._kills = self._failures + 1, 0
        else:
            self._failures, self._kills = 0, self._kills + 1
        if self._failures >= MOST_AT_ONCE:
            return IN_VAIN
        clear_outcome(self._outcome)
        return KILLED_AT_ONCE if self._kills >= MOST_AT_ONCE else None

    def begun(self) -> None:
        """Workers are started now."""
        self._started = self._clock()


def have_failed(exit_codes: Sequence[int]) -> bool:
    """Whether workers ended because of an error of their script. Not if one was killed: the others may have missed it. Their agent ends
    those that are left with SIGTERM."""
    if any(code < 0 and code != -signal.SIGTERM for code in exit_codes):
        return False
    return any(code > 0 and code not in (LEFT, RESTART, INTERRUPTED) for code in exit_codes)


_TOLD = {
    IN_VAIN: "the script ends as soon as it is started",
    KILLED_AT_ONCE: "processes are killed as soon as they are started",
    RENDEZVOUS_LOST: "the rendezvous was lost",
}


def _told_end(end: End) -> str:
    if end.outcome is not None and end.code in (FAILED, TERMINATED, IN_VAIN):
        return end.outcome.reason
    if end.code < 0:
        return f"torchrun was killed by {signal.Signals(-end.code).name}"
    return _TOLD.get(end.code, f"torchrun ended with code {end.code}")
