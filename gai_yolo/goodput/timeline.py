"""The starts of a job on one line of time, where each second belongs to one of them and to one part."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from gai_yolo.errors import Ending
from gai_yolo.goodput.record import Phase, Record

USEFUL, REPLAYED, LOST, DOWNTIME = "useful", "replayed", "lost", "downtime"
TIME_PARTS = (
    USEFUL,
    REPLAYED,
    LOST,
    *(str(phase) for phase in (Phase.DATA, Phase.SNAPSHOT, Phase.EVALUATION, Phase.IMPORT, Phase.RENDEZVOUS, Phase.LOAD)),
    *(str(phase) for phase in (Phase.REPORTING, Phase.CLOSING)),
    DOWNTIME,
)
"""What the wall time is split into."""


@dataclass
class Start:
    """The records of one start, as one."""

    record: Record
    """Of the node that got furthest."""
    nodes: list[Record]
    """Of the first processes of all nodes."""
    others: list[Record]
    """Of other processes that had a reason of their own to end."""
    known: int
    """The highest step of all starts before it."""
    running: bool = False
    end: float = 0.0
    """Of its last entry, but not after the exec of a start with a higher number: from then on it can only have hung."""
    gap: float = 0.0
    """Seconds after it in which no start was alive."""
    parts: dict[str, float] = field(default_factory=dict)
    """The seconds that belong to it, by `TIME_PARTS`."""

    @property
    def finished(self) -> bool:
        """Whether nothing was left to do."""
        return any(record.ending == Ending.FINISHED for record in self.nodes)

    @property
    def distinct_steps(self) -> int:
        """Steps that no start before had completed."""
        return 0 if self.record.origin is None else max(0, self.record.highest - max(self.record.origin, self.known))


def starts_of(records: Sequence[Record]) -> list[Start]:
    """The starts in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.start, []).append(record)
    starts = []
    for group in groups.values():
        nodes = [one for one in group if one.local_rank == 0]
        others = [one for one in group if one.local_rank > 0]
        starts.append(Start(max(nodes or others, key=lambda one: (one.highest, one.end)), nodes or others, others, 0))
    starts.sort(key=lambda start: (start.record.number, start.record.began))
    known = 0
    for start in starts:
        start.known = known
        known = max(known, start.record.highest)
    return starts


def extended(record: Record, seconds: float) -> Record:
    """The record, if what the process did last went on for so many seconds."""
    record = replace(record, stretch=record.stretch + seconds)
    if record.phase == Phase.STEP:
        return replace(record, pending_seconds=record.pending_seconds + seconds)
    return replace(record, seconds={**record.seconds, record.phase: record.seconds.get(record.phase, 0.0) + seconds})


def share_out(starts: Sequence[Start]) -> None:
    """Fill in `gap` and `parts` of all starts, so that together they cover the time from the first exec to the last entry once."""
    for start, later in zip(starts, _began_later(starts), strict=True):
        start.end = max(start.record.began, min(start.record.end, later))
    for start, owned in zip(starts, _owned(starts), strict=True):
        start.parts = _parts(start, owned)
    by_time = sorted(starts, key=lambda start: start.record.began)
    last = by_time[0]
    for start in by_time[1:]:
        last.gap = max(0.0, start.record.began - last.end)
        if start.end > last.end:
            last = start


def _began_later(starts: Sequence[Start]) -> list[float]:
    """For each start, in the order of their numbers, the earliest exec of those with a higher one."""
    numbers = [start.record.number for start in starts]
    earliest = [*accumulate((start.record.began for start in reversed(starts)), min, initial=math.inf)][::-1]
    return [earliest[bisect_right(numbers, number)] for number in numbers]


def _owned(starts: Sequence[Start]) -> list[float]:
    """Seconds that belong to each start: those in which none that got further was alive. In n log n steps: what is taken is kept as
    intervals that do not overlap, in order, and those that an interval touches become one with it."""
    owned = [0.0] * len(starts)
    begins: list[float] = []
    ends: list[float] = []
    origin = min(start.record.began for start in starts)
    for place in sorted(range(len(starts)), key=lambda place: (starts[place].record.highest, place), reverse=True):
        begin, end = starts[place].record.began - origin, starts[place].end - origin
        first = bisect_right(ends, begin)
        touched = slice(first, max(first, bisect_left(begins, end)))
        known = list(zip(begins[touched], ends[touched], strict=True))
        owned[place] = max(0.0, end - begin - math.fsum(min(end, one[1]) - max(begin, one[0]) for one in known))
        begins[touched] = [min([begin, *(one[0] for one in known)])]
        ends[touched] = [max([end, *(one[1] for one in known)])]
    return owned


def _parts(start: Start, owned: float) -> dict[str, float]:
    """The `owned` seconds of a start by `TIME_PARTS`. What it does not own is taken from its last phase, where it hung, and beyond that
    from all parts alike."""
    record = start.record
    parts = {str(phase): seconds for phase, seconds in record.seconds.items()}
    steps, num_steps = record.useful_seconds + record.replayed_seconds, record.useful_steps + record.replayed_steps
    useful = record.useful_seconds
    if num_steps and start.distinct_steps != record.useful_steps:  # it did not know of all starts before it
        useful = steps * start.distinct_steps / num_steps
    parts[USEFUL], parts[REPLAYED] = useful, steps - useful
    pending = _pending_part(start)
    parts[pending] = parts.get(pending, 0.0) + record.pending_seconds
    excess = record.elapsed - owned
    if excess > 0:
        last = pending if record.phase == Phase.STEP else str(record.phase)
        parts[last] -= min(excess, record.stretch, parts[last])
        rest = math.fsum(parts.values())
        parts = {part: value * owned / rest if rest > 0 else 0.0 for part, value in parts.items()}
    return parts


def _pending_part(start: Start) -> str:
    """What the time in an uncompleted step counts as."""
    if start.running:
        return USEFUL if (start.record.step or 0) >= max(start.known, start.record.highest) else REPLAYED
    return str(Phase.CLOSING) if start.finished else LOST
