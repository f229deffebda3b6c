"""When a picture was taken, as far as somebody has written it down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

EARLIEST = 10**9
"""A smaller number is no time since 1970 (it would be before September 2001) but one since a video's beginning: 10000 in all of BDD100K's
own labels, which are of the frame at the tenth second."""
TICKS = (1, 10**3, 10**6, 10**9)
"""Of numbers since 1970, in a second."""


@dataclass(frozen=True)
class Dates:
    """Which pictures are taken, by their days in UTC, both of the limits among them."""

    since: date | None = None
    until: date | None = None
    undated: Literal["drop", "keep"] = "drop"
    """What becomes of those without a date, if there is a limit."""

    @property
    def are_asked_for(self) -> bool:
        """Whether there is a limit."""
        return self.since is not None or self.until is not None

    def hold(self, moment: datetime | None) -> bool:
        """Whether a picture is taken."""
        if not self.are_asked_for:
            return True
        if moment is None:
            return self.undated == "keep"
        day = moment.astimezone(UTC).date()
        return (self.since is None or self.since <= day) and (self.until is None or day <= self.until)


def moment_of(value: Any) -> datetime | None:
    """A moment from seconds, milli-, micro- or nanoseconds since 1970, or from ISO 8601 (UTC if it names no zone); None if it is none."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= EARLIEST:
        return None
    unit = next((unit for unit in TICKS if value / unit < 10 * EARLIEST), None)
    return None if unit is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=value / unit)
