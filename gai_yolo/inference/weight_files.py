"""Weights as files for others: out of a run or any file that `read_weights` takes, into safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gai_yolo.checkpointing.recovery import load, newest
from gai_yolo.detector import YOLO12
from gai_yolo.detector.network import SCALES
from gai_yolo.detector.weights import MOST_CLASSES_OF_WEIGHTS, Weights, as_safetensors, must_be_numbers, origin_in, read_weights, weights_in
from gai_yolo.errors import CheckpointError
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.retention import best_of


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
    return _made(path, read_weights(path), {})


def exported(run: Path, which: str) -> WeightFile:
    """The EMA weights of a run, with its configuration and how far it was.

    Args:
        which: `best` (`last` where nothing was evaluated), `last`, or a checkpoint's name.

    Raises:
        CheckpointError: the run has none, or not that one.
    """
    catalogue = Catalogue(run)
    if which == "best":
        best = best_of(catalogue.listing().present)
        which = "last" if best is None else best.stem
    found = newest(catalogue)[0] if which == "last" else load(catalogue, which)
    if found is None:
        raise CheckpointError(f"{run}: holds no complete checkpoint.")
    about = {"config": found.content.get("config"), "position": vars(found.manifest.position), "mAP50-95": found.manifest.metric}
    return _made(found.path, weights_in(found.path, found.content, origin_in(found.content)), about)


def _made(path: Path, weights: Weights, about: dict[str, Any]) -> WeightFile:
    size, num_classes = identify(path, weights)
    names = weights.class_names
    if names is not None and len(names) != num_classes:
        raise CheckpointError(f"{path}: names {len(names)} classes and has weights for {num_classes}.")
    return WeightFile(as_safetensors(weights, {"size": size, **about}), size, num_classes, weights)


def identify(path: Path, weights: Weights) -> tuple[str, int]:
    """Which YOLO12 weights belong to, and for how many classes. Raises `CheckpointError` if it is none, or its numbers are none."""
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    first, last = shapes.get("model.0.conv.weight"), shapes.get("model.21.cv3.0.2.bias")
    if first and last is not None and len(last) == 1 and 0 < last[0] <= MOST_CLASSES_OF_WEIGHTS:
        for size in [size for size, scale in SCALES.items() if scale.channels(64) == first[0]]:
            with torch.device("meta"):
                own = YOLO12(size, last[0]).state_dict()
            if {name: tensor.shape for name, tensor in own.items()} == shapes:
                must_be_numbers(path, weights.tensors, own)
                return size, last[0]
    raise CheckpointError(
        f"{path}: not the weights of a YOLO12 ({len(shapes)} tensors, whose names and shapes are those of none of its sizes)."
    )
