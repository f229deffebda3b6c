"""What each start of the job leaves behind about its time: one small file of each node, `RUN_FOLDER/goodput/*.json`.

A file is written over in place, without fsync: the operating system keeps what a killed process wrote, and after a power cut a
torn file costs a record, not the run. Readers trust the checksum. Nodes without common storage hand each other their records
(`read_records`, `keep_records`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from gai_yolo.errors import Ending
from gai_yolo.log import OF_NODE, told_if_refused
from gai_yolo.store.atomic import publish

BLOCK = 1024
"""Files are padded with spaces to a multiple of so many bytes, so that writing over one never leaves an old end."""
COMPACTED = "compacted.json"
"""Holds the records of old starts: `{"records": [...]}`."""
KEPT_STARTS = 50
"""The newest starts keep files of their own, which a process that was cut off may still write to."""
COMPACTED_AT_ONCE = 50
"""Starts; the file is not written anew for each of them."""
ATTEMPTS = 3
"""A file that is read while it is written over may be a mixture; the next look is not."""

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """What a process spends its time on; each second belongs to exactly one."""

    IMPORT = "import"
    """From the exec of the process on."""
    RENDEZVOUS = "rendezvous"
    LOAD = "load"
    """Data index, network, the state that is gone on from."""
    STEP = "step"
    DATA = "data"
    """Waiting for the next batch."""
    SNAPSHOT = "snapshot"
    """The training thread stands still because the state is copied or written."""
    EVALUATION = "evaluation"
    REPORTING = "reporting"
    CLOSING = "closing"


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Clock = Annotated[float, Field(allow_inf_nan=False)]
"""Seconds since 1970."""
Said = Annotated[Ending, BeforeValidator(lambda said: said if said in list(Ending) else Ending.UNKNOWN)]
"""An ending, or one of a later version."""
Count = Annotated[int, Field(ge=0)]


@dataclass
class Record:
    """One start, as the first process of one node saw it, or another process that had a reason of its own to end. Times on the wall are
    `began` plus what its own clock counted, so a wall clock that is set meanwhile shifts nothing."""

    began: Clock
    """When the process was started."""
    phase: Phase = Phase.IMPORT
    """What it did last."""
    format: Literal[1] = 1
    id: str = ""
    """Of this record alone."""
    number: Count = 0
    """Grows with every start of the job."""
    start: str = ""
    """The same on all nodes of a start, and no other's."""
    node: str = ""
    rank: Count = 0
    local_rank: Count = 0
    """Of its node's processes; 0 for the first."""
    world_size: Count = 1
    beat: Clock = 0.0
    """The wall clock when this was written."""
    seconds: dict[Phase, Seconds] = field(default_factory=dict)
    """Of every phase but `step`."""
    useful_seconds: Seconds = 0.0
    """In steps that no earlier start had completed."""
    replayed_seconds: Seconds = 0.0
    pending_seconds: Seconds = 0.0
    """In the step that is not completed yet."""
    stretch: Seconds = 0.0
    """In the present phase, without a break."""
    useful_steps: Count = 0
    replayed_steps: Count = 0
    origin: Count | None = None
    """The completed step that this start went on from; None until it is known."""
    source: str = ""
    """Where the state came from: memory, durable, peer, nothing."""
    known: Count = 0
    """The highest step that an earlier start was known to have completed."""
    step: Count | None = None
    """The last completed one."""
    highest: Count = 0
    """The highest completed one; not `step` if training went back without a new start."""
    epoch: Count = 0
    """The one that is being trained, from 1."""
    total_steps: Count | None = None
    epochs: Count | None = None
    pace: Seconds | None = None
    """Wall seconds of a step lately, evaluations left out."""
    ending: Said | None = None
    """How it ended, if it could say. Missing in records of older versions."""
    outcome: str | None = None
    """The same for people."""
    ended: Clock | None = None
    """When it said so."""

    def __post_init__(self) -> None:
        if self.outcome is not None and self.ending is None:
            self.ending = Ending.FINISHED if self.outcome == Ending.FINISHED else Ending.UNKNOWN

    @property
    def elapsed(self) -> float:
        """Seconds from the start of the process to the last entry."""
        return math.fsum((*self.seconds.values(), self.useful_seconds, self.replayed_seconds, self.pending_seconds))

    @property
    def end(self) -> float:
        """When the last entry was made, in seconds since 1970."""
        return self.began + self.elapsed

    @property
    def name(self) -> str:
        """Of its file: no two records share one, whoever writes to the same folder."""
        start, node = (re.sub(r"[^A-Za-z0-9.-]", "_", text)[:60] for text in (self.start, self.node))
        return f"{self.number:06d}-{start}-{node}-{self.id}.json"


_PARSER = TypeAdapter(Record)


def parse_records(records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The records in plain dicts, the newest of each id only; what is no record is left out."""
    parsed = []
    for one in records:
        with contextlib.suppress(ValidationError):  # of another version of this program
            parsed.append(_PARSER.validate_python(dict(one)))
    return newest_of_each(parsed)


def newest_of_each(records: Iterable[Record]) -> list[Record]:
    """Each record once, as it was last."""
    newest: dict[str, Record] = {}
    for record in records:
        if record.id not in newest or newest[record.id].elapsed < record.elapsed:
            newest[record.id] = record
    return list(newest.values())


def plain(record: Record) -> dict[str, Any]:
    """A record as a dict for JSON; seconds to the microsecond."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(record)), parse_float=lambda text: round(float(text), 6))
    return values


def pack(record: Mapping[str, Any]) -> bytes:
    """Content of a record's file."""
    text = json.dumps(record)
    data = f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}'.encode()
    return data.ljust(-(-len(data) // BLOCK) * BLOCK - 1) + b"\n"


def unpack(data: bytes) -> dict[str, Any]:
    """The record in a file. Raises `ValueError` if it is torn, damaged or something else."""
    record = json.loads(data)
    if not isinstance(record, dict) or record.pop("crc32", None) != zlib.crc32(json.dumps(record).encode()):
        raise ValueError("the checksum is wrong")
    return record


def read_records(folder: Path) -> tuple[list[Record], list[Path]]:
    """The records in a folder, the oldest first, and the files that hold none. A folder that is not there is empty."""
    # What was put together is read last: what was removed meanwhile had been put there before.
    read = {path: _read(path) for path in [*_paths(folder), folder / COMPACTED]}
    found = parse_records(record for one in read.values() if one for record in one.get("records", [one]))
    return sorted(found, key=lambda record: record.number), [path for path, one in read.items() if one is None]


def compact_records(folder: Path) -> None:
    """Put the records of old starts into one file, if there are many: reading thousands of files takes its time at each start. One process
    of all that share the folder may do so, and none that opens a record meanwhile.

    A crash in between leaves records in two places, and none in none.

    Raises:
        OSError: the disk refuses; nothing is lost.
    """
    starts = [list(paths) for _, paths in groupby(_paths(folder), lambda path: path.name.partition("-")[0])]
    if len(starts) < KEPT_STARTS + COMPACTED_AT_ONCE:
        return
    old = [path for paths in starts[:-KEPT_STARTS] for path in paths]
    found = {path: record for path in old if (record := _read(path))}
    before = _read(folder / COMPACTED)
    if before is None:
        return  # damaged: what it holds may still be made out by a person
    everything = [*before.get("records", []), *found.values()]
    records = {record.id: plain(record) for record in parse_records(everything)}
    foreign = [one for one in everything if one.get("id") not in records]  # of a later version
    content = pack({"records": [*foreign, *records.values()]})
    publish(folder / COMPACTED, lambda file: file.write(content))
    for path in found:
        path.unlink(missing_ok=True)


def _paths(folder: Path) -> list[Path]:
    """Files of single records, in the order of their starts."""
    try:
        return sorted(path for path in folder.glob("*.json") if path.name != COMPACTED)
    except OSError:
        return []


def keep_records(folder: Path, records: Sequence[Record]) -> None:
    """Write what other nodes know and this folder does not, so that the account outlives any node. Never raises."""
    have = {record.id: record.elapsed for record in read_records(folder)[0]}
    with told_if_refused(logger, folder, "records of earlier starts cannot be kept here", extra=OF_NODE):
        for record in newest_of_each(records):
            if have.get(record.id, -1.0) < record.elapsed:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / record.name).write_bytes(pack(plain(record)))


def high_water(records: Sequence[Record]) -> int:
    """The highest step that any of these starts has completed."""
    return max((record.highest for record in records), default=0)


def next_number(records: Sequence[Record]) -> int:
    """A number for the start after these."""
    return 1 + max((record.number for record in records), default=0)


def _read(path: Path) -> dict[str, Any] | None:
    """A file's content; {} if there is none yet or any more, None if it is damaged."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.001)
        try:
            data = path.read_bytes()
            return unpack(data) if data else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            continue
    return None
