"""What a run folder, and a node's memory, know of a run beside its states: whose they are, which way it went, what was settled at first.

The record is durable on every node before the first step, so that a run that was interrupted before anything was saved begins again as
the same run. It is small, and published by rename; a checksum tells a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gai_yolo.errors import CheckpointError
from gai_yolo.store.filesystem import REAL, FileSystem
from gai_yolo.store.manifest import Position

RECORD_FORMAT = 1
"""Version of the record's layout."""
START = Position(0, 0, 0)
"""Before the first step."""


class RecordError(Exception):
    """Not a run record, or a damaged one."""


@dataclass(frozen=True)
class Settled:
    """A value that the first start decided for the whole life of a run."""

    value: int | str
    basis: dict[str, Any]
    """The settings that it follows from. It binds a run of which nothing was saved yet only as long as they are the same."""


@dataclass(frozen=True)
class Turn:
    """Where the way of a run was decided by a person: at its beginning, by other settings, by going back."""

    position: Position
    settings: dict[str, Any]
    """What the weights follow from, from here on: key paths and values, the digest of the data among them."""
    rollback: str = ""
    """A random word if it is gone back to this position: states beyond it that were made before are out of date."""


@dataclass(frozen=True)
class RunRecord:
    """Of one run; runs of equal `turns` are the same trajectory."""

    run_id: str
    """Drawn at random, after the generation: `2-5f3a...`."""
    turns: tuple[Turn, ...] = ()
    """In the order in which they were made; empty if an older version, or a start that did not get far, has left it unsaid."""
    settled: dict[str, Settled] = field(default_factory=dict)
    """By field of `training`."""
    anchored: bool = True
    """In memory: whether the run folder holds the record too. Then the state in memory counts only as long as it does."""
    launch: str = ""
    """The job that began it with --fresh; empty if none did. Its nodes, which may not all have been there, belong together."""

    @property
    def generation(self) -> int:
        """How often the run was started over, from 1; counted, because clocks of machines differ."""
        match = re.match(r"(\d{1,9})-", self.run_id)
        return int(match[1]) if match else 1

    @property
    def rollbacks(self) -> int:
        """How often a person has gone back."""
        return sum(bool(turn.rollback) for turn in self.turns)


_PARSER = TypeAdapter(RunRecord)


def encode(record: RunRecord) -> str:
    """JSON with a checksum; equal for equal records."""
    values = json.loads(json.dumps({"format": RECORD_FORMAT, **asdict(record)}))
    return json.dumps({**values, "checksum": _checksum(values)}, indent=1) + "\n"


def decode(text: str) -> RunRecord:
    """The record in the content of a file.

    Raises:
        CheckpointError: whole, but of another version of this program.
        RecordError: anything else than `encode` makes.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        checksum = values.pop("checksum")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RecordError("is not a run record, or was cut off") from None
    if checksum != _checksum(values):
        raise RecordError("was changed: its checksum does not fit")
    if values.pop("format", None) != RECORD_FORMAT:
        raise CheckpointError("the run record was written by another version of this program; go on with that one, or --fresh starts over.")
    try:
        return _PARSER.validate_python(values)
    except ValueError:
        raise RecordError("is not the record of a run") from None


def read_record(path: Path, old: Path, fs: FileSystem = REAL) -> RunRecord | None:
    """The record in a file, or None if there is none.

    Args:
        old: where older versions kept a run's id, and nothing else.

    Raises:
        OSError: it cannot be read, which does not mean that there is none.
        CheckpointError: as `decode`.
        RecordError: it is damaged.
    """
    for one in (path, old):
        try:
            text = fs.content(one).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            continue
        return decode(text) if one is path else RunRecord(text.strip())
    return None


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
