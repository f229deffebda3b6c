"""Samples and batches: decided by the key alone, whoever brings them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from gai_yolo.data.augment import Sample
from gai_yolo.data.dataset import Batch, EvaluationSet, Item, TrainingSet, collate
from gai_yolo.data.images import GREY, ImageSource
from gai_yolo.data.index import ImageRecord, make_record
from gai_yolo.data.loader import EvaluationLoader, TrainingLoader
from gai_yolo.data.order import BatchPlan, Key
from gai_yolo.sections import AugmentConfig

WriteImages = Callable[[int], list[ImageRecord]]
SIZE, EPOCHS = 64, 4
ALL = AugmentConfig(mosaic=0.7, mixup=0.5, flip_vertical=0.3, close_mosaic=2)
NONE = AugmentConfig(mosaic=0.0, scale=0.0, translate=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, flip=0.0)


def training_set(
    records: list[ImageRecord], tmp_path: Path, augment: AugmentConfig = ALL, cache: str = "none", seed: int = 5
) -> TrainingSet:
    return TrainingSet(ImageSource(records, SIZE, cache, tmp_path / "cache"), augment, seed, EPOCHS)


def assert_same_item(a: Item, b: Item) -> None:
    assert np.array_equal(a.sample.image, b.sample.image)
    assert np.array_equal(a.sample.boxes, b.sample.boxes)
    assert np.array_equal(a.sample.classes, b.sample.classes)
    assert (a.image_id, a.letterbox, a.unreadable) == (b.image_id, b.letterbox, b.unreadable)


def assert_same_batch(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


# --- training --------------------------------------------------------------------------------------------------------------


def test_a_key_gives_the_same_sample_in_any_order(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: a run that is resumed in the middle of an epoch goes on with other samples than the uninterrupted one."""
    records = write_images(6)
    keys = [Key(epoch, position) for epoch in range(1, EPOCHS + 1) for position in range(6)]
    first = {key: training_set(records, tmp_path)[key] for key in keys}
    other = training_set(records, tmp_path)
    np.random.seed(1)
    torch.manual_seed(1)
    for key in [*reversed(keys), keys[3], keys[3]]:
        assert_same_item(other[key], first[key])


Opened = Callable[[Any], Any]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Sees to it that a loader is closed."""
    with contextlib.ExitStack() as stack:
        yield lambda loader: stack.enter_context(contextlib.closing(loader))


def test_samples_differ_between_epochs_positions_and_seeds(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: augmentation that draws the same numbers for every sample."""
    record = write_images(1)[0]
    records = [replace(record, image_id=number) for number in range(4)]  # one picture under four positions
    single = ALL.model_copy(update={"mosaic": 0.0, "mixup": 0.0})
    images = [
        training_set(records, tmp_path, single, seed=seed)[Key(epoch, position)].sample.image.tobytes()
        for seed in range(3)
        for epoch in (1, 2)
        for position in range(4)
    ]
    assert len(set(images)) == 24


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_caches_do_not_change_a_bit(
    workers: int, cache: str, opened: Opened, write_images: WriteImages, tmp_path: Path
) -> None:
    """Loss: results that depend on how many loader processes a machine affords."""
    records = write_images(7)
    plan = BatchPlan(num_samples=7, batch_size=4, micro_batch_size=2, seed=5)
    dataset = training_set(records, tmp_path)
    loader = opened(TrainingLoader(training_set(records, tmp_path, cache=cache), plan, 0, 1, workers, pin_memory=False))
    for epoch in (1, 2, EPOCHS):
        steps = list(loader.epoch(epoch))
        order = plan.order(epoch)
        assert len(steps) == plan.steps_per_epoch
        for step, batches in enumerate(steps):
            expected = [collate([dataset[key] for key in micro]) for micro in plan.micro_batches(order, step)]
            assert len(batches) == len(expected)
            for batch, wanted in zip(batches, expected, strict=True):
                assert_same_batch(batch, wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_in_the_middle_does_not_leak_into_the_next(
    workers: int, opened: Opened, write_images: WriteImages, tmp_path: Path
) -> None:
    """Loss: prefetched batches of an abandoned epoch are trained on under the number of the next."""
    records, plan = write_images(6), BatchPlan(num_samples=6, batch_size=2, micro_batch_size=1, seed=5)
    loader = opened(TrainingLoader(training_set(records, tmp_path), plan, 0, 1, workers, pin_memory=False))
    whole = list(loader.epoch(2))
    for batches in loader.epoch(1):
        assert len(batches) == 2
        break
    for first_step in (0, 1, 3):
        rest = list(loader.epoch(2, first_step))
        assert len(rest) == 3 - first_step
        for batches, wanted in zip(rest, whole[first_step:], strict=True):
            for batch, other in zip(batches, wanted, strict=True):
                assert_same_batch(batch, other)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_bring_what_one_rank_brings(world_size: int, write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: after a change of machines another set of pictures enters a step."""
    records, plan = write_images(7), BatchPlan(num_samples=7, batch_size=6, micro_batch_size=2, seed=1)
    alone = list(TrainingLoader(training_set(records, tmp_path), plan, 0, 1, 0, False).epoch(1))
    ranks = [list(TrainingLoader(training_set(records, tmp_path), plan, rank, world_size, 0, False).epoch(1)) for rank in range(world_size)]
    for number, wanted in enumerate(alone):
        together = [batch for rank in ranks for batch in rank[number]]
        assert len(together) == len(wanted)
        for batch, other in zip(together, wanted, strict=True):
            assert_same_batch(batch, other)
    assert world_size < 5 or ranks[4][0] == [], "an idle rank has empty steps"


def flat_records(tmp_path: Path) -> list[ImageRecord]:
    """Four images of one colour each; in a mosaic several colours are seen."""
    records = []
    for number, level in enumerate((0, 60, 180, 255)):
        path = tmp_path / f"flat{number}.png"
        assert cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), level, dtype=np.uint8))
        records.append(make_record(number, path, SIZE, SIZE, [[8, 8, 56, 56]], [number]))
    return records


def test_mosaic_and_mixup_are_off_in_the_last_epochs(tmp_path: Path) -> None:
    """Loss: the last epochs, meant to adapt to real pictures, go on with composed ones (or the first ones are without)."""
    augment = NONE.model_copy(update={"mosaic": 1.0, "mixup": 1.0, "close_mosaic": 2})
    dataset = training_set(flat_records(tmp_path), tmp_path, augment)

    def colours(epoch: int) -> list[int]:
        samples = [dataset[Key(epoch, position)].sample for position in range(4)]
        return [len(set(np.unique(sample.image).tolist()) - {GREY}) for sample in samples]

    assert all(sum(colours(epoch)) > 4 for epoch in (1, 2))
    assert [colours(epoch) for epoch in (3, 4)] == [[1, 1, 1, 1]] * 2
    for position in range(4):
        sample = dataset[Key(3, position)].sample
        assert (sample.boxes.tolist(), sample.classes.tolist()) == ([[8, 8, 56, 56]], [position])


def test_without_augmentation_a_sample_is_its_picture(tmp_path: Path) -> None:
    """Loss: an augmentation that cannot be switched off, red and blue exchanged, or boxes in pixels of the file."""
    path = tmp_path / "red.png"
    assert cv2.imwrite(str(path), np.full((32, 16, 3), (0, 0, 255), dtype=np.uint8))  # OpenCV's order: red
    item = training_set([make_record(9, path, 16, 32, [[2, 4, 10, 30]], [1])], tmp_path, NONE)[Key(1, 0)]
    assert item.image_id == 9
    assert (item.sample.image[:, 16:48] == (255, 0, 0)).all()
    assert (item.sample.image[:, :16] == GREY).all() and (item.sample.image[:, 48:] == GREY).all()
    assert item.sample.boxes.tolist() == [[16 + 4, 8, 16 + 20, 60]]


def test_crowd_regions_are_not_trained_on(tmp_path: Path) -> None:
    """Loss: boxes around whole crowds learned as one large object."""
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
    boxes = [[0.0, 0.0, 60.0, 60.0], [10.0, 10.0, 30.0, 30.0], [5.0, 5.0, 64.0, 20.0]]
    records = [make_record(1, path, SIZE, SIZE, boxes, [0, 1, 2], crowd=[True, False, True])]
    for item in (training_set(records, tmp_path, NONE)[Key(1, 0)], EvaluationSet(ImageSource(records, SIZE, "none", tmp_path))[Key(0, 0)]):
        assert item.sample.boxes.tolist() == [[10, 10, 30, 30]]
        assert item.sample.classes.tolist() == [1]


# --- unreadable images -----------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    """What happens to files while a training of days runs."""
    path.write_bytes({"empty": b"", "truncated": path.read_bytes()[: path.stat().st_size // 2], "garbage": b"\x00" * 500}[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "garbage"])
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_unreadable_image_becomes_grey_and_is_told(how: str, cache: str, write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: one bad file ends the run after three days, or its boxes are trained on something that is not there."""
    records = write_images(3)
    assert len(records[2].boxes) == 2
    damage(records[2].path, how)
    plan = BatchPlan(num_samples=3, batch_size=3, micro_batch_size=3, seed=0)
    (batches,) = TrainingLoader(training_set(records, tmp_path, NONE, cache), plan, 0, 1, 0, False).epoch(1)
    place = batches[0].image_ids.tolist().index(102)
    assert batches[0].unreadable.tolist() == [102]
    assert (batches[0].images[place] == GREY).all()
    assert place not in batches[0].box_image.tolist()
    assert len(batches[0].boxes) == 1, "the box of the second image is still there"
    (evaluated,) = EvaluationLoader(EvaluationSet(ImageSource(records, SIZE, cache, tmp_path / "cache")), 3, 0, 1, 0, False)
    assert evaluated.unreadable.tolist() == [102]
    assert (evaluated.images[2] == GREY).all() and 2 not in evaluated.box_image.tolist()


def test_unreadable_tiles_of_a_mosaic_are_told(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: bad files are counted only where they come alone, which with mosaic is never."""
    records = write_images(3)
    for record in records:
        damage(record.path, "garbage")
    item = training_set(records, tmp_path, NONE.model_copy(update={"mosaic": 1.0, "close_mosaic": 0}))[Key(1, 1)]
    assert len(item.unreadable) == 4 and item.unreadable[0] == 101
    assert (item.sample.image == GREY).all() and len(item.sample.boxes) == 0


# --- evaluation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_covers_every_image_once_in_equal_batches(
    world_size: int, workers: int, opened: Opened, write_images: WriteImages, tmp_path: Path
) -> None:
    """Loss: metrics that depend on the number of processes, because images are padded, dropped or grouped otherwise."""
    dataset = EvaluationSet(ImageSource(write_images(8), SIZE, "none", tmp_path))
    wanted = [collate([dataset[Key(0, p)] for p in positions]) for positions in ((0, 1, 2), (3, 4, 5), (6, 7))]
    seen = []
    for rank in range(world_size):
        loader = opened(EvaluationLoader(dataset, 3, rank, world_size, workers, pin_memory=False))
        for _ in range(2 if workers == 0 else 1):
            batches = list(loader)
        assert len(batches) == len(loader.numbers)
        for number, batch in zip(loader.numbers, batches, strict=True):
            assert_same_batch(batch, wanted[number])
        seen += [image_id for batch in batches for image_id in batch.image_ids.tolist()]
    assert sorted(seen) == list(range(100, 108))


def test_letterbox_geometry_leads_back_to_the_file(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: predictions that are shifted or scaled when they are written in pixels of the file."""
    records = write_images(6)
    (batch,) = EvaluationLoader(EvaluationSet(ImageSource(records, SIZE, "none", tmp_path)), 6, 0, 1, 0, False)
    scale, left, top = batch.letterbox.double().unbind(dim=1)
    offset = torch.stack((left, top, left, top), dim=1)
    back = (batch.boxes.double() - offset[batch.box_image]) / scale[batch.box_image, None]
    assert len(back) == 6
    torch.testing.assert_close(back, torch.from_numpy(np.concatenate([r.boxes for r in records])).double(), atol=1e-4, rtol=0)
    assert batch.classes.tolist() == np.concatenate([r.classes for r in records]).tolist()


def test_pixels_lie_where_the_letterbox_geometry_says(tmp_path: Path) -> None:
    """Loss: boxes and geometry agree with each other, but not with the picture."""
    image = np.zeros((90, 150, 3), dtype=np.uint8)
    image[30:60, 50:110] = 255
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), image)
    item = EvaluationSet(ImageSource([make_record(1, path, 150, 90, [[50, 30, 110, 60]], [0])], SIZE, "none", tmp_path))[Key(0, 0)]
    rows, columns = np.nonzero(item.sample.image.min(axis=-1) > 180)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(item.sample.boxes[0] - seen).max() <= 1.0


def test_collate_keeps_boxes_with_their_images() -> None:
    """Loss: boxes of one image trained on another when an image in between has none."""

    def item(number: int, boxes: int) -> Item:
        rows = np.full((boxes, 4), number, dtype=np.float32)
        image = np.full((4, 6, 3), number, dtype=np.uint8)
        image[..., 1] = 99
        return Item(Sample(image, rows, np.full(boxes, number)), 1000 + number, (1.0, 2.0, number), (7,) * (number == 2))

    batch = collate([item(0, 2), item(1, 0), item(2, 1)])
    assert batch.images.shape == (3, 3, 4, 6) and batch.images.dtype == torch.uint8
    assert (batch.images[2, 0] == 2).all() and (batch.images[:, 1] == 99).all()
    assert batch.box_image.tolist() == [0, 0, 2]
    assert batch.boxes[:, 0].tolist() == batch.classes.tolist() == [0, 0, 2]
    assert batch.image_ids.tolist() == [1000, 1001, 1002]
    assert batch.letterbox[:, 2].tolist() == [0, 1, 2]
    assert batch.unreadable.tolist() == [7]
    empty = collate([item(1, 0)])
    assert empty.boxes.shape == (0, 4) and empty.boxes.dtype == torch.float32
    assert empty.classes.dtype == empty.box_image.dtype == torch.int64
