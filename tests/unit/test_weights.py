"""Weight files: released ones, our own, and those that are neither."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gai_yolo.detector import YOLO12
from gai_yolo.detector.archive import read_checkpoint_file
from gai_yolo.detector.weights import load_weights
from gai_yolo.errors import CheckpointError


def network(seed: int, num_classes: int = 3, size: str = "n") -> YOLO12:
    """A network whose every tensor, counters and statistics too, depends on the seed."""
    torch.manual_seed(seed)
    model = YOLO12(size, num_classes)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.tensor(100 + seed) if name.endswith("num_batches_tracked") else torch.rand_like(buffer) + 0.5)
    return model


def copy_of(model: YOLO12) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_a_state_dict_is_loaded_completely(tmp_path: Path) -> None:
    """Loss: fine-tuning that starts from noise in one forgotten layer."""
    source, model = network(1), network(2)
    assert load_weights(model, written(tmp_path / "a.pt", source.state_dict())) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert not model.head.dfl.conv.weight.requires_grad


def test_released_weights_in_half_precision_are_converted(tmp_path: Path) -> None:
    """Loss: a network half in float16, which fails on the CPU and overflows in training."""
    source, model = network(1), network(2)
    half = OrderedDict((name, t.half() if t.is_floating_point() else t) for name, t in source.state_dict().items())
    assert load_weights(model, written(tmp_path / "a.pt", half)) == []
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == source.state_dict()[name].dtype, name
        assert torch.equal(tensor, half[name].to(tensor.dtype)), name


def test_of_a_checkpoint_the_average_is_taken(tmp_path: Path) -> None:
    """Loss: fine-tuning starts from the raw weights, which are worse than what was evaluated."""
    raw, average, model = network(1), network(2), network(3)
    both = {"epoch": 3, "model_state_dict": raw.state_dict(), "ema_state_dict": average.state_dict(), "history": []}
    load_weights(model, written(tmp_path / "a.pt", both))
    assert torch.equal(model.state_dict()["model.0.conv.weight"], average.state_dict()["model.0.conv.weight"])
    load_weights(model, written(tmp_path / "b.pt", {"epoch": 3, "model_state_dict": raw.state_dict()}))
    assert torch.equal(model.state_dict()["model.0.conv.weight"], raw.state_dict()["model.0.conv.weight"])


@pytest.mark.parametrize(("theirs", "ours", "left_out"), [(5, 3, 6), (80, 3, 51), (3, 80, 51), (1, 2, 6)])
def test_other_classes_leave_out_the_class_branch_only(theirs: int, ours: int, left_out: int, tmp_path: Path) -> None:
    """Loss: released weights cannot be used on own data; or more than necessary starts from noise, unsaid."""
    source, model = network(1, theirs), network(2, ours)
    before = copy_of(model)
    names = load_weights(model, written(tmp_path / "a.pt", source.state_dict()))
    assert len(names) == len(set(names)) == left_out
    assert all(name.startswith("model.21.cv3.") for name in names)
    assert {f"model.21.cv3.{level}.2.{part}" for level in range(3) for part in ("weight", "bias")} <= set(names)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in names else source.state_dict()[name]), name


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_weights_of_another_network_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    """Loss: a network half of one file and half of noise, because loading was not strict."""
    model = network(2)
    before, good = copy_of(model), network(1).state_dict()
    first = "model.0.conv.weight"
    foreign = {
        "size s": network(1, size="s").state_dict(),
        "tensor missing": without(good, first),
        "tensor unknown": {**good, "model.99.weight": torch.zeros(1)},
        "other shape": {**good, first: torch.zeros(16, 3, 5, 5)},
        "renamed": {**without(good, first), "model.0.convolution.weight": good[first]},
        "empty": {},
    }
    for kind, state in foreign.items():
        path = written(tmp_path / "foreign.pt", state)
        with pytest.raises(CheckpointError, match="YOLO12-n") as refused:
            load_weights(model, path)
        message = str(refused.value)
        assert str(path) in message and "model.size" in message, kind
        assert len(message.splitlines()) == 1 and len(message) - len(str(path)) < 300, "one sentence, not a list of tensors"
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), kind


def test_a_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Loss: files of other programs run their code here; or the user does not learn what to do with them."""
    path = written(tmp_path / "theirs.pt", {"model": network(1), "epoch": 3})
    with pytest.raises(CheckpointError, match="state dict") as refused:
        load_weights(network(2), path)
    assert str(path) in str(refused.value) and "run code" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], "text", 7])
def test_files_that_hold_something_else_are_refused(content: Any, tmp_path: Path) -> None:
    """Loss: a traceback for a dataset file given by mistake."""
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint_file(written(tmp_path / "a.pt", content))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not a checkpoint at all", bytes(1000)])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """Loss: a traceback from deep inside a parser for a download that broke off."""
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as refused:
        read_checkpoint_file(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(refused.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """Loss: a mistyped path that cannot be found in the message."""
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read") as refused:
            read_checkpoint_file(path)
        assert str(path) in str(refused.value)
