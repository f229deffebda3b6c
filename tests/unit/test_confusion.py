"""Which class is taken for which: worked by hand, and what must hold whatever is detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.data.index import Category, ImageRecord, Index, Records, make_record
from gai_yolo.evaluation.coco_metrics import ImageDetections
from gai_yolo.evaluation.confusion import confusion_of, match, overlap

Boxes = list[list[float]]
CLASSES = (Category(3, "cat"), Category(7, "dog"))


def index_of(*records: ImageRecord) -> Index:
    """An index of two classes."""
    return Index("test", CLASSES, Records.of(records))


def image(boxes: Boxes, classes: list[int], crowd: list[bool] | None = None, number: int = 1) -> ImageRecord:
    """An image of 200 x 200 pixels."""
    return make_record(number, Path(f"{number}.jpg"), 200, 200, boxes, classes, crowd)


def found(boxes: Boxes, scores: list[float], classes: list[int], number: int = 1) -> ImageDetections:
    """What a network says of it."""
    array = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return ImageDetections(number, array, np.asarray(scores, np.float32), np.asarray(classes, np.int64))


def test_hand_worked_case() -> None:
    """Loss: a matrix that looks plausible and is turned round, or counts an object twice.

    A cat that is found, a cat that is taken for a dog, a dog that nobody sees, and a detection on the grass. A second, less sure detection
    on the first cat finds nothing that is still free; one below the confidence does not count at all.
    """
    record = image([[0, 0, 50, 50], [60, 0, 110, 50], [0, 100, 50, 150]], [0, 0, 1])
    boxes: Boxes = [[0, 0, 50, 48], [62, 0, 110, 50], [150, 150, 190, 190], [0, 0, 50, 50], [0, 100, 50, 150]]
    result = confusion_of(index_of(record), [found(boxes, [0.9, 0.8, 0.7, 0.6, 0.2], [0, 1, 1, 0, 1])])
    # rows: cat, dog, background; columns: cat, dog, nothing
    assert result.matrix.tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    (one,) = result.images
    assert (one.right, one.mixed_up, one.missed, one.invented) == (1, 1, 1, 2)
    # 3 boxes and 4 detections, 1 right: 2 / 7
    assert one.score == pytest.approx(2 / 7)


def test_a_detection_takes_the_box_that_it_overlaps_most() -> None:
    """Loss: neighbours in a crowd are counted as mix-ups because the first box in the file is taken."""
    record = image([[0, 0, 100, 100], [10, 0, 110, 100]], [0, 1])
    result = confusion_of(index_of(record), [found([[9, 0, 109, 100], [0, 0, 100, 100]], [0.9, 0.8], [1, 0])])
    assert result.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_of_boxes_in_the_same_place_each_class_gets_its_own() -> None:
    """Loss: a perfect detector is accused of mix-ups where two classes share a box."""
    record = image([[0, 0, 50, 50], [0, 0, 50, 50]], [0, 1])
    result = confusion_of(index_of(record), [found([[0, 0, 50, 50], [0, 0, 50, 50]], [0.9, 0.9], [1, 0])])
    assert result.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_what_lies_in_a_crowd_region_of_its_class_is_ignored() -> None:
    """Loss: people found in a crowd are inventions; or dogs in a crowd of people are not."""
    record = image([[0, 0, 50, 50], [100, 100, 200, 200]], [0, 0], [False, True])
    boxes: Boxes = [[0, 0, 50, 50], [110, 110, 130, 130], [110, 110, 130, 130], [60, 60, 110, 110]]
    result = confusion_of(index_of(record), [found(boxes, [0.9, 0.8, 0.7, 0.6], [0, 0, 1, 0])])
    assert result.matrix.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_an_overlap_of_exactly_the_threshold_counts() -> None:
    """Loss: another rule at the border than COCO's, which counts it."""
    assert overlap(np.array([[0.0, 0, 10, 10]]), np.array([[0.0, 0, 10, 20]])).tolist() == [[0.5]]
    assert match(np.array([[0.5]]), np.array([[True]]), 0.5).tolist() == [0]
    assert match(np.array([[0.499]]), np.array([[True]]), 0.5).tolist() == [-1]


def test_worst_and_best_images_are_those() -> None:
    """Loss: somebody looks at the wrong images and mends what is right."""
    records = [image([[0, 0, 50, 50]], [0], number=number) for number in (1, 2, 3)] + [image([], [], number=4)]
    right, wrong = [[0.0, 0, 50, 50]], [[100.0, 100, 150, 150]]
    found_in = [found(right, [0.9], [0], 1), found(right + wrong, [0.9, 0.8], [0, 0], 2), found(wrong * 2, [0.9, 0.8], [0, 1], 3)]
    result = confusion_of(index_of(*records), found_in)
    assert [one.image_id for one in result.worst(9)] == [3, 2], "an image without fault is not among the worst"
    assert [one.image_id for one in result.best(9)] == [1, 2], "an empty image is no success"
    assert [one.score for one in result.images] == pytest.approx([1.0, 2 / 3, 0.0, 1.0])


def test_an_image_without_an_entry_is_one_in_which_nothing_was_found() -> None:
    """Loss: boxes that drop out of the sums."""
    assert confusion_of(index_of(image([[0, 0, 9, 9]], [1])), []).matrix.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


corner = st.integers(0, 60)
side = st.integers(1, 60)
rectangle = st.tuples(corner, corner, side, side).map(lambda one: [float(v) for v in (one[0], one[1], one[0] + one[2], one[1] + one[3])])
truth = st.lists(st.tuples(rectangle, st.integers(0, 1), st.booleans()), max_size=6)
detected = st.lists(st.tuples(rectangle, st.integers(0, 1), st.sampled_from([0.1, 0.25, 0.5, 0.9])), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(truth, detected), min_size=1, max_size=3))
def test_sums_are_the_numbers_of_boxes_and_detections(
    images: list[tuple[list[tuple[Boxes, int, bool]], list[tuple[Boxes, int, float]]]],
) -> None:
    """Loss: a box that is counted twice, or not at all."""
    records = [
        image([box for box, _, _ in boxes], [c for _, c, _ in boxes], [crowd for _, _, crowd in boxes], number)  # type: ignore[misc]
        for number, (boxes, _) in enumerate(images, start=1)
    ]
    detections = [
        found([box for box, _, _ in one], [score for _, _, score in one], [c for _, c, _ in one], number)  # type: ignore[misc]
        for number, (_, one) in enumerate(images, start=1)
    ]
    index = index_of(*records)
    result = confusion_of(index, detections)
    assert result.matrix[:2].sum(axis=1).tolist() == index.images.class_counts(2).tolist()
    counted = [sum(c == place and score >= 0.25 for _, one in images for _, c, score in one) for place in (0, 1)]
    assert all(result.matrix[:, :2].sum(axis=0) <= counted), "what is ignored is missing, and nothing else is added"
    if not any(crowd for boxes, _ in images for _, _, crowd in boxes):
        assert result.matrix[:, :2].sum(axis=0).tolist() == counted
    assert result.matrix[2, 2] == 0
    assert sum(one.right for one in result.images) == np.trace(result.matrix)
