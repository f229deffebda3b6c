"""Seldom classes weigh more, in the loss and in how often their images are drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gai_yolo.config import Config, changed_keys, parse_config, shared_values
from gai_yolo.data.index import Category, Index, Records, make_record
from gai_yolo.data.order import BatchPlan, Key, WeightedOrder
from gai_yolo.data.rarity import class_weights, repeat_factors
from gai_yolo.detector.head import RawPredictions
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.errors import ConfigError


def index_of(*classes: list[int]) -> Index:
    """An image for each list."""
    box = [1.0, 1.0, 20.0, 20.0]
    images = [make_record(n, Path(f"{n}.jpg"), 64, 64, [box] * len(found), found) for n, found in enumerate(classes)]
    return Index("train", (Category(1, "car"), Category(2, "bus"), Category(3, "tram")), Records.of(images))


def test_factors_are_those_of_the_paper() -> None:
    """Loss: images of common classes drawn more often than those of seldom ones."""
    index = index_of([0], [0, 0], [0, 1], [], *[[0]] * 12)  # car in 15 of 16, bus in 1
    factors = repeat_factors(index, 0.25)
    assert factors.tolist() == [1, 1, 2, 1] + [1] * 12
    assert set(repeat_factors(index, 0.01).tolist()) == {1.0}


@pytest.mark.parametrize("seed", [0, 3])
def test_images_come_as_often_as_they_weigh(seed: int) -> None:
    """Loss: seldom images by chance not at all."""
    weights = np.array([1.0] * 60 + [3.0] * 20)
    plan = BatchPlan(80, 7, 3, seed, weights=weights)
    order = plan.order(2)
    keys = [key for step in range(plan.steps_per_epoch) for micro in plan.micro_batches(order, step) for key in micro]
    assert len(keys) == len(set(keys)) == 80, "an epoch has as many samples as ever, no two alike"
    counts = Counter(key.position for key in keys)
    for position, weight in enumerate(weights):
        assert abs(counts[position] - 80 * weight / weights.sum()) < 1, "rounded up or down"
    assert keys == [key for step in range(80) for key in WeightedOrder(weights, seed, 2).keys(step, step + 1)], "from any place"
    assert keys != WeightedOrder(weights, seed, 3).keys(0, 80)


def test_equal_weights_bring_each_image_once() -> None:
    """Loss: images left out although nothing asked for it."""
    keys = WeightedOrder(np.ones(1000), 5, 1).keys(0, 1000)
    assert sorted(key.position for key in keys) == list(range(1000))
    assert Key(1, 5) == Key(1, 5, 0), "an unweighted draw has no number, so its sample is as it was"


def test_class_weights_by_name_and_by_frequency() -> None:
    """Loss: the weight of one class given to another."""
    index = index_of([0, 0, 0, 0], [0, 0, 0, 0, 0, 1])
    assert class_weights(None, index) is None
    assert class_weights({"bus": 2.5}, index) == [1.0, 2.5, 1.0]
    found = class_weights("auto", index)
    assert found is not None
    car, bus, _ = found
    assert bus / car == pytest.approx(3.0) and (9 * car + bus) / 10 == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="'buss' is no class of train"):
        class_weights({"buss": 2.0}, index)


def test_weights_of_classes_weigh_the_classification_term_alone() -> None:
    """Loss: box losses scaled too, or the weights of the wrong axis."""
    torch.manual_seed(0)
    raw = RawPredictions(torch.randn(2, 64, 84), torch.randn(2, 3, 84))
    truth = (64, 64, torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([[4.0, 4, 40, 40], [10, 10, 60, 50]]))
    plain, ones = DetectionLoss()(raw, *truth), DetectionLoss(class_weights=torch.ones(3))(raw, *truth)
    assert torch.equal(plain.detached(), ones.detached())
    parts = [DetectionLoss(class_weights=torch.eye(3)[number])(raw, *truth) for number in range(3)]
    torch.testing.assert_close(sum(part.cls for part in parts), plain.cls)
    weighted = DetectionLoss(class_weights=torch.tensor([1.0, 4.0, 0.5]))(raw, *truth)
    torch.testing.assert_close(weighted.cls, parts[0].cls + 4 * parts[1].cls + parts[2].cls / 2)
    assert weighted.box == plain.box and weighted.dfl == plain.dfl and weighted.target_scores == plain.target_scores


def test_a_mapping_is_one_value_of_the_configuration() -> None:
    """Loss: nodes whose weights differ are not told apart, or the comparison breaks."""
    config = parse_config({"loss": {"class_weights": {"bus": 2.0}}}, "test")
    assert shared_values(config)["loss.class_weights"] == {"bus": 2.0}
    assert changed_keys(Config().dump(), config.dump()) == ([], ["loss.class_weights"])
    with pytest.raises(ConfigError, match=r"loss\.class_weights"):
        parse_config({"loss": {"class_weights": {"bus": -1}}}, "test")
