"""Checkpoints of a run: when to save, under which name, and which one to continue from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gai_yolo.detector.weights import read_checkpoint_file
from gai_yolo.errors import CheckpointError
from gai_yolo.store.atomic import publish
from gai_yolo.training.state import FORMAT

NAME = re.compile(r"epoch_(\d{3,})\.pt")


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read completely."""

    path: Path
    content: dict[str, Any]


class Snapshots:
    """The `checkpoints/` folder of a run. Only rank 0 writes.

    Args:
        interval: write every this many epochs, and always at the last.
        identity: what is saved beside the state to recognise the run: configuration, classes, data digest.
    """

    def __init__(self, folder: Path, interval: int, epochs: int, identity: dict[str, Any]) -> None:
        self.folder, self.interval, self.epochs, self.identity = folder, interval, epochs, identity

    def save_epoch(self, state: dict[str, Any]) -> Path | None:
        """Write `epoch_XXX.pt` if one is due after the captured state's epoch; returns its path."""
        epoch: int = state["epoch"]
        if epoch % self.interval and epoch != self.epochs:
            return None
        return self._write(self.folder / f"epoch_{epoch:03d}.pt", state)

    def save_best(self, state: dict[str, Any]) -> Path:
        """Write `best.pt`."""
        return self._write(self.folder / "best.pt", state)

    def _write(self, path: Path, state: dict[str, Any]) -> Path:
        try:
            publish(path, lambda file: torch.save({**state, **self.identity}, file))
        except (OSError, RuntimeError) as error:
            # torch's archive writer answers a failed write with a RuntimeError of its own.
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise CheckpointError(f"{path}: cannot be written ({reason}); make room and start again, older ones are kept.") from None
        return path


def newest(folder: Path, warn: Callable[[str], None]) -> Found | None:
    """The checkpoint of the highest epoch that can be read; damaged ones are told, left in place and passed over.

    Raises:
        CheckpointError: the newest readable file was written by another version of this program.
    """
    numbered = [(int(match[1]), path) for path in folder.glob("epoch_*.pt") if (match := NAME.fullmatch(path.name))]
    for epoch, path in sorted(numbered, reverse=True):
        try:
            content = read_checkpoint_file(path)
        except CheckpointError as error:
            warn(f"{error} It is left in place and passed over.")
            continue
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: not in this program's checkpoint format {FORMAT} (found {content.get('format')!r}); "
                "continue with the version that wrote it, or start over with --fresh."
            )
        if content.get("epoch") != epoch:
            warn(f"{path}: holds epoch {content.get('epoch')}, not the one its name says. It is left in place and passed over.")
            continue
        return Found(path, content)
    return None
