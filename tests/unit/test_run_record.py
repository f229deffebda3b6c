"""The run record: whole, or known for what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gai_yolo.errors import CheckpointError
from gai_yolo.store.manifest import Position
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.run_record import START, RecordError, RunRecord, Settled, Turn, decode, encode

RECORD = RunRecord(
    "2-5f3a",
    (Turn(START, {"loss.box": 7.5, "classes": ["a", "b"], "training.max_batches_per_epoch": None}), Turn(Position(3, 0, 48), {}, "r1")),
    {"micro_batch_size": Settled(4, {"training.batch_size": 16}), "optimizer": Settled("adamw", {"the number of steps": 12})},
)


def test_a_record_is_read_as_it_was_written() -> None:
    """Loss: two nodes' equal records are called different runs, because a number came back as another type."""
    assert decode(encode(RECORD)) == RECORD
    assert encode(decode(encode(RECORD))) == encode(RECORD)
    assert RECORD.generation == 2 and RECORD.rollbacks == 1 and RunRecord("x").generation == 1


def test_every_change_of_the_file_is_noticed() -> None:
    """Loss: a flipped bit in a settled value, and the run goes on as another one."""
    text = encode(RECORD)
    for place in range(len(text)):
        other = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        try:
            assert decode(other) == RECORD, "white space between the values alone says nothing"
        except (RecordError, CheckpointError):
            continue
    for length in range(len(text) - 1):
        with pytest.raises(RecordError):
            decode(text[:length])


def test_a_record_of_another_version_is_refused() -> None:
    """Loss: an older program, which does not know what a newer one has written, begins the run anew."""
    values = json.loads(encode(RECORD)) | {"format": 2}
    with pytest.raises(RecordError, match="checksum"):
        decode(json.dumps(values))
    from gai_yolo.store.run_record import _checksum

    values.pop("checksum")
    with pytest.raises(CheckpointError, match="another version"):
        decode(json.dumps({**values, "checksum": _checksum(values)}))


def test_the_id_of_an_older_version_is_read_until_there_is_a_record(tmp_path: Path) -> None:
    """Loss: an update of the program makes every run another one."""
    folder = RunFolder(tmp_path / "run")
    assert folder.record() is None
    folder.path.mkdir()
    (folder.path / ".run_id").write_text("1-feed")
    assert folder.record() == RunRecord("1-feed")
    folder.set_record(RECORD)
    assert folder.record() == RECORD


def test_what_cannot_be_read_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """Loss: a disk that hiccups, and the settled values are settled anew."""
    folder = RunFolder(tmp_path / "run")
    folder.record_path.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        folder.record()
