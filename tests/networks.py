"""Networks that were not trained and yet say something: for tests of what is done with trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gai_yolo.data.shapes import CLASS_NAMES
from gai_yolo.detector import YOLO12
from gai_yolo.detector.weights import Origin, Weights, as_safetensors
from gai_yolo.inference.comparison import pictures
from gai_yolo.inference.trained import TrainedModel, load_trained


def lively(size: str = "debug", num_classes: int = 4, seed: int = 0) -> YOLO12:
    """In eval mode, with BatchNorms that know what they see, and scores and boxes that follow from the picture. A new network's scores are
    all about 0, and what it sees dies away on the way."""
    torch.manual_seed(seed)
    network = YOLO12(size, num_classes).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
            module.momentum = None  # the mean over all passes
    for branch in (*network.head.cv2, *network.head.cv3):
        branch[-1].weight.mul_(2)
        branch[-1].bias.normal_(-2, 1)
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.from_numpy(pictures(6, 128, 128)))
    return network.eval()


def weight_file(path: Path, config: dict[str, Any] | None = None, origin: Origin | None = None) -> Path:
    """A lively network of the classes of `shapes` as a file, with the configuration of a training."""
    names = list(CLASS_NAMES)
    about = {"size": "debug", "config": config} if config is not None else {"size": "debug"}
    path.write_bytes(as_safetensors(Weights(lively().state_dict(), names, origin), about))
    return path


def model_in(folder: Path, config: dict[str, Any] | None = None) -> TrainedModel:
    """The same, read again."""
    return load_trained(weight_file(folder / "network.safetensors", config or {"data": {"image_size": 64}}))
