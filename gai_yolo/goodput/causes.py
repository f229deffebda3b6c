"""Why a start ended, from what its nodes said and from which of them fell silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gai_yolo.errors import OF_ANOTHER, Ending
from gai_yolo.goodput.record import Record

KILLED = "killed without notice"
APART = 2.0
"""Seconds. A record that stops so long before anybody said a word stopped for a reason of its own: entries are made once a second."""
SOON = 1.0
"""Seconds. What is said later than this after somebody missed a peer is a consequence too: the agent ends all its workers."""


@dataclass(frozen=True)
class Cause:
    """Why a start ended."""

    ending: Ending | None
    """None: killed, without a word."""
    words: str
    """For people."""
    node: str | None = None
    """That it came from; None if it came from all of them or cannot be told."""


def cause_of(records: Sequence[Record]) -> Cause:
    """The cause, from at least one record of all nodes of one start that is over: of their first processes, and of others that said
    something."""
    said = [record for record in records if record.ending is not None and record.ended is not None]
    silent = [record for record in records if record.ending is None]
    if not said:
        return Cause(None, KILLED, records[0].node if len(records) == 1 else None)
    first = min(said, key=_ended)
    dead = min(silent, key=lambda record: record.end, default=None)
    if dead is not None and dead.end < _ended(first) - APART:
        return Cause(None, KILLED, dead.node)
    missed = min((_ended(record) for record in said if record.ending in OF_ANOTHER), default=float("inf"))
    causes = [record for record in said if record.ending not in OF_ANOTHER and _ended(record) <= missed + SOON]
    if causes:
        cause = min(causes, key=_ended)
        nodes = {record.node for record in records}
        everywhere = len(nodes) > 1 and nodes == {record.node for record in records if record.ending == cause.ending}
        return Cause(cause.ending, cause.outcome or "", None if everywhere else cause.node)
    if dead is not None:
        return Cause(None, KILLED, dead.node)
    return Cause(first.ending, first.outcome or "")


def _ended(record: Record) -> float:
    assert record.ended is not None
    return record.ended
