"""Which checkpoints are written, and which one is continued from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gai_yolo.errors import CheckpointError
from gai_yolo.training.snapshots import Snapshots, newest


def _state(epoch: int) -> dict[str, Any]:
    return {"format": 1, "epoch": epoch, "weights": torch.full((1000,), float(epoch))}


class Code:
    """A pickle of this touches a file when it is loaded carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.trace), "w"))


def test_interval_and_last_epoch_decide_what_is_written(tmp_path: Path) -> None:
    """The last epoch must be there whatever the interval."""
    snapshots = Snapshots(tmp_path, interval=3, epochs=7, identity={"config": {"a": 1}})
    written = [snapshots.save_epoch(_state(epoch)) for epoch in range(1, 8)]
    assert [path.name for path in written if path] == ["epoch_003.pt", "epoch_006.pt", "epoch_007.pt"]
    snapshots.save_best(_state(2))
    found = newest(tmp_path, pytest.fail)
    assert found is not None and found.path.name == "epoch_007.pt"
    assert found.content["config"] == {"a": 1}
    assert torch.equal(found.content["weights"], torch.full((1000,), 7.0))


def test_newest_is_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    """epoch_1000 sorts before epoch_999 as text, and a copy has a newer time."""
    snapshots = Snapshots(tmp_path, 1, 2000, {})
    snapshots.save_epoch(_state(1000))
    snapshots.save_epoch(_state(999))
    found = newest(tmp_path, pytest.fail)
    assert found is not None and found.content["epoch"] == 1000


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage " * 1000)


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _wrong_name(path: Path) -> None:
    torch.save(_state(1), path)


def _list(path: Path) -> None:
    torch.save([1, 2, 3], path)


@pytest.mark.parametrize("spoil", [_truncate, _empty, _garbage, _zeros, _wrong_name, _list])
def test_bad_newest_file_is_told_left_in_place_and_passed_over(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    """A torn newest checkpoint must not block the resume (transformers #35782)."""
    snapshots = Snapshots(tmp_path, 1, 9, {})
    for epoch in (1, 2, 3):
        snapshots.save_epoch(_state(epoch))
    bad = tmp_path / "epoch_003.pt"
    spoil(bad)
    before, told = bad.read_bytes(), list[str]()
    found = newest(tmp_path, told.append)
    assert found is not None and found.content["epoch"] == 2
    assert len(told) == 1 and str(bad) in told[0]
    assert bad.read_bytes() == before


def test_checkpoint_that_carries_code_does_not_run_it(tmp_path: Path) -> None:
    """Opening a file from somewhere else must never execute it."""
    trace = tmp_path / "ran"
    torch.save({**_state(5), "extra": Code(trace)}, tmp_path / "epoch_005.pt")
    told: list[str] = []
    assert newest(tmp_path, told.append) is None
    assert "could run code" in told[0]
    assert not trace.exists()


def test_other_format_is_refused(tmp_path: Path) -> None:
    """Reading another version's file as ours would continue from nonsense."""
    torch.save({**_state(4), "format": 2}, tmp_path / "epoch_004.pt")
    with pytest.raises(CheckpointError, match=r"epoch_004\.pt: not in this program's checkpoint format 1 \(found 2\)"):
        newest(tmp_path, pytest.fail)


def test_nothing_there(tmp_path: Path) -> None:
    """A first start has no checkpoint, and perhaps other files."""
    (tmp_path / "epoch_abc.pt").write_text("x")
    (tmp_path / ".epoch_001.pt.x.tmp").write_text("x")
    assert newest(tmp_path, pytest.fail) is None
    assert newest(tmp_path / "none", pytest.fail) is None


def test_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    """A traceback does not say that older checkpoints are safe."""
    snapshots = Snapshots(tmp_path / "gone", 1, 9, {})
    with pytest.raises(CheckpointError, match=r"epoch_001\.pt: cannot be written \(No such file or directory\)"):
        snapshots.save_epoch(_state(1))
