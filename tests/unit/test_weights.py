"""Weight files of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gai_yolo.detector import YOLO12
from gai_yolo.detector.weights import load_weights
from gai_yolo.errors import CheckpointError


def test_released_half_precision_state_dict_loads_completely(tmp_path: Path) -> None:
    """Released files hold half-precision tensors under the published names."""
    torch.manual_seed(0)
    source, path = YOLO12("n", 80), tmp_path / "released.pt"
    torch.save(source.half().state_dict(), path)
    model = YOLO12("n", 80)
    assert load_weights(model, path) == []
    for name, tensor in model.state_dict().items():
        assert tensor.dtype != torch.float16
        assert torch.equal(tensor, source.state_dict()[name].to(tensor.dtype)), name


def test_other_number_of_classes_leaves_out_the_class_branch_only(tmp_path: Path) -> None:
    """Fine-tuning must keep everything that does not depend on the classes."""
    source, path = YOLO12("n", 80), tmp_path / "released.pt"
    torch.save(source.state_dict(), path)
    model = YOLO12("n", 3)
    left_out = load_weights(model, path)
    assert left_out and all(name.startswith("model.21.cv3.") for name in left_out)
    kept = model.state_dict().keys() - set(left_out)
    assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in kept)


def test_own_checkpoint_gives_its_ema_weights(tmp_path: Path) -> None:
    """The average is what was evaluated."""
    raw, ema, path = YOLO12("n", 3), YOLO12("n", 3), tmp_path / "epoch_001.pt"
    torch.save({"model_state_dict": raw.state_dict(), "ema_state_dict": ema.state_dict()}, path)
    model = YOLO12("n", 3)
    load_weights(model, path)
    assert torch.equal(model.state_dict()["model.0.conv.weight"], ema.state_dict()["model.0.conv.weight"])


def test_wrong_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A partly loaded network trains badly and nobody knows why."""
    model = YOLO12("n", 3)
    torch.save(YOLO12("s", 3).state_dict(), tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="not the weights of a YOLO12-n"):
        load_weights(model, tmp_path / "s.pt")
    torch.save(model, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(model, tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_weights(model, tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(model, tmp_path / "none.pt")
