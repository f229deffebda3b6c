"""Boxes follow the pixels through every random change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gai_yolo.data.augment import Sample, letterbox, mixup, mosaic, random_affine, random_flip, random_hsv
from gai_yolo.data.images import GREY
from gai_yolo.sections import AugmentConfig

SIZE = 96
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], dtype=np.uint8)
"""Of the rectangle of each class."""
NEAR = 1.5
"""Pixels by which a box may differ from what is seen: edges are blurred by a resize."""


def rectangle(rng: np.random.Generator, class_id: int, height: int, width: int) -> Sample:
    """A black image with one rectangle, filled with the colour of its class, and its box."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    x1, y1 = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
    x2, y2 = int(rng.integers(x1 + 8, width + 1)), int(rng.integers(y1 + 8, height + 1))
    image[y1:y2, x1:x2] = COLOURS[class_id]
    return Sample(image, np.array([[x1, y1, x2, y2]], dtype=np.float32), np.array([class_id], dtype=np.int64))


def tiles(rng: np.random.Generator) -> list[Sample]:
    """Four images of different shapes, each with another class."""
    shapes = rng.integers(SIZE // 3, SIZE + 1, (4, 2))
    return [rectangle(rng, class_id, int(h), int(w)) for class_id, (h, w) in enumerate(shapes)]


def seen_box(image: NDArray[np.uint8], class_id: int) -> NDArray[np.float64] | None:
    """The box around the pixels that look more like the colour of a class than like anything else; None without any."""
    others = np.concatenate((np.delete(COLOURS, class_id, axis=0), np.array([(0, 0, 0), (GREY, GREY, GREY)], dtype=np.uint8)))

    def distance(colour: NDArray[np.uint8]) -> NDArray[np.int16]:
        return np.asarray(np.abs(image.astype(np.int16) - colour).sum(axis=-1), dtype=np.int16)

    own = distance(COLOURS[class_id])
    rows, columns = np.nonzero(np.logical_and.reduce([own < distance(colour) for colour in others]))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64) if len(rows) else None


def check_boxes(sample: Sample) -> int:
    """Every box lies where its colour is seen, and a colour without a box is too small to be one; returns the boxes checked."""
    height, width = sample.image.shape[:2]
    assert sample.boxes.dtype == np.float32
    assert (sample.boxes >= 0).all()
    assert (sample.boxes <= [width, height, width, height]).all()
    assert len(sample.boxes) == len(sample.classes) == len(set(sample.classes.tolist()))
    for box, class_id in zip(sample.boxes, sample.classes.tolist(), strict=True):
        seen = seen_box(sample.image, class_id)
        assert seen is not None, f"class {class_id} has the box {box}, but is not in the picture"
        assert np.abs(box - seen).max() <= NEAR, (class_id, box, seen)
    return len(sample.boxes)


def changes() -> list[tuple[str, Callable[[np.random.Generator], Sample]]]:
    config = AugmentConfig(flip=0.5, flip_vertical=0.5)

    def whole(rng: np.random.Generator) -> Sample:
        return random_flip(random_affine(mosaic(tiles(rng), SIZE, rng), SIZE, 0.5, 0.1, rng), config, rng)

    return [
        ("letterbox wide", lambda rng: letterbox(rectangle(rng, 0, 41, SIZE), SIZE)[0]),
        ("letterbox tall", lambda rng: letterbox(rectangle(rng, 1, SIZE, 40), SIZE)[0]),
        ("mosaic", lambda rng: mosaic(tiles(rng), SIZE, rng)),
        ("affine", lambda rng: random_affine(letterbox(rectangle(rng, 2, 60, SIZE), SIZE)[0], SIZE, 0.5, 0.2, rng)),
        ("flip", lambda rng: random_flip(rectangle(rng, 3, 50, 70), config, rng)),
        ("all", whole),
    ]


@pytest.mark.parametrize(("name", "change"), changes())
def test_boxes_follow_the_pixels(name: str, change: Callable[[np.random.Generator], Sample]) -> None:
    """Loss: a detector trained on boxes that lie beside their objects."""
    checked = sum(check_boxes(change(np.random.default_rng(seed))) for seed in range(60))
    assert checked >= 40, f"{name}: hardly any box was left to check"


def test_no_object_that_stays_in_sight_loses_its_box() -> None:
    """Loss: visible objects trained as background."""
    without_box = small = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        parts = tiles(rng)
        canvas = mosaic(parts, SIZE, rng)
        for class_id in set(range(4)) - set(canvas.classes.tolist()):
            assert seen_box(canvas.image, class_id) is None, seed
            without_box += 1
        result = random_affine(canvas, SIZE, 0.5, 0.1, rng)
        for class_id in set(canvas.classes.tolist()) - set(result.classes.tolist()):
            seen = seen_box(result.image, class_id)
            if seen is not None:
                sides = np.sort(seen[2:] - seen[:2])
                whole = canvas.boxes[canvas.classes.tolist().index(class_id)]
                # 2 px on the short side, or 10 % of the area (at most zoomed 1.5 times), with the blur of an edge.
                tenth = 0.1 * 1.5**2 * float((whole[2] - whole[0]) * (whole[3] - whole[1]))
                assert sides[0] <= 2 + NEAR or (sides - NEAR).prod() <= tenth, (seed, class_id, seen)
                small += 1
    assert without_box >= 5 and small >= 5, "there was something to look at"


@pytest.mark.parametrize("seed", range(40))
def test_zoom_is_exact_to_a_tenth_of_a_pixel(seed: int) -> None:
    """Loss: a shift of a quarter pixel that grows with the zoom, a systematic error at the highest IoU thresholds."""
    image = np.full((SIZE, SIZE, 3), GREY, dtype=np.uint8)  # like what surrounds it, so that only the rectangle has edges
    image[36:60, 30:70, 0] = 255
    sample = Sample(image, np.array([[30, 36, 70, 60]], dtype=np.float32), np.zeros(1, dtype=np.int64))
    result = random_affine(sample, SIZE, 0.25, 0.02, np.random.default_rng(seed))
    mass = result.image[..., 0].astype(np.float64) - GREY
    centre = [np.average(np.arange(SIZE) + 0.5, weights=mass.sum(axis=axis)) for axis in (0, 1)]
    expected = (result.boxes[0, :2] + result.boxes[0, 2:]) / 2
    assert np.abs(centre - expected).max() < 0.1


def test_affine_reaches_its_limits_and_not_beyond() -> None:
    """Loss: a zoom or shift that is much smaller, or larger, than configured."""
    box = np.array([[40, 40, 56, 56]], dtype=np.float32)
    sample = Sample(np.zeros((SIZE, SIZE, 3), dtype=np.uint8), box, np.zeros(1, dtype=np.int64))
    rows = np.concatenate([random_affine(sample, SIZE, 0.5, 0.1, np.random.default_rng(seed)).boxes for seed in range(400)])
    zooms, centres = (rows[:, 2] - rows[:, 0]) / 16, (rows[:, :2] + rows[:, 2:]) / 2 / SIZE
    assert 0.5 <= zooms.min() < 0.53
    assert 1.47 < zooms.max() <= 1.5001
    assert (centres.min(axis=0) >= 0.3999).all() and (centres.min(axis=0) < 0.42).all()
    assert (centres.max(axis=0) <= 0.6001).all() and (centres.max(axis=0) > 0.58).all()


def test_affine_without_scale_and_shift_changes_nothing() -> None:
    """Loss: pictures blurred once more for nothing."""
    sample = letterbox(rectangle(np.random.default_rng(0), 0, 50, SIZE), SIZE)[0]
    result = random_affine(sample, SIZE, 0.0, 0.0, np.random.default_rng(0))
    assert np.array_equal(result.image, sample.image)
    assert np.array_equal(result.boxes, sample.boxes)


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        pytest.param([10, 10, 12, 60], False, id="2 px wide"),
        pytest.param([10, 10, 12.5, 60], True, id="2.5 px wide"),
        pytest.param([10, 10, 60, 12], False, id="2 px high"),
        pytest.param([10, 10, 60, 12.5], True, id="2.5 px high"),
        pytest.param([0, 10, 250, 12.4], False, id="aspect 104"),
        pytest.param([0, 10, 250, 12.6], True, id="aspect 96"),
        pytest.param([10, 0, 12.4, 250], False, id="aspect 1:104"),
        pytest.param([-91, 10, 9, 110], False, id="9 percent inside"),
        pytest.param([-89, 10, 11, 110], True, id="11 percent inside"),
        pytest.param([245, 245, 345, 345], False, id="1 percent inside at a corner"),
        pytest.param([300, 10, 330, 40], False, id="outside"),
    ],
)
def test_boxes_are_kept_by_the_published_rules(box: list[float], kept: bool) -> None:
    """Loss: slivers trained as objects, or good boxes thrown away."""
    boxes = np.array([box, [100, 100, 150, 150]], dtype=np.float32)
    sample = Sample(np.zeros((256, 256, 3), dtype=np.uint8), boxes, np.array([1, 2]))
    result = random_affine(sample, 256, 0.0, 0.0, np.random.default_rng(0))
    assert result.classes.tolist() == ([1, 2] if kept else [2]), "and classes go with their boxes"
    assert np.array_equal(result.boxes, boxes.clip(0, 256)[[0, 1] if kept else [1]])


@pytest.mark.parametrize(("height", "width", "left", "top"), [(50, 96, 0, 23), (96, 51, 22, 0), (96, 96, 0, 0), (1, 96, 0, 47)])
def test_letterbox_centres_on_grey(height: int, width: int, left: int, top: int) -> None:
    """Loss: padding that is not where evaluation takes it off again."""
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    sample, *padding = letterbox(Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), 96)
    assert padding == [left, top]
    assert np.array_equal(sample.image[top : top + height, left : left + width], image)
    assert (sample.image == 255).sum() == image.size
    assert ((sample.image == 255) | (sample.image == GREY)).all()


def test_mosaic_shows_all_four_images_around_a_point_of_the_middle() -> None:
    """Loss: mosaics that show one image only, so that the set shrinks to a quarter."""
    flat = [Sample(np.full((SIZE, SIZE, 3), colour, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) for colour in COLOURS]
    centres = []
    for seed in range(40):
        result = mosaic(flat, SIZE, np.random.default_rng(seed))
        assert result.image.shape == (2 * SIZE, 2 * SIZE, 3)
        boxes = [seen_box(result.image, class_id) for class_id in range(4)]
        first, last = boxes[0], boxes[3]
        assert first is not None and last is not None
        assert np.array_equal(first[2:], last[:2]), "top left and bottom right touch in the centre"
        assert boxes[1] is not None and boxes[2] is not None
        assert boxes[1][0] == boxes[2][2] == first[2] and boxes[1][3] == boxes[2][1] == first[3]
        centres.append(first[2:] / SIZE)
    spread = np.array(centres)
    assert spread.min() >= 0.49 and spread.max() <= 1.5
    assert (spread.min(axis=0) < 0.6).all() and (spread.max(axis=0) > 1.4).all()


def test_mixup_keeps_the_boxes_of_both_and_blends_the_pixels() -> None:
    """Loss: half of what is seen is trained as background."""
    a, b = rectangle(np.random.default_rng(0), 0, 64, 64), rectangle(np.random.default_rng(1), 1, 64, 64)
    for seed in range(20):
        result = mixup(a, b, np.random.default_rng(seed))
        assert np.array_equal(result.boxes, np.concatenate((a.boxes, b.boxes)))
        assert result.classes.tolist() == [0, 1]
        weight = result.image[..., 0].max() / 255
        assert 0.2 < weight < 0.8, "Beta(32, 32) is near one half"
        blend = weight * a.image.astype(float) + (1 - weight) * b.image
        assert np.abs(result.image - blend).max() <= 1.5


def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def test_hsv_without_gains_is_the_identity() -> None:
    """Loss: a conversion to HSV and back that changes every image although it was switched off."""
    image = picture()
    for seed in range(5):
        result = random_hsv(image, AugmentConfig(hsv_h=0.0, hsv_s=0.0, hsv_v=0.0), np.random.default_rng(seed))
        assert np.array_equal(result, image)


def test_each_hsv_gain_changes_its_own_part_only() -> None:
    """Loss: hue shifts that darken, or brightness that runs over and turns white to black."""
    image, grey = picture(), np.full((8, 8, 3), 200, dtype=np.uint8)

    def changed(pixels: NDArray[np.uint8], seed: int, **gains: float) -> NDArray[np.int64]:
        config = AugmentConfig.model_validate({"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, **gains})
        return random_hsv(pixels, config, np.random.default_rng(seed)).astype(np.int64)

    brightness = []
    for seed in range(30):
        hue, saturation = changed(image, seed, hsv_h=0.5), changed(image, seed, hsv_s=0.9)
        assert np.abs(hue.max(axis=-1) - image.max(axis=-1)).max() <= 1, "the hue leaves the brightness"
        assert np.abs(saturation.max(axis=-1) - image.max(axis=-1)).max() <= 1
        assert not np.array_equal(hue, image) and not np.array_equal(saturation, image)
        assert np.array_equal(changed(grey, seed, hsv_h=0.5), grey), "grey has no hue"
        brightness.append(changed(grey, seed, hsv_v=0.4)[0, 0])
    levels = np.array(brightness)
    assert (levels == levels[:, :1]).all(), "grey stays grey"
    assert 119 <= levels.min() < 150 and levels.max() == 255, "between 0.6 and 1.4 times, at most 255"


@pytest.mark.parametrize(("horizontal", "vertical"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips_do_what_their_probability_says(horizontal: float, vertical: float) -> None:
    """Loss: pictures upside down where nobody asked for it."""
    config = AugmentConfig(flip=horizontal, flip_vertical=vertical)
    sample = Sample(picture(), np.array([[1, 2, 11, 5], [0, 0, 40, 32]], dtype=np.float32), np.array([0, 1]))
    x1, y1 = (29 if horizontal else 1), (27 if vertical else 2)
    for seed in range(10):
        result = random_flip(sample, config, np.random.default_rng(seed))
        pixels = sample.image[:, ::-1] if horizontal else sample.image
        assert np.array_equal(result.image, pixels[::-1] if vertical else pixels)
        assert result.boxes.tolist() == [[x1, y1, x1 + 10, y1 + 3], [0, 0, 40, 32]]


def test_flip_probability_is_the_configured_one() -> None:
    """Loss: a coin that always falls on one side."""
    sample = Sample(picture(), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    results = [random_flip(sample, AugmentConfig(flip=0.25), np.random.default_rng(seed)).image for seed in range(400)]
    assert 70 < sum(not np.array_equal(image, sample.image) for image in results) < 130


def operations() -> list[Callable[[np.random.Generator], tuple[Any, ...]]]:
    parts, config = tiles(np.random.default_rng(9)), AugmentConfig(flip_vertical=0.5)
    square = [letterbox(part, SIZE)[0] for part in parts]

    def plain(sample: Sample) -> tuple[Any, ...]:
        return sample.image, sample.boxes, sample.classes

    return [
        lambda rng: plain(mosaic(parts, SIZE, rng)),
        lambda rng: plain(random_affine(square[0], SIZE, 0.5, 0.1, rng)),
        lambda rng: plain(mixup(square[0], square[1], rng)),
        lambda rng: plain(random_flip(square[0], config, rng)),
        lambda rng: (random_hsv(parts[0].image, config, rng),),
    ]


@pytest.mark.parametrize("operation", operations(), ids=["mosaic", "affine", "mixup", "flip", "hsv"])
def test_every_change_is_decided_by_its_generator_alone(operation: Callable[[np.random.Generator], Sequence[Any]]) -> None:
    """Loss: a resumed run augments otherwise than the uninterrupted one, or every sample is augmented alike."""
    results = []
    for seed in range(10):
        np.random.seed(seed + 77)  # the global generator has no say
        first, second = operation(np.random.default_rng(seed)), operation(np.random.default_rng(seed))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        results.append(first[0].tobytes())
    assert len(set(results)) > 1


def test_inputs_are_not_written_to() -> None:
    """Loss: images cached in memory are augmented once more every epoch."""
    parts = tiles(np.random.default_rng(3))
    square, config = letterbox(parts[0], SIZE)[0], AugmentConfig(flip=1.0, flip_vertical=1.0)
    given = [array for sample in (*parts, square) for array in (sample.image, sample.boxes, sample.classes)]
    before = [array.copy() for array in given]
    for array in given:
        array.flags.writeable = False
    rng = np.random.default_rng(0)
    random_affine(mosaic(parts, SIZE, rng), SIZE, 0.5, 0.1, rng)
    mixup(random_flip(square, config, rng), square, rng)
    changed = random_hsv(square.image, AugmentConfig(hsv_h=0.5, hsv_s=0.9, hsv_v=0.9), rng)
    assert not np.array_equal(changed, square.image)
    assert all(np.array_equal(array, one) for array, one in zip(given, before, strict=True)), "nor by a library that heeds no flag"
