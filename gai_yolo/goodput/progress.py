"""Whether there is hope in starting again from a step: a pure function of the records that earlier starts have left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from gai_yolo.errors import OWN_FAULTS, Ending, NoProgress
from gai_yolo.goodput.causes import Cause, cause_of
from gai_yolo.goodput.record import Record, high_water

MOST_IN_VAIN = 3
"""Starts from one step that may fail in the same way. What comes more often than this is made slower."""
LEAST_SECONDS = 60.0
"""Between the first of them and the end of the last. What three starts in quick succession found wrong may be well in a minute."""
MOST_WAIT = 60.0
"""Seconds."""
OF_A_PERSON = frozenset({Ending.FINISHED, Ending.REFUSED, Ending.INTERRUPTED, Ending.DIVERGED, Ending.NO_PROGRESS})
"""Endings after which it was a person who started the job again."""
EXCUSED = frozenset({Ending.LEFT, Ending.PEER_LEFT, Ending.WAITING})
"""Endings that say nothing about the job: it was asked to leave, or waits for a disk, which has a pace of its own."""


@dataclass(frozen=True)
class Delay:
    """What is to be waited for before training goes on."""

    seconds: float = 0.0
    reason: str = ""
    """For people; empty if there is nothing to wait for."""


def judge_progress(records: Sequence[Record], step: int) -> Delay:
    """How long to wait before a start from a step, given those before it.

    Only a fault that a start has found in itself, and could name, ends a job, and only if it comes `MOST_IN_VAIN` times over at least
    `LEAST_SECONDS` without a new step in between. Sudden deaths and lost peers never do: machines die as often as they like. Whatever
    comes often is made slower.

    Raises:
        NoProgress: there is no hope.
    """
    failures: list[tuple[Sequence[Record], Cause]] = []
    sudden = 0
    newest_first = sorted(records, key=attrgetter("number"), reverse=True)
    starts = [list(of_start) for _, of_start in groupby(newest_first, attrgetter("number"))]
    reached = [high_water(of_start) for of_start in starts]
    for number, of_start in enumerate(starts):
        if any(record.origin not in (None, step) for record in of_start):
            break
        if reached[number] > max([step, *reached[number + 1 :]]):
            break  # steps that no start before had made; the same ones again, up to the same fault, are no progress
        if any(record.ending in OF_A_PERSON for record in of_start):
            break
        cause = cause_of(of_start)
        if cause.ending in OWN_FAULTS:
            failures.append((of_start, cause))
        elif cause.ending not in EXCUSED:
            sudden += 1
    if len(failures) >= MOST_IN_VAIN:
        first, last = failures[-1][0], failures[0][0]
        if max(record.end for record in last) - min(record.began for record in first) >= LEAST_SECONDS:
            raise NoProgress(
                f"no progress: the last {len(failures)} starts that failed went on from step {step} and did not complete another one; the "
                f"last one: {failures[0][1].words}. Mend that and start again; nothing was lost."
            )
    times = len(failures) + sudden
    if times < MOST_IN_VAIN:
        return Delay()
    seconds = min(2.0 ** min(times - MOST_IN_VAIN, 10), MOST_WAIT)
    return Delay(seconds, f"{times} starts from step {step} have ended before a new step was made: going on in {seconds:.0f} s")
