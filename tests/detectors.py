"""A network that finds something everywhere, for tests of what is done with detections."""

from __future__ import annotations

from pathlib import Path

import torch

from gai_yolo.detector import YOLO12
from gai_yolo.detector.weights import Weights, as_safetensors
from gai_yolo.inference.trained import TrainedModel

NAMES = ["cell", "red cell", "7"]


def eager_network(seed: int = 3) -> YOLO12:
    """As small as can be, in eval mode; its scores lie around one half and depend on the picture."""
    torch.manual_seed(seed)
    network = YOLO12("debug", len(NAMES)).requires_grad_(False)
    for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None  # a plain mean over what it sees, without which nothing of a picture would come to the head
    network(torch.rand(4, 3, 64, 64))
    for branch in network.head.cv3:
        branch[-1].bias.zero_()  # type: ignore[index]
    for branch in network.head.cv2:  # boxes of some cells, not of the whole picture
        branch[-1].bias.copy_(-0.5 * torch.arange(16.0).repeat(4))  # type: ignore[index]
    return network.eval()


def eager_model() -> TrainedModel:
    """It, as if it had been read from a file that says no more than the names of its classes."""
    return TrainedModel(eager_network(), Path("eager.safetensors"), list(NAMES), None, {}, None)


def eager_file(path: Path) -> Path:
    """It, in a file."""
    path.write_bytes(as_safetensors(Weights(eager_network().state_dict(), list(NAMES), None), {"size": "debug"}))
    return path
