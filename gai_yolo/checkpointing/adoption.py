"""Checkpoints without a manifest: whether one may be trusted, and what its manifest has to say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from gai_yolo.checkpointing.recovery import position_of
from gai_yolo.checkpointing.schedule import asks_for
from gai_yolo.checkpointing.state import FIELDS
from gai_yolo.config import fingerprint, parse_config
from gai_yolo.detector.archive import read_checkpoint_file
from gai_yolo.detector.weights import origin_in
from gai_yolo.errors import CheckpointError
from gai_yolo.store.manifest import Kind, Manifest, stem_of


def manifest_for(path: Path, kind: Kind) -> Manifest:
    """The manifest that a checkpoint file lacks, without size and digest.

    The file is opened without running any code in it, its archive's checksums are compared, and it must hold every part of a
    training state, with finite weights, at the position that its name says.

    Raises:
        CheckpointError: the file is not such a checkpoint; nothing was changed.
    """
    content = read_checkpoint_file(path)
    position = position_of(path, content)
    if path.stem != stem_of(kind, position):
        raise CheckpointError(f"{path}: holds step {position.step} after {position.epoch} epochs, not what its name says; rename it.")
    missing = [field.name for field in FIELDS if field.is_required and field.name not in content]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; training cannot go on from it.")
    for part in [field.name for field in FIELDS if field.is_network]:
        tensors = content[part]
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"{path}: {part} does not hold tensors; training cannot go on from it.")
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise CheckpointError(f"{path}: {part} holds numbers that are not finite ({bad[0]}); take an older one.")
    config = parse_config(content.get("config") or {}, f"{path}, config")
    return Manifest(
        kind=kind,
        position=position,
        size=0,
        sha256="",
        fence=0,
        config_fingerprint=fingerprint(config),
        torch_version="unknown (adopted)",
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime)),
        metric=_metric(content) if kind == "epoch" else None,
        due=kind == "step" or asks_for(config.training, position.epoch),
        origin=None if (origin := origin_in(content)) is None else str(origin),
    )


def _metric(content: dict[str, Any]) -> float | None:
    history = content["history"]
    row = history[-1] if isinstance(history, list) and history else {}
    metric = row.get("mAP50-95") if isinstance(row, dict) else None
    return float(metric) if isinstance(metric, (int, float)) else None
