"""A disk that refuses, writes short, or changes what it was given: nothing complete is lost, nothing damaged is believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from gai_yolo.checkpointing.recovery import newest
from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT
from gai_yolo.store.best import BestCopy
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store

POLICY = Policy(keep_steps=1, keep_epochs=1)
BLOCK = 4096


class Breaking(FileSystem):
    """Fails at one call, counted over all calls that change something; `broken` is the name of that call."""

    def __init__(self, at: int, error: int) -> None:
        self.at, self.error = at, error
        self.count, self.broken = 0, ""

    def _strike(self, name: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.broken = name
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path: Path) -> int:
        self._strike("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._strike("write")
        return super().write(descriptor, data[:50_000])  # short, too

    def fsync(self, descriptor: int) -> None:
        self._strike("fsync")
        super().fsync(descriptor)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._strike("close")

    def rename(self, source: Path, target: Path) -> None:
        self._strike("rename")
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._strike("link")
        super().link(source, target)

    def clone(self, source: int, target: int) -> None:
        self._strike("clone")
        super().clone(source, target)

    def unlink(self, path: Path) -> None:
        self._strike("unlink")
        super().unlink(path)

    def unlink_from(self, folder: int, name: str) -> None:
        self._strike("unlink")
        super().unlink_from(folder, name)

    def sync_folder(self, folder: Path) -> None:
        self._strike("sync_folder")
        super().sync_folder(folder)


def manifest(epoch: int, metric: float | None = None) -> Manifest:
    return Manifest("epoch", Position(10 * epoch, epoch, 160 * epoch), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z", metric)


def state(epoch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(epoch)
    weights = {f"w{number}": torch.randn(60, 100, generator=generator) for number in range(10)}
    return {"format": CHECKPOINT_FORMAT, "epoch": epoch, "step": 10 * epoch, "samples": 160 * epoch, "model_state_dict": weights}


def save(store: Store, epoch: int) -> None:
    """What the writer process does with a request."""
    content = state(epoch)

    def write(file: BinaryIO) -> None:
        torch.save(content, file)

    store.publish(manifest(epoch, 0.1 * epoch), write)
    store.prune(POLICY)
    BestCopy(store).renew()


def refusal_of(store: Store, epoch: int) -> int | None:
    """The errno that saving ends with, or None."""
    try:
        save(store, epoch)
    except OSError as error:
        return error.errno
    return None


def found_epoch(store: Store) -> tuple[int | None, list[str]]:
    """The epoch that a start goes on from, its tensors compared, and what it tells."""
    found, told = newest(store)
    if found is None:
        return None, told
    epoch: int = found.content["epoch"]
    assert all(torch.equal(found.content["model_state_dict"][name], tensor) for name, tensor in state(epoch)["model_state_dict"].items())
    return epoch, told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run folder."""
    for name in ("checkpoints", "snapshots"):
        (tmp_path / "run" / name).mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_disk_that_refuses_any_one_call_costs_nothing_complete(error: int, run: Path) -> None:
    """Loss: the full disk at the wrong moment takes the checkpoint that was there, or leaves half of one."""
    fence = raise_fence(run.parent / ".run.fence")
    save(Store(run, fence), 1)
    broken = []
    for epoch in range(2, 200):
        fs = Breaking(epoch - 1, error)
        store = Store(run, fence, fs)
        raised = refusal_of(store, epoch)
        if not fs.broken:
            break
        broken.append(fs.broken)
        reader = Store(run, fence)
        assert found_epoch(reader)[0] in (epoch - 1, epoch), "the old one or the new one"
        assert raised == error or (raised is None and fs.broken == "clone"), "nothing is swallowed but a clone, which a copy stands in for"
        fs.at = -1
        save(store, epoch)  # the same store tries again, as the writer does
        assert found_epoch(reader) == (epoch, [])
        left = {path.name for path in (run / "checkpoints").iterdir()}
        temps = {name for name in left if name.endswith(".tmp")}
        assert left - temps == {f"epoch_{epoch:03d}.pt", f"epoch_{epoch:03d}.json", "best.pt", ".best"}
        assert not temps or fs.broken == "unlink", "a failed try cleans up behind itself"
    assert set(broken) == {"create", "write", "fsync", "close", "rename", "clone", "unlink", "sync_folder"}
    assert len(broken) > 20


def test_every_truncation_is_noticed_and_the_older_one_taken(run: Path) -> None:
    """Loss: a file that a power cut has shortened stops the run, or is believed."""
    store = Store(run, raise_fence(run.parent / ".run.fence"))
    save(store, 1)
    store.publish(manifest(2), lambda file: torch.save(state(2), file))
    path = run / "checkpoints" / "epoch_002.pt"
    whole = path.read_bytes()
    assert found_epoch(store) == (2, [])
    lengths = [*range(0, len(whole), BLOCK), len(whole) - 1]
    assert len(lengths) > 50
    for length in lengths:
        path.write_bytes(whole[:length])
        epoch, told = found_epoch(store)
        assert epoch == 1 and len(told) == 1 and f"epoch_002.pt has {length} bytes, {len(whole)} were written" in told[0]
    path.write_bytes(whole + b"\0")
    assert found_epoch(store)[0] == 1
    path.write_bytes(whole)
    assert found_epoch(store) == (2, [])


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_every_flipped_bit_is_noticed_and_the_older_one_taken(suffix: str, run: Path) -> None:
    """Loss: a bad disk changes a weight to 1e30, or the manifest's idea of the position, and the run goes on from it."""
    store = Store(run, raise_fence(run.parent / ".run.fence"))
    save(store, 1)
    store.publish(manifest(2), lambda file: torch.save(state(2), file))
    path = (run / "checkpoints" / "epoch_002.pt").with_suffix(suffix)
    whole = path.read_bytes()
    # Headers, pickle, every tensor, padding, directory: one bit in each 256 bytes of the data, and in each byte of the manifest.
    places = range(0, len(whole), 256 if suffix == ".pt" else 1)
    assert len(places) > 400
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place // 256 + place) % 8
        path.write_bytes(bytes(flipped))
        epoch, told = found_epoch(store)
        assert epoch == 1 and len(told) == 1 and "epoch_002" in told[0]
    path.write_bytes(whole)
    assert found_epoch(store) == (2, [])


def _vanish(run: Path) -> Callable[[], object]:
    (run / "checkpoints").rename(run / "elsewhere")
    return lambda: (run / "elsewhere").rename(run / "checkpoints")


def test_folder_that_vanishes_and_comes_back_costs_nothing(run: Path) -> None:
    """Loss: a network share that is away for a minute; the job makes the folder anew on the local disk and splits the run."""
    store = Store(run, raise_fence(run.parent / ".run.fence"))
    save(store, 1)
    come_back = _vanish(run)
    with pytest.raises(FileNotFoundError):
        save(store, 2)
    assert not (run / "checkpoints").exists()
    come_back()
    assert found_epoch(store) == (1, [])
    save(store, 2)
    assert found_epoch(store) == (2, [])
