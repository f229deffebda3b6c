"""Which of several endpoints a launcher goes by. Decisions from looks only; who looks is in client.py.

Launchers prefer the endpoint by which most of them go, the earlier one in the list among equals. Where nobody goes by any, it is the
first that answers; but a launcher that has just started waits a while for the first of the list, because the others will. So
survivors of a lost endpoint come to the same next one; a first host that comes back joins the job where it lives now; and of two
halves that went on apart, the smaller gives way when it can see the other again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOST_AFTER = 3
"""Looks in a row without an answer. Looks and not seconds: a node that was stopped for a while has lost nothing."""
OUTVOTED_AFTER = 3
"""Looks in a row that show a better endpoint; launchers on their way are counted twice for a moment."""
SETTLE_SECONDS = 2.0
"""A launcher that has just started looks for so long before it is the first anywhere: a host that is back after a moment lets those
who were there before find it again."""


@dataclass(frozen=True)
class Look:
    """What one look at an endpoint showed."""

    launchers: int
    """How many go by it."""
    failures: int
    """Looks in a row without an answer; then `launchers` is 0."""


@dataclass(frozen=True)
class Target:
    """Where the agent is to go."""

    index: int
    """Of the endpoint in the list."""
    number: int
    """Another number: an agent of the former one must end, though the endpoint may be the same."""
    answers: bool
    """Whether it did when it was last looked at. Until it does, an agent need not be started."""


class EndpointElection:
    """Remembers by which endpoint this launcher goes.

    Args:
        patience: seconds to wait for the first endpoint at the start.
        now: of the clock that `update` is given.
    """

    def __init__(self, patience: float, now: float) -> None:
        self._settled = now + SETTLE_SECONDS
        self._wait_until: float | None = now + patience
        self._index: int | None = None
        self._number = 0
        self._outvoted = 0

    def update(self, looks: Sequence[Look | None], now: float) -> Target | None:
        """Decide, after every look; None: there is nowhere to go, or not yet."""
        if any(look is None for look in looks):
            return None
        seen = [look for look in looks if look is not None]
        if self._index is not None and seen[self._index].failures >= LOST_AFTER:
            self._index = None
        if self._index is None:
            found = choose(seen, may_fall_back=self._wait_until is None or now >= self._wait_until)
            if found is None or (now < self._settled and seen[found].launchers == 0):
                return None
            self._elect(found)
        elif seen[self._index].failures == 0:
            better = _best([*_active(seen), self._index], seen)
            self._outvoted = self._outvoted + 1 if better != self._index else 0
            if self._outvoted >= OUTVOTED_AFTER:
                self._elect(better)
        assert self._index is not None
        return Target(self._index, self._number, answers=seen[self._index].failures == 0)

    def _elect(self, index: int) -> None:
        self._index, self._number, self._outvoted = index, self._number + 1, 0
        self._wait_until = None


def choose(looks: Sequence[Look], may_fall_back: bool) -> int | None:
    """The endpoint for a launcher that goes by none."""
    if active := _active(looks):
        return _best(active, looks)
    answering = [index for index, look in enumerate(looks) if look.failures == 0]
    return answering[0] if answering and (may_fall_back or answering[0] == 0) else None


def _active(looks: Sequence[Look]) -> list[int]:
    return [index for index, look in enumerate(looks) if look.failures == 0 and look.launchers > 0]


def _best(indices: Sequence[int], looks: Sequence[Look]) -> int:
    return min(indices, key=lambda index: (-max(looks[index].launchers, 1), index))
