"""The side of the input is a function of the step."""

from __future__ import annotations

from collections import Counter

import torch

from gai_yolo.training.multi_scale import InputSize
from tests.conftest import MakeBatch


def test_sizes_follow_from_seed_and_step_alone() -> None:
    """Loss: a run that was interrupted sees its images in other sizes."""
    sizes = [InputSize(640, 0.5, seed=3).at(step) for step in range(2000)]
    assert sizes == [InputSize(640, 0.5, seed=3).at(step) for step in range(2000)]
    assert sizes != [InputSize(640, 0.5, seed=4).at(step) for step in range(2000)]
    counts = Counter(sizes)
    assert set(counts) == set(range(320, 961, 32)) and min(counts.values()) > 50, "all alike often"


def test_off_means_the_configured_size() -> None:
    """Loss: other weights for who has not asked for it."""
    assert {InputSize(320, 0.0, seed=0).at(step) for step in range(100)} == {320}
    assert {InputSize(64, 0.75, seed=0).at(step) for step in range(100)} == {64, 96}, "never so small that BatchNorm has a single value"


def test_boxes_go_with_their_images(make_batch: MakeBatch) -> None:
    """Loss: boxes beside the objects in every step but those of the configured size."""
    batch = make_batch(0, (1, 2))
    batch.images[:] = 0
    batch.images[:, :, 16:32, 32:48] = 255
    batch.boxes[:] = torch.tensor([32.0, 16, 48, 32])
    for size in (32, 96, 128):
        resized = batch.resized(size)
        assert resized.images.shape == (2, 3, size, size) and resized.images.dtype == torch.uint8
        left, top, right, bottom = resized.boxes[0].round().long().tolist()
        bright = (resized.images[0, 0] > 127).nonzero()
        assert bright.min(dim=0).values.tolist() == [top, left] and (bright.max(dim=0).values + 1).tolist() == [bottom, right]
    assert batch.resized(64) is batch
