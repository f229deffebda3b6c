"""`best.pt` is people's: whatever they do with it costs no checkpoint, and nothing of theirs is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gai_yolo.checkpointing.writer_process import BestRenewed, renew
from gai_yolo.store.atomic import copy_temp_file
from gai_yolo.store.best import BestCopy
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.store import Store


class Counting(FileSystem):
    """Counts the files that are opened for reading, by name."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def open(self, path: Path):  # type: ignore[no-untyped-def]
        self.read.append(path.name)
        return super().open(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of an empty run."""
    for name in ("checkpoints", "snapshots"):
        (tmp_path / "run" / name).mkdir(parents=True)
    return Store(tmp_path / "run", raise_fence(tmp_path / ".run.fence"), Counting())


def save(store: Store, epoch: int, metric: float) -> Path:
    """An epoch's checkpoint."""
    one = Manifest("epoch", Position(10 * epoch, epoch, 160 * epoch), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z", metric)
    return store.data_path(store.publish(one, lambda file: file.write(content_of(epoch)))[0])


def content_of(epoch: int) -> bytes:
    """More than one piece."""
    return bytes([epoch]) * 9_000_000


def asides(best: Path) -> list[bytes]:
    """What was kept of files of people's own."""
    return [path.read_bytes() for path in sorted(best.parent.glob("best.pt.aside-*"))]


def test_writing_into_best_leaves_the_checkpoint_alone(store: Store) -> None:
    """Loss: torch.save(ema, "best.pt") destroys the newest checkpoint, because both are one file."""
    checkpoint, best = save(store, 1, 0.5), BestCopy(store)
    best.renew()
    assert best.path.read_bytes() == content_of(1)
    best.path.write_bytes(b"EMA only")
    assert checkpoint.read_bytes() == content_of(1)
    assert Store(store.run, store.fence).defect_of(store.listing().present[0]) is None


def test_hard_link_of_an_older_version_becomes_a_file_of_its_own(store: Store) -> None:
    """Loss: the run of yesterday stays as fragile as it was."""
    checkpoint, best = save(store, 1, 0.5), BestCopy(store)
    os.link(checkpoint, best.path)
    assert best.renew() == []
    assert not best.path.samefile(checkpoint) and best.path.read_bytes() == content_of(1) and asides(best.path) == []


def test_a_persons_own_file_stays_until_another_epoch_is_better_and_is_kept_then(store: Store) -> None:
    """Loss: the weights that somebody has put there are overwritten within the epoch, without a word."""
    save(store, 1, 0.5)
    best = BestCopy(store)
    best.renew()
    best.path.write_bytes(b"mine")
    assert len(best.renew()) == 1 and best.path.read_bytes() == b"mine"
    save(store, 2, 0.6)
    (note,) = BestCopy(store).renew()
    assert "best.pt.aside-1" in note and asides(best.path) == [b"mine"] and best.path.read_bytes() == content_of(2)


def test_a_persons_own_file_is_kept_where_nothing_is_known_of_it(store: Store) -> None:
    """Loss: the same in a run folder without a record, that of an older version say."""
    save(store, 1, 0.5)
    best = BestCopy(store)
    best.path.write_bytes(b"mine")
    assert len(best.renew()) == 1
    assert asides(best.path) == [b"mine"] and best.path.read_bytes() == content_of(1)


@pytest.mark.parametrize("there_before", [True, False])
def test_what_a_person_writes_while_the_copy_is_made_is_kept(there_before: bool, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: weights that were saved there in the seconds between the look and the rename."""
    save(store, 1, 0.5)
    best = BestCopy(store)
    if there_before:
        best.renew()
        save(store, 2, 0.6)
    monkeypatch.setattr("gai_yolo.store.best.copy_temp_file", lambda *args: (copy_temp_file(*args), best.path.write_bytes(b"mine"))[0])
    (note,) = best.renew()
    assert "was not what this program wrote there; it is now best.pt.aside-" in note
    assert best.path.read_bytes() == content_of(2 if there_before else 1) and asides(best.path) == [b"mine"]


def test_what_is_right_is_neither_read_nor_written_again(store: Store) -> None:
    """Loss: a checkpoint's size of reading and writing with each epoch that does not improve."""
    save(store, 1, 0.5)
    BestCopy(store).renew()
    before = store.fs.identity(store.run / "checkpoints" / "best.pt")
    save(store, 2, 0.4)
    fs = Counting()
    assert BestCopy(Store(store.run, store.fence, fs)).renew() == []
    assert not [name for name in fs.read if name.endswith(".pt")], "manifests and the record only"
    assert fs.identity(store.run / "checkpoints" / "best.pt") == before


@pytest.mark.parametrize("moved", ["best.pt", "run"])
def test_copies_are_recognised_by_their_content(moved: str, store: Store) -> None:
    """Loss: after `cp -r` of a run, or a restored backup, every best.pt is taken for a person's own."""
    save(store, 1, 0.5)
    best = BestCopy(store)
    best.renew()
    data = best.path.read_bytes()
    best.path.unlink()
    best.path.write_bytes(data)
    if moved == "run":
        save(store, 2, 0.6)
    assert BestCopy(store).renew() == [] and asides(best.path) == []
    assert best.path.read_bytes() == content_of(2 if moved == "run" else 1)


def test_a_checkpoint_that_waits_goes_first(store: Store) -> None:
    """Loss: an epoch's checkpoint waits for the copy of another one."""
    save(store, 1, 0.5)
    best, waits = BestCopy(store), iter([False, True, False, False, False])
    assert renew(best, lambda: next(waits)) is None, "broken off in the middle"
    assert not best.path.exists() and not list(best.path.parent.glob("*.tmp"))
    assert renew(best, lambda: False) == BestRenewed()
    assert best.path.read_bytes() == content_of(1)


def test_bytes_that_change_on_the_way_are_no_copy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a torn best.pt, which people take home."""
    path = save(store, 1, 0.5)
    monkeypatch.setattr(store, "defect_of", lambda _one: None)  # verified when it was written, and not read again
    path.write_bytes(content_of(2))
    answer = renew(BestCopy(store), lambda: False)
    assert answer is not None and len(answer.notes) == 1 and "what was read is not what was written" in answer.notes[0]
    assert not (path.parent / "best.pt").exists() and not list(path.parent.glob(".*.tmp"))


def test_where_the_disk_can_share_content_nothing_is_copied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a checkpoint's size of writing where an instant would do."""
    shared: list[tuple[int, int]] = []

    def clone(source: int, target: int) -> None:
        shared.append((source, target))
        os.write(target, os.pread(source, 10**8, 0))

    monkeypatch.setattr(store.fs, "clone", clone)
    save(store, 1, 0.5)
    between: Callable[[], object] = lambda: pytest.fail("a copy was made")  # noqa: E731
    BestCopy(store).renew(between)
    assert len(shared) == 1 and (store.run / "checkpoints" / "best.pt").read_bytes() == content_of(1)
