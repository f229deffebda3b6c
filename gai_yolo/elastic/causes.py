"""Why a start ended, from what its nodes said and from which of them fell silent."""

from __future__ import annotations

from collections.abc import Sequence

from gai_yolo.elastic.records import Record

KILLED = "killed without notice"
PEER = "peer "
"""Outcomes that begin so (`peer lost`, `peer left`) tell of something that happened elsewhere."""
APART = 2.0
"""Seconds. A record that stops so long before anybody said a word stopped for a reason of its own: entries are made once a second."""
SOON = 1.0
"""Seconds. What is said later than this after somebody missed a peer is a consequence too: the agent ends all its workers."""


def cause_of(records: Sequence[Record]) -> tuple[str, str | None]:
    """The cause, and the node it came from; None if it came from all of them or cannot be told.

    Args:
        records: of all nodes of one start that is over, at least one.
    """
    said = [record for record in records if record.outcome is not None and record.ended is not None]
    silent = [record for record in records if record.outcome is None]
    if not said:
        return KILLED, records[0].node if len(records) == 1 else None
    first = min(said, key=_ended)
    dead = min(silent, key=lambda record: record.end, default=None)
    if dead is not None and dead.end < _ended(first) - APART:
        return KILLED, dead.node
    missed = min((_ended(record) for record in said if _tells_of_another(record)), default=float("inf"))
    causes = [record for record in said if not _tells_of_another(record) and _ended(record) <= missed + SOON]
    if causes:
        cause = min(causes, key=_ended)
        everywhere = len(records) > 1 and all(record.outcome == cause.outcome for record in records)
        return cause.outcome or "", None if everywhere else cause.node
    if dead is not None:
        return KILLED, dead.node
    return first.outcome or "", None


def _ended(record: Record) -> float:
    assert record.ended is not None
    return record.ended


def _tells_of_another(record: Record) -> bool:
    return (record.outcome or "").startswith(PEER)
