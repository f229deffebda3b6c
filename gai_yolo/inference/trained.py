"""A trained network, out of a run or a weight file, with what is known about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gai_yolo.checkpointing.recovery import LoadedCheckpoint, load, newest
from gai_yolo.config import Config, parse_config
from gai_yolo.detector import YOLO12
from gai_yolo.detector.network import SCALES
from gai_yolo.detector.weights import MOST_CLASSES_OF_WEIGHTS, Origin, Weights, fill, must_be_numbers, origin_in, read_weights, weights_in
from gai_yolo.errors import CheckpointError, ConfigError, printable
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.manifest import FOLDERS
from gai_yolo.store.retention import best_of


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network that is ready to be used."""

    network: YOLO12
    """In eval mode on the CPU, in float32 and contiguous memory; no parameter asks for a gradient."""
    path: Path
    """The file that it was read from."""
    class_names: list[str]
    """Of the network's outputs; `class 0` and so on where the file names none."""
    config: Config | None
    """Of the training that it comes out of; None where the file does not say."""
    position: dict[str, Any]
    """How far that was: `epoch`, `step`, `samples`; empty where the file does not say."""
    origin: Origin | None
    """Where the weights came from with which that began."""

    @property
    def image_size(self) -> int:
        """Side of the square input that it was trained with, in pixels; the default of `data.image_size` where the file does not say."""
        return (self.config or Config()).data.image_size


def load_trained(source: Path, which: str = "best") -> TrainedModel:
    """Read a trained network; of a run the EMA weights.

    Args:
        source: the folder of a run, or a file as `read_weights` takes it.
        which: of a run, as `checkpoint_of`.

    Raises:
        CheckpointError: it is neither, or damaged, or not that of a YOLO12.
    """
    if source.is_dir():
        found = checkpoint_of(source, which)
        path, weights = found.path, weights_in(found.path, found.content, origin_in(found.content))
    else:
        path, weights = source, read_weights(source)
    size, num_classes = identify(path, weights)
    names = weights.class_names or [f"class {number}" for number in range(num_classes)]
    if len(names) != num_classes:
        raise CheckpointError(f"{path}: names {len(names)} classes and has weights for {num_classes}.")
    network = YOLO12(size, num_classes)
    fill(network, weights, path)
    about = weights.about
    config = _config_of(path, about["config"]) if isinstance(about.get("config"), dict) else None
    position = about.get("position") if isinstance(about.get("position"), dict) else {}
    return TrainedModel(network.eval().requires_grad_(False), path, names, config, position or {}, weights.origin)


def _config_of(path: Path, said: dict[str, Any]) -> Config:
    try:
        return parse_config(said, "its configuration")
    except ConfigError as error:  # of another version, or somebody else's file
        raise CheckpointError(f"{path}: {printable(str(error))}") from None


def checkpoint_of(run: Path, which: str) -> LoadedCheckpoint:
    """A checkpoint of a run, verified.

    Args:
        which: `best` (`last` where nothing was evaluated), `last`, or a checkpoint's name such as `epoch_010`.

    Raises:
        CheckpointError: it is no run, or has none, or not that one.
    """
    if not (run / FOLDERS["epoch"]).is_dir():
        raise CheckpointError(f"{run}: not the folder of a run; give one that holds {FOLDERS['epoch']}/, or a weight file.")
    catalogue = Catalogue(run)
    if which == "best":
        best = best_of(catalogue.listing().present)
        which = "last" if best is None else best.stem
    found = newest(catalogue)[0] if which == "last" else load(catalogue, which)
    if found is None:
        raise CheckpointError(f"{run}: holds no complete checkpoint.")
    return found


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
