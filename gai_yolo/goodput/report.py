"""The account of a job's time over all its starts: a pure function of the records they left.

The wall time runs from the first start's exec to the last entry, and each second of it is in exactly one of `TIME_PARTS`:

- The records of one start on several nodes are one: that of the node that got furthest.
- Starts may overlap: a node that was cut off hangs, or trains on, while the others go on without it. The time of a start ends with the
  exec of one with a higher number; a second in the life of several with the same number belongs to the one that got furthest.
- The step that a death interrupted is `lost`; steps that are done again are `replayed`.
- From the last entry of a dead process (it died within a second after) to the exec of the next it is `downtime`, except after a start
  that finished: nothing is to be done then, and that pause is no part of the wall time.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from gai_yolo.errors import Ending
from gai_yolo.goodput.causes import Cause, cause_of
from gai_yolo.goodput.record import Phase, Record, Said, newest_of_each
from gai_yolo.goodput.timeline import DOWNTIME, LOST, TIME_PARTS, USEFUL, Start, extended, share_out, starts_of

REPORT_FILE = "goodput.json"
"""In the run folder; see `as_json`."""
SILENCE = 10.0
"""Seconds without an entry after which a process that did not say goodbye is taken for dead."""


@dataclass(frozen=True)
class Interruption:
    """A start that ended before the run was finished."""

    time: float
    """When it ended, seconds since 1970."""
    number: int
    """Of the start."""
    cause: str
    node: str | None
    """That it came from, where one is to be named."""
    phase: Phase
    """What was being done."""
    step: int | None
    """The last completed one; None if it was not known yet."""
    resumed_from: int | None
    """The step that training went on from; None if it has not yet."""
    source: str
    """Of the state that it went on from."""
    lost_steps: int
    """Completed, and to be done again."""
    lost_seconds: float
    """In the step that was interrupted."""
    downtime: float
    """Seconds to the exec of the next start."""
    world_before: int
    world_after: int | None
    ending: Said | None = None
    """Of the cause, if it could say; None also in accounts of older versions."""


@dataclass(frozen=True)
class Report:
    """The account of a job. Seconds are wall seconds, times are seconds since 1970."""

    as_of: float
    """The end of the wall time."""
    running: bool
    silence: float | None
    """Seconds since the newest start's last entry, by the reader's clock; None if nobody asked."""
    outcome: str | None
    """Why the newest start ended, if it said so."""
    phase: Phase
    """What the newest start did last."""
    starts: int
    world_size: int
    nodes: dict[str, float | None]
    """Nodes of the newest start, and the seconds since their last entries."""
    epoch: int
    """The one that is being trained, from 1; 0 before the first."""
    epochs: int | None
    step: int
    total_steps: int | None
    pace: float | None
    """Seconds of a step lately."""
    eta: float | None
    """Seconds left, evaluations at their average so far, interruptions not foreseen."""
    began: float
    wall: float
    seconds: dict[str, float]
    """By `TIME_PARTS`; they add up to `wall`."""
    goodput: float
    """The share of useful steps in the wall time, 0 to 1."""
    useful_steps: int
    """Different steps done."""
    replayed_steps: int
    lost_steps: int
    paused: float
    """Between a start that finished and the next; no part of the wall time."""
    counted_once: float
    """Seconds in which two starts were alive, or seemed so by clocks that differ."""
    interruptions: tuple[Interruption, ...]
    ending: Said | None = None
    """How the newest start ended, if it said so; None also in accounts of older versions."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.ending == Ending.FINISHED or self.outcome == Ending.FINISHED


_PARSER = TypeAdapter(Report)


def report(records: Iterable[Record], now: float | None = None) -> Report:
    """Account for the time of a job.

    Args:
        records: of all starts and nodes, in any order, doubles allowed.
        now: the present time, to see whether the job is running; None to look at the records alone.

    Raises:
        ValueError: there is no record.
    """
    starts = starts_of(newest_of_each(records))
    if not starts:
        raise ValueError("no start has left a record")
    newest = starts[-1]
    silence = None if now is None else _go_on_to(now, newest)
    share_out(starts)
    seconds = {part: math.fsum(start.parts.get(part, 0.0) for start in starts) for part in TIME_PARTS}
    seconds[DOWNTIME] = math.fsum(start.gap for start in starts if not start.finished)
    wall = math.fsum(seconds.values())
    interruptions = tuple(_interruptions(starts))
    useful_steps = sum(start.distinct_steps for start in starts)
    all_steps = sum(start.record.useful_steps + start.record.replayed_steps for start in starts)
    (where, pace), cause = _where(starts), _cause(newest)
    return Report(
        as_of=max(start.end for start in starts),
        running=newest.running,
        silence=silence,
        outcome=cause.words if cause else None,
        phase=newest.record.phase,
        starts=len(starts),
        world_size=newest.record.world_size,
        nodes={record.node: None if now is None else now - record.beat for record in sorted(newest.nodes, key=lambda one: one.node)},
        epoch=where.epoch,
        epochs=where.epochs,
        step=where.step or 0,
        total_steps=where.total_steps,
        pace=pace,
        eta=_eta(where, pace, seconds[Phase.EVALUATION] / all_steps if all_steps else 0.0),
        began=min(start.record.began for start in starts),
        wall=wall,
        seconds=seconds,
        goodput=seconds[USEFUL] / wall if wall > 0 else 0.0,
        useful_steps=useful_steps,
        replayed_steps=all_steps - useful_steps,
        lost_steps=sum(one.lost_steps for one in interruptions),
        paused=math.fsum(start.gap for start in starts if start.finished),
        counted_once=max(0.0, math.fsum(start.record.elapsed - math.fsum(start.parts.values()) for start in starts)),
        interruptions=interruptions,
        ending=cause.ending if cause else None,
    )


def _go_on_to(now: float, newest: Start) -> float:
    """Let the newest start go on to the present time if it gives signs of life; returns the seconds since the last one."""
    silence = now - max(record.beat for record in newest.nodes)
    if silence <= SILENCE and all(record.ending is None for record in newest.nodes):
        newest.running = True
        newest.record = extended(newest.record, min(SILENCE, max(0.0, now - newest.record.end)))
    return silence


def as_json(given: Report) -> str:
    """Content of `goodput.json`."""
    return json.dumps(asdict(given), indent=1) + "\n"


def from_json(text: str) -> Report:
    """The report in a `goodput.json`. Raises `ValueError`."""
    return _PARSER.validate_json(text)


def scalars(given: Report) -> dict[str, float]:
    """For TensorBoard: the share of each part of the time in percent, and how much was done again."""
    shares = {f"Goodput/{part}": 100 * value / given.wall if given.wall > 0 else 0.0 for part, value in given.seconds.items()}
    return {**shares, "Goodput/replayed_steps": given.replayed_steps, "Goodput/interruptions": len(given.interruptions)}


def _interruptions(starts: Sequence[Start]) -> Iterator[Interruption]:
    """How starts ended, in their order."""
    everyone = [start.record for start in starts]
    positioned = [record for record in everyone if record.origin is not None]
    for start in starts:
        if not (start.finished or start.running):
            yield _interruption(start, _next(everyone, start), _next(positioned, start))


def _next(records: Sequence[Record], start: Start) -> Record | None:
    """The first of a start with a higher number, of records in the order of their numbers."""
    place = bisect_right(records, start.record.number, key=lambda record: record.number)
    return records[place] if place < len(records) else None


def _interruption(start: Start, following: Record | None, positioned: Record | None) -> Interruption:
    """How a start ended, given the next one, and the next one that knew its step."""
    record = start.record
    resumed_from = positioned.origin if positioned else None
    cause = cause_of([*start.nodes, *start.others])
    return Interruption(
        time=start.end,
        number=record.number,
        cause=cause.words,
        node=cause.node,
        phase=next((one.phase for one in start.nodes if one.node == cause.node), record.phase),
        step=record.step,
        resumed_from=resumed_from,
        source=positioned.source if positioned else "",
        lost_steps=max(0, record.step - resumed_from) if record.step is not None and resumed_from is not None else 0,
        lost_seconds=start.parts.get(LOST, 0.0),
        downtime=start.gap,
        world_before=record.world_size,
        world_after=following.world_size if following else None,
        ending=cause.ending,
    )


def _where(starts: Sequence[Start]) -> tuple[Record, float | None]:
    """The record that says where training is, and the seconds of a step lately, of the newest starts that know it."""
    latest = [start.record for start in reversed(starts)]
    where = next((record for record in latest if record.step is not None), latest[0])
    return where, next((record.pace for record in latest if record.pace is not None), None)


def _cause(start: Start) -> Cause | None:
    """Why a start ended, if anybody said so."""
    if start.finished:
        return Cause(Ending.FINISHED, Ending.FINISHED)
    records = [*start.nodes, *start.others]
    return cause_of(records) if any(record.ending for record in records) else None


def _eta(where: Record, pace: float | None, evaluation: float) -> float | None:
    """Seconds left, with `evaluation` seconds for each step."""
    if where.total_steps is None or where.step is None:
        return None
    left = max(0, where.total_steps - where.step)
    return None if left and pace is None else left * ((pace or 0.0) + evaluation)
