"""From pictures to detections: the same as evaluation, from many threads, of what is asked for only."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gai_yolo.data.dataset import EvaluationSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import Category, ImageRecord, Index, Records, make_record
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.world import World
from gai_yolo.errors import Refusal
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.inference.pictures import Picture
from gai_yolo.inference.prediction import (
    MOST_BATCH_PIXELS,
    Predictor,
    Selection,
    batches,
    checked_size,
    choose_device,
    class_positions,
    read_ahead,
)
from gai_yolo.predict.detector import Detector
from gai_yolo.sections import EvaluationConfig
from tests.detectors import NAMES, eager_model, eager_network

SIZE, BATCH = 64, 3


def turned_records(folder: Path) -> list[ImageRecord]:
    """Photographs with each of EXIF's orientations, some much larger than the network's input; a palette and 16 bits."""
    records = []
    for orientation in range(1, 9):
        rng = np.random.default_rng(orientation)
        height, width = 41 * orientation, 57 * orientation
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(np.asarray(cv2.GaussianBlur(noise, (0, 0), 2), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / f"{orientation}.jpg"
        image.save(path, exif=exif)
        sides = (width, height) if orientation < 5 else (height, width)
        records.append(make_record(orientation, path, *sides, [[1, 1, 9, 9]], [0], orientation=orientation))
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (50, 90), dtype=np.uint16)).save(folder / "deep.png")
    records.append(make_record(20, folder / "deep.png", 90, 50, [], []))
    image.quantize(20).save(folder / "palette.png")
    records.append(make_record(21, folder / "palette.png", *image.size, [], []))
    return records


def test_predictions_are_those_of_evaluation_to_the_last_bit(tmp_path: Path, world: World) -> None:
    """Loss: mAP of one program, and boxes of another: what is measured is not what is used."""
    records = turned_records(tmp_path)
    index = Index("here", tuple(Category(number + 1, name) for number, name in enumerate(NAMES)), Records.of(records))
    loader = EvaluationLoader(EvaluationSet(ImageSource(index.images, SIZE, "none", tmp_path)), BATCH, 0, 1, 0, False)
    config = EvaluationConfig(confidence=0.3, iou=0.6, max_detections=40)
    network = eager_network().to(memory_format=torch.channels_last)
    evaluation = Evaluator(loader, index, DetectionLoss(), world, config, "none", True)(network)
    detector = Detector(eager_model(), "cpu")
    found = detector.predict([record.path for record in records], confidence=0.3, iou=0.6, max_detections=40, size=SIZE, batch_size=BATCH)
    assert len(found) == len(evaluation.detections) == 10
    assert sum(len(one) for one in found) > 100
    for mine, theirs, record in zip(found, evaluation.detections, records, strict=True):
        assert mine.path == record.path and mine.image.shape == (record.height, record.width, 3)
        assert np.array_equal(mine.boxes, theirs.boxes) and mine.boxes.dtype == np.float32
        assert np.array_equal(mine.scores, theirs.scores) and mine.scores.dtype == np.float32
        assert np.array_equal(mine.classes, theirs.classes) and mine.classes.dtype == np.int64


def test_threads_that_share_a_detector_get_what_each_would_get_alone() -> None:
    """Loss: a web service whose answers mix up when two people ask at once."""
    detector = Detector(eager_model(), "cpu")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8) for number in range(8)]
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    alone = [detector.predict(image, size=SIZE) for image in images]
    barrier = threading.Barrier(8)

    def together(number: int) -> list[tuple[bytes, bytes, bytes]]:
        barrier.wait(60)
        found = [detector.predict(images[number], size=SIZE) for _ in range(5)]
        return [(one.boxes.tobytes(), one.scores.tobytes(), one.classes.tobytes()) for one in found]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(together, range(8))):
            expected = (alone[number].boxes.tobytes(), alone[number].scores.tobytes(), alone[number].classes.tobytes())
            assert len(alone[number]) > 0 and found == [expected] * 5
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, deterministic)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_classes_that_are_not_asked_for_take_no_place() -> None:
    """Loss: of two people none is found, because 300 cars were surer."""
    predictor = Predictor(eager_model(), torch.device("cpu"))
    picture = Picture(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (everything,) = predictor([picture], Selection(0.1, 0.7, 10_000), SIZE)
    (some,) = predictor([picture], Selection(0.1, 0.7, 5, (0, 2)), SIZE)
    wanted = [row for row in zip(everything.scores.tolist(), everything.classes.tolist(), strict=True) if row[1] != 1]
    assert list(zip(some.scores.tolist(), some.classes.tolist(), strict=True)) == wanted[:5]
    assert 1 in everything.classes.tolist()[:5], "otherwise it would not have been in the way"


def test_classes_are_known_by_name_and_by_number() -> None:
    """Loss: a class whose name is a number taken for another one; a typing error that finds nothing."""
    assert class_positions(["red cell", 0], NAMES) == (0, 1)
    assert class_positions(["7", "1"], NAMES) == (1, 2), "a name first, and only then a number"
    assert class_positions(["a"], ["a", "b", "a"]) == (0, 2)
    for wrong in ("dog", 3, "3", -1, "-1"):
        with pytest.raises(Refusal, match=r"there is no .*cell, red cell, 7, or give numbers from 0 to 2"):
            class_positions([wrong], NAMES)
    with pytest.raises(Refusal, match="none is given"):
        class_positions([], NAMES)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((1.1, 0.7, 300), "confidence"),
        ((float("nan"), 0.7, 300), "confidence"),
        ((0.2, -0.1, 300), "iou"),
        ((0.2, 0.7, 0), "max_detections"),
        (("0.2", 0.7, 300), "confidence"),
        ((torch.rand(2), 0.7, 300), "confidence"),
        ((0.2, None, 300), "iou"),
        ((0.2, 0.7, 2.5), "max_detections"),
    ],
)
def test_values_out_of_their_range_are_refused_by_name(values: tuple[Any, Any, Any], says: str) -> None:
    """Loss: 25 meant as per cent finds nothing, silently; an error that does not say which of eight arguments it is about."""
    with pytest.raises(Refusal, match=f"^{says}: must"):
        Selection(*values)


def test_sizes_and_devices_that_are_none_are_refused() -> None:
    """Loss: a traceback out of the middle of the network."""
    assert checked_size(96) == 96
    for size in (0, -32, 100, 64.0, "64"):
        with pytest.raises(Refusal, match="multiple of 32"):
            checked_size(size)  # type: ignore[arg-type]
    for size in (96_000, 32 * 10**30):  # which took all memory, and the process was killed
        with pytest.raises(Refusal, match="at most 16384"):
            checked_size(size)
    assert choose_device("cpu").type == "cpu"
    for device in ("meta", "nonsense", "cuda:99", "hpu"):
        with pytest.raises(Refusal, match=f"device {device}"):
            choose_device(device)


def test_batches_of_large_pictures_are_shorter() -> None:
    """Loss: sixteen photographs of a telephone in memory, and as many drawn ones."""
    pixels = [1, 1, 1, MOST_BATCH_PIXELS, 1, MOST_BATCH_PIXELS // 2, MOST_BATCH_PIXELS // 2, 1]
    assert [len(batch) for batch in batches(pixels, 3, lambda one: one)] == [3, 1, 3, 1]
    assert list(batches([], 3, int)) == []


def test_reading_ahead_keeps_order_and_bounds_and_raises_in_place() -> None:
    """Loss: results of other files; a folder of a million files in memory; a broken file that ends what came before it."""
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        if number == 12:
            raise Refusal("twelve")
        return -number

    results = read_ahead(read, iter(range(1000)), readers=3, ahead=4)
    assert [next(results) for _ in range(12)] == [-number for number in range(12)]
    with pytest.raises(Refusal, match="twelve"):
        next(results)
    assert max(begun) <= 12 + 5
