"""Frozen layers stay as they are, to the last bit, and thaw as if nothing had interrupted them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gai_yolo.checkpointing.digest import part_digests
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.detector import YOLO12
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.exact_sum import NO_EXPONENT
from gai_yolo.distributed.world import World
from gai_yolo.errors import ConfigError
from gai_yolo.sections import ModelConfig, TrainingConfig
from gai_yolo.training.freezing import Freezing, freezing_of
from gai_yolo.training.optimizer import make_schedule
from gai_yolo.training.step import TrainingStep
from tests.conftest import MakeBatch, MakeState

STEPS = 1
"""Of an epoch."""


def config_of(freeze: int | list[str], epochs: int | None = None) -> ModelConfig:
    return ModelConfig.model_validate({"size": "debug", "freeze": freeze, "freeze_epochs": epochs})


def train(state: TrainingState, epochs: range, world: World, make_batch: MakeBatch, freezing: Freezing, optimizer: str = "sgd") -> None:
    """Epochs of steps whose data depends on their number only, in one start of the job."""
    config = TrainingConfig.model_validate({"optimizer": optimizer, "epochs": 10, "ema_tau": 5.0, "lr": 0.01, "channels_last": False})
    step = TrainingStep(state, DetectionLoss(), make_schedule(config, 3, 10), world, config, freezing)
    for epoch in epochs:
        step.begin_epoch(epoch)
        for _ in range(STEPS):
            step([make_batch(state.step, (1, 2)), make_batch(state.step, (4, 5)), make_batch(state.step, (7, 8))], 3, 6, 64)
        state.end_epoch({"mAP50-95": None})


def tensors(state: TrainingState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("exact", [True, False])
def test_frozen_layers_keep_weights_and_statistics(
    optimizer: str, exact: bool, world: World, make_state: MakeState, make_batch: MakeBatch
) -> None:
    """Loss: weight decay, momentum or BatchNorm change what was to be kept."""
    state = make_state(optimizer)
    config = TrainingConfig.model_validate({"optimizer": optimizer, "epochs": 10, "lr": 0.01, "channels_last": False, "exact": exact})
    freezing = freezing_of(config_of(9), state.model)
    step, before = TrainingStep(state, DetectionLoss(), make_schedule(config, 3, 10), world, config, freezing), tensors(state)
    step.begin_epoch(1)
    for number in range(3):
        step([make_batch(number, (1, 2)), make_batch(number, (4, 5)), make_batch(number, (7, 8))], 3, 6, 64)
    after = tensors(state)
    frozen = {name for name in before if int(name.split(".")[1]) < 9}
    assert all(torch.equal(before[name], after[name]) for name in frozen), "to the last bit, counters too"
    others = {name for name in before if name not in frozen and "num_batches" not in name and ".dfl." not in name}
    same = {name for name in others if torch.equal(before[name], after[name])}
    assert len(frozen) > 50 and len(others) > 50 and len(same) < len(others) / 20


def test_every_batch_norm_may_be_frozen(world: World, make_state: MakeState, make_batch: MakeBatch) -> None:
    """Loss: what is often asked for with small batches breaks off in the first step."""
    state = make_state()
    before = tensors(state)
    train(state, range(1, 2), world, make_batch, freezing_of(config_of(["*.bn"]), state.model))
    after = tensors(state)
    assert state.step == STEPS and all(torch.equal(before[name], after[name]) for name in before if ".bn." in name)
    assert not torch.equal(before["model.0.conv.weight"], after["model.0.conv.weight"])


@pytest.mark.parametrize(("cut", "optimizer"), [(1, "sgd"), (2, "adamw"), (3, "sgd")])
def test_thawing_is_the_same_in_one_start_or_two(
    cut: int, optimizer: str, world: World, make_state: MakeState, make_batch: MakeBatch
) -> None:
    """Loss: the run that was interrupted before, at or after the thaw is another run."""
    unbroken, broken = make_state(optimizer), make_state(optimizer)
    freezing = freezing_of(config_of(["model.[0-6].*", "model.21"], epochs=2), unbroken.model)
    train(unbroken, range(1, 5), world, make_batch, freezing, optimizer)
    train(broken, range(1, cut + 1), world, make_batch, freezing, optimizer)
    again = make_state(optimizer, seed=1)
    again.apply(copy.deepcopy(broken.capture()))
    train(again, range(cut + 1, 5), world, make_batch, freezing, optimizer)
    ours, theirs = unbroken.capture(), again.capture()
    for part in ("model_state_dict", "ema_state_dict"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part]), part
    assert ours["gradient_exponents"] == theirs["gradient_exponents"] and NO_EXPONENT not in ours["gradient_exponents"]
    start = tensors(make_state(optimizer))
    assert not torch.equal(start["model.0.conv.weight"], ours["model_state_dict"]["model.0.conv.weight"]), "it has thawed"


def test_the_state_before_the_thaw_can_be_had_in_the_middle_of_the_first_step_after_it(
    world: World, make_state: MakeState, make_batch: MakeBatch
) -> None:
    """Loss: what is saved when a peer dies there is no state that the undisturbed run ever had."""

    class Broken(DetectionLoss):
        def __call__(self, *arguments: Any) -> Any:
            if state.step == 2 * STEPS:
                raise RuntimeError("a peer is gone")
            return super().__call__(*arguments)

    state = make_state()
    config = TrainingConfig.model_validate({"optimizer": "sgd", "epochs": 10, "lr": 0.01, "channels_last": False})
    step = TrainingStep(state, Broken(), make_schedule(config, 3, 10), world, config, freezing_of(config_of(9, epochs=2), state.model))
    for epoch in (1, 2):
        step.begin_epoch(epoch)
        for _ in range(STEPS):
            step([make_batch(state.step, (1, 2))], 1, 2, 64)
        state.end_epoch({"mAP50-95": None})
    whole = part_digests(copy.deepcopy(step.boundary()))
    step.begin_epoch(3)
    assert part_digests(step.boundary()) == whole
    with pytest.raises(RuntimeError, match="a peer is gone"):
        step([make_batch(state.step, (1, 2))], 1, 2, 64)
    assert part_digests(state.capture())["batch_norm"] != whole["batch_norm"], "it is in mid-step indeed"
    interrupted = part_digests(step.boundary())
    # The learning rate is set at a step's beginning.
    assert {**interrupted, "optimizer": ""} == {**whole, "optimizer": ""}


def test_nothing_is_known_of_the_gradients_of_frozen_layers(world: World, make_state: MakeState, make_batch: MakeBatch) -> None:
    """Loss: exponents that belong to other parameters, and sums that overflow."""
    state = make_state()
    freezing = freezing_of(config_of(3), state.model)
    trained = [name for name, p in state.model.named_parameters() if p.requires_grad]
    train(state, range(1, 2), world, make_batch, freezing)
    assert state.gradient_exponents is not None
    known = dict(zip(trained, state.gradient_exponents, strict=True))
    assert {name for name, exponent in known.items() if exponent == NO_EXPONENT} >= freezing.names
    assert known["model.21.cv2.0.0.conv.weight"] != NO_EXPONENT


@pytest.mark.parametrize(
    ("freeze", "words"),
    [(["model.99"], "'model.99' fits no parameter"), (["model"], "leaves nothing to train"), (22, "leaves nothing to train")],
)
def test_what_makes_no_sense_is_refused(freeze: int | list[str], words: str) -> None:
    """Loss: a typing error, and everything is trained after all."""
    with pytest.raises(ConfigError, match=words):
        freezing_of(config_of(freeze), YOLO12("debug", 3))


def test_layers_are_named_by_number_or_pattern() -> None:
    """Loss: `model.1` that also means `model.10`."""
    model = YOLO12("debug", 3)
    assert not freezing_of(config_of(0), model).names
    assert {name.split(".")[1] for name in freezing_of(config_of(["model.1"]), model).names} == {"1"}
    assert {name.split(".")[1] for name in freezing_of(config_of(12), model).names} == {*"012345678", "11"}, "upsampling has none"
    assert freezing_of(config_of(3, epochs=2), model).in_epoch(2) and not freezing_of(config_of(3, epochs=2), model).in_epoch(3)
    assert all(".dfl." not in name for name in freezing_of(config_of(["model.21"]), model).names), "a constant anyway"
