"""Captured states in small, and file systems that wait or refuse, for tests of what keeps them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch

from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import Kind, Manifest, Position
from gai_yolo.store.store import Store

STEPS = 10
"""Of an epoch."""


def content_of(step: int, epoch: int | None = None) -> dict[str, Any]:
    """A captured state after a step."""
    epoch = step // STEPS if epoch is None else epoch
    weights = {"w": torch.full((500,), float(step)), "n": torch.tensor(epoch)}
    position = {"epoch": epoch, "step": step, "samples": 8 * step}
    return {"format": CHECKPOINT_FORMAT, **position, "model_state_dict": weights, "history": [{"epoch": 1, "loss": None}]}


def manifest_of(content: dict[str, Any], kind: Kind = "step") -> Manifest:
    """Without size and digest."""
    position = Position(content["step"], content["epoch"], content["samples"])
    return Manifest(kind, position, 0, "", 0, "f" * 16, torch.__version__, "2026-01-01T00:00:00Z")


def store_at(run: Path, fs: FileSystem | None = None) -> Store:
    """With the right to publish, until it is called again."""
    for folder in ("checkpoints", "snapshots"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    return Store(run, raise_fence(run.parent / f".{run.name}.fence"), fs or FileSystem())


def published(run: Path, step: int, kind: Kind = "step") -> Path:
    """A complete checkpoint; returns its data file."""
    store, content = store_at(run), content_of(step)
    manifest, notes = store.publish(manifest_of(content, kind), lambda file: torch.save(content, file))
    assert notes == []
    return store.data_path(manifest)


def flip(path: Path) -> None:
    """Damage one bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names(run: Path) -> list[str]:
    """Files with a manifest or a second name, of both kinds."""
    return sorted(path.name for folder in ("checkpoints", "snapshots") for path in (run / folder).iterdir())


def foreign() -> bytes:
    """A whole manifest of another version."""
    values = {"format": 99}
    checksum = hashlib.sha256((json.dumps(values, indent=1) + "\n").encode()).hexdigest()
    return (json.dumps({**values, "checksum": checksum}, indent=1) + "\n").encode()


class Gate(FileSystem):
    """Lets nothing get a name while it is shut."""

    def __init__(self) -> None:
        self.open_ = threading.Event()
        self.reached = threading.Event()
        self.open_.set()

    def rename(self, source: Path, target: Path) -> None:
        self.reached.set()
        assert self.open_.wait(20)
        super().rename(source, target)

    def shut(self) -> None:
        self.open_.clear()
        self.reached.clear()


class Refusing(FileSystem):
    """Memory that is full, or a folder that cannot be looked into, while it is told so."""

    full = unreadable = False

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, data)

    def names(self, folder: Path) -> list[str]:
        if self.unreadable:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return super().names(folder)
