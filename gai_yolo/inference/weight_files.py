"""Weights as files for others: out of a run or any file that `read_weights` takes, into safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gai_yolo.detector.weights import Weights, as_safetensors, origin_in, read_weights, weights_in
from gai_yolo.errors import CheckpointError
from gai_yolo.inference.trained import checkpoint_of, identify

ABOUT = ("config", "position", "mAP50-95")
"""What a weight file of this program says of the training that it comes out of."""


@dataclass(frozen=True)
class WeightFile:
    """A weight file that can be written."""

    data: bytes
    size: str
    """Of the network: n, s, m, l, x."""
    num_classes: int
    weights: Weights


def imported(path: Path) -> WeightFile:
    """The weights of a file as `read_weights` takes it, if they are those of a YOLO12, to the last name and shape. Raises
    `CheckpointError`."""
    weights = read_weights(path)
    return _made(path, weights, {name: weights.about[name] for name in ABOUT if name in weights.about})


def exported(run: Path, which: str) -> WeightFile:
    """The EMA weights of a run, with its configuration and how far it was.

    Args:
        which: as `checkpoint_of`, whose errors it raises too.
    """
    found = checkpoint_of(run, which)
    about = {"config": found.content.get("config"), "position": vars(found.manifest.position), "mAP50-95": found.manifest.metric}
    return _made(found.path, weights_in(found.path, found.content, origin_in(found.content)), about)


def _made(path: Path, weights: Weights, about: dict[str, Any]) -> WeightFile:
    size, num_classes = identify(path, weights)
    names = weights.class_names
    if names is not None and len(names) != num_classes:
        raise CheckpointError(f"{path}: names {len(names)} classes and has weights for {num_classes}.")
    return WeightFile(as_safetensors(weights, {"size": size, **about}), size, num_classes, weights)
