"""The learning rate and the parameter groups."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from gai_yolo.detector import YOLO12
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.optimizer import OptimizerSchedule, make_optimizer, make_schedule, set_rates


def recipe_of(num_classes: int = 80, steps_per_epoch: int = 50, **settings: Any) -> OptimizerSchedule:
    return make_schedule(TrainingConfig.model_validate(settings), num_classes, steps_per_epoch)


# --- the recipe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "expected"), [(9999, 1, "adamw"), (10000, 1, "sgd"), (99, 100, "adamw"), (200, 50, "sgd")]
)
def test_auto_takes_adamw_for_short_runs(epochs: int, steps_per_epoch: int, expected: str) -> None:
    """Loss: a small data set trained with SGD does not get anywhere, a large one with AdamW ends worse."""
    assert recipe_of(80, steps_per_epoch, epochs=epochs).optimizer == expected
    other = "sgd" if expected == "adamw" else "adamw"
    assert recipe_of(80, steps_per_epoch, epochs=epochs, optimizer=other).optimizer == other, "what is asked for is taken"


def test_autos_follow_the_optimizer_and_the_classes() -> None:
    """Loss: SGD's learning rate given to AdamW destroys the weights in the first epoch."""
    sgd, adamw, few = recipe_of(80, optimizer="sgd"), recipe_of(80, optimizer="adamw"), recipe_of(1, optimizer="adamw")
    assert (sgd.lr, sgd.momentum) == (0.01, 0.937)
    assert adamw.lr == pytest.approx(0.000119)
    assert adamw.momentum == 0.9
    assert few.lr == pytest.approx(0.002)
    own = recipe_of(80, optimizer="adamw", lr=0.5, momentum=0.25)
    assert (own.lr, own.momentum) == (0.5, 0.25)


def test_weight_decay_grows_with_the_batch() -> None:
    """Loss: another batch size silently changes the strength of the decay."""
    assert recipe_of(batch_size=64).weight_decay == pytest.approx(0.0005)
    assert recipe_of(batch_size=128).weight_decay == pytest.approx(0.001)
    assert recipe_of(batch_size=16, weight_decay=0.01).weight_decay == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_epochs": 3}, 150),
        ({"warmup_epochs": 0.5}, 100),
        ({"warmup_epochs": 0.5, "warmup_iterations": 0}, 25),
        ({"warmup_epochs": 0}, 0),
    ],
)
def test_warm_up_is_the_longer_of_epochs_and_iterations_and_can_be_off(settings: dict[str, Any], expected: int) -> None:
    """Loss: a warm-up of three steps on a tiny data set, or one that cannot be switched off."""
    assert recipe_of(80, 50, **settings).warmup_steps == expected


# --- the rates -------------------------------------------------------------------------------------------------------------

BASE = OptimizerSchedule("sgd", 0.01, 0.937, 0.8, 0.0005, 0.01, cosine=False, warmup_steps=100, total_steps=1000)


@pytest.mark.parametrize("cosine", [False, True])
def test_learning_rate_rises_during_warm_up_and_falls_after_it(cosine: bool) -> None:
    """Loss: a jump of the learning rate where warm-up ends, or a rate that never falls."""
    rates = [replace(BASE, cosine=cosine).learning_rate(step) for step in range(1001)]
    assert 0 < rates[0] <= 0.01 / 100, "it begins near 0, but every step counts"
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert max(abs(a - b) for a, b in pairwise(rates)) <= 0.01 / 100 + 1e-12
    assert 0.0088 < max(rates) <= 0.01


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 1.0])
def test_learning_rate_ends_at_the_configured_fraction(cosine: bool, fraction: float) -> None:
    """Loss: the last epochs, which settle the weights, are trained with a far too high (or no) learning rate."""
    schedule = replace(BASE, cosine=cosine, final_lr_fraction=fraction)
    assert schedule.learning_rate(1000) == pytest.approx(0.01 * fraction, abs=1e-12)
    assert schedule.learning_rate(5000) == pytest.approx(0.01 * fraction, abs=1e-12), "never below"
    assert schedule.learning_rate(999) == pytest.approx(0.01 * fraction, abs=0.011 / 1000)


def test_linear_and_cosine_have_their_shapes() -> None:
    """Loss: a setting that changes nothing, or the two exchanged."""
    linear, cosine = replace(BASE, warmup_steps=0), replace(BASE, warmup_steps=0, cosine=True)
    for step in range(0, 1001, 50):
        assert linear.learning_rate(step) == pytest.approx(0.01 * (1 - 0.99 * step / 1000))
        assert cosine.learning_rate(step) == pytest.approx(0.01 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / 1000)) / 2))
    assert cosine.learning_rate(100) > linear.learning_rate(100)
    assert cosine.learning_rate(900) < linear.learning_rate(900)


def test_momentum_rises_with_the_warm_up() -> None:
    """Loss: full momentum on the wild gradients of the first steps."""
    values = [BASE.momentum_at(step) for step in range(150)]
    assert values[0] == 0.8
    assert all(a < b for a, b in pairwise(values[:101]))
    assert set(values[100:]) == {0.937}
    assert replace(BASE, warmup_steps=0).momentum_at(0) == 0.937
    low = replace(BASE, momentum=0.5)
    assert {low.momentum_at(step) for step in range(150)} == {0.5}, "warm-up never exceeds what it leads to"


# --- the optimizer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("size", ["n", "l"])
def test_groups_hold_every_trained_parameter_once_and_decay_only_weights(name: str, size: str) -> None:
    """Loss: biases, norms and residual scales shrink to nothing, or a part of the network is never trained."""
    with torch.device("meta"):
        model = YOLO12(size, num_classes=3)
    optimizer = make_optimizer(model, recipe_of(optimizer=name, batch_size=128))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (pytest.approx(0.001), 0.0)
    groups = {id(p): group for group in (decayed, plain) for p in group["params"]}
    assert len(groups) == len(decayed["params"]) + len(plain["params"]), "none twice"
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("dfl.conv.weight"):
            assert id(parameter) not in groups, "the bins 0..15 are not learned"
        elif parameter_name.endswith((".bias", ".bn.weight", ".gamma")):
            assert groups[id(parameter)] is plain, parameter_name
        else:
            assert groups[id(parameter)] is decayed, parameter_name
    assert any(n.endswith(".gamma") for n, _ in model.named_parameters()) == (size == "l")


def test_optimizers_are_the_published_ones() -> None:
    """Loss: plain momentum in place of Nesterov's, or L2 regularisation in place of decoupled decay."""
    model = torch.nn.Linear(3, 2)
    sgd, adamw = make_optimizer(model, recipe_of(optimizer="sgd")), make_optimizer(model, recipe_of(optimizer="adamw"))
    assert isinstance(sgd, SGD) and isinstance(adamw, AdamW)
    assert all(group["nesterov"] and group["momentum"] == 0.937 for group in sgd.param_groups)
    assert all(group["betas"] == (0.9, 0.999) for group in adamw.param_groups)


@pytest.mark.parametrize(("name", "read"), [("sgd", lambda g: g["momentum"]), ("adamw", lambda g: g["betas"][0])])
def test_rates_reach_every_group(name: str, read: Any) -> None:
    """Loss: a schedule that is computed and never applied, or applied to one group."""
    optimizer = make_optimizer(torch.nn.Linear(3, 2), replace(BASE, optimizer=name))
    for step in (0, 50, 100, 999):
        for group in optimizer.param_groups:  # what a checkpoint of an earlier configuration would bring
            group.update(lr=9.0, weight_decay=9.0)
        rate = set_rates(optimizer, BASE, step)
        assert rate == BASE.learning_rate(step)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
        assert [read(group) for group in optimizer.param_groups] == [BASE.momentum_at(step)] * 2
        assert all(group.get("betas", (0, 0.999))[1] == 0.999 for group in optimizer.param_groups)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0005, 0.0]
