"""The network is the published one, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gai_yolo.detector import YOLO12
from gai_yolo.detector.head import RawPredictions

REFERENCE = Path(__file__).parents[1] / "reference"


def _parameter_rows() -> list[tuple[str, int, list[int]]]:
    lines = (REFERENCE / "yolo12_parameters.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(size, int(total), [int(n) for n in layers.split(",")]) for size, total, layers in rows]


@pytest.mark.parametrize(("size", "total", "layers"), _parameter_rows())
def test_parameter_counts_equal_the_reference(size: str, total: int, layers: list[int]) -> None:
    """A wrong channel or repeat somewhere would make released weights unusable and results incomparable."""
    with torch.device("meta"):
        model = YOLO12(size, num_classes=80)
    assert [sum(p.numel() for p in layer.parameters()) for layer in model.model] == layers
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("size", ["n", "l"])
def test_state_dict_equals_the_released_one(size: str) -> None:
    """Released weights load strictly by name only if every tensor has the released name and shape."""
    lines = (REFERENCE / f"yolo12{size}_state.tsv").read_text().splitlines()
    expected = dict(line.split()[:2] for line in lines if line and not line.startswith("#"))
    with torch.device("meta"):
        state = YOLO12(size, num_classes=80).state_dict()
    assert {name: "x".join(map(str, tensor.shape)) or "scalar" for name, tensor in state.items()} == expected


@pytest.mark.parametrize("height_width", [(32, 32), (64, 96), (160, 96)])
def test_any_multiple_of_32_gives_boxes_and_probabilities(height_width: tuple[int, int]) -> None:
    """Rectangular inputs must not mix up height and width."""
    height, width = height_width
    model = YOLO12("n", num_classes=3).eval()
    with torch.inference_mode():
        boxes, probabilities = model(torch.rand(2, 3, height, width))
    anchors = height * width // 64 + height * width // 256 + height * width // 1024
    assert boxes.shape == (2, anchors, 4)
    assert probabilities.shape == (2, anchors, 3)
    # At the start every side's distribution favours no bin, so boxes are about 15 strides wide, around their points.
    assert (boxes[..., 2] > boxes[..., 0]).all() and (boxes[..., 3] > boxes[..., 1]).all()
    centre_x = boxes[0, : height * width // 64].view(height // 8, width // 8, 4)[:, -1, [0, 2]].mean(-1)
    assert torch.allclose(centre_x, torch.full_like(centre_x, width - 4.0), atol=12.0)


def test_training_mode_returns_raw_predictions() -> None:
    """The loss needs logits, not decoded boxes."""
    raw = YOLO12("n", num_classes=5).train()(torch.rand(2, 3, 64, 64))
    assert isinstance(raw, RawPredictions)
    assert raw.box_logits.shape == (2, 64, 84) and raw.class_logits.shape == (2, 5, 84)


def test_other_sizes_of_input_are_refused() -> None:
    """A silent crop would shift every box."""
    with pytest.raises(ValueError, match="multiples of 32"):
        YOLO12("n").eval()(torch.rand(1, 3, 100, 64))


def test_memory_format_does_not_change_the_result() -> None:
    """channels_last is a speed setting; attention reshapes must not depend on strides."""
    torch.manual_seed(0)
    model = YOLO12("n", num_classes=3).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        plain = model(images)[0]
        fast = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(plain, fast, atol=1e-3, rtol=1e-4)


def test_initialisation_is_the_published_one() -> None:
    """The start of training depends on biases, attention weights and residual scale."""
    model = YOLO12("l", num_classes=4)
    stage = model.model[6]
    assert torch.equal(stage.gamma, torch.full((512,), 0.01))  # type: ignore[arg-type]
    weight = stage.m[0][0].attn.qkv.conv.weight  # type: ignore[index, union-attr]
    assert 0.019 < weight.std().item() < 0.021
    head = model.head
    assert all(torch.equal(branch[-1].bias, torch.ones(64)) for branch in head.cv2)  # type: ignore[index]
    expected = torch.log(torch.tensor([5 / 4 / (640 / s) ** 2 for s in (8, 16, 32)]))
    starts = torch.stack([branch[-1].bias[0] for branch in head.cv3])  # type: ignore[index]
    torch.testing.assert_close(starts, expected)


def test_debug_size_has_the_blocks_and_names_of_n_and_learns() -> None:
    """Loss: tests of jobs that train something else than YOLO12; or nothing, so that no result depends on what is tested."""
    torch.manual_seed(0)
    model, published = YOLO12("debug", num_classes=4), YOLO12("n", num_classes=4)
    kinds, expected = ({name: type(module) for name, module in one.named_modules()} for one in (model, published))
    left_out = {name for name in expected if name.startswith(("model.6.m.1", "model.8.m.1"))}  # the repeats
    assert kinds == {name: kind for name, kind in expected.items() if name not in left_out}
    assert sum(p.numel() for p in model.parameters()) == 36_895 + 27  # one class more than three
    images = torch.rand(2, 3, 64, 64)
    raw = model.train()(images)
    (raw.box_logits.square().mean() + raw.class_logits.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.eval()(images)[0].shape == (2, 84, 4)
