"""Labels of boxes: beside each other, in the picture, near their box."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.reporting.drawing import FIRST_COLOURS, class_colour, draw_detections
from gai_yolo.reporting.placing import MOST_COVERED, place_labels


def places(corners: list[list[int]], size: tuple[int, int], width: int = 640, height: int = 480) -> list[tuple[int, int] | None]:
    """Of labels of one size."""
    return place_labels(np.array(corners).reshape(-1, 4), np.array([size] * len(corners)).reshape(-1, 2), width, height)


def test_labels_of_boxes_at_one_place_do_not_cover_each_other() -> None:
    """Loss: one object that is found as five classes, of which one can be read."""
    found = places([[200, 200, 300, 260]] * 5, (80, 16))
    assert None not in found
    tops = sorted(place[1] for place in found if place is not None and place[0] == 200)
    assert len(set(found)) == 5 and found[0] == (200, 184), "the first one has the best place, above its box"
    assert all(abs(top - other) >= 16 for place, top in enumerate(tops) for other in tops[:place])


def test_a_label_is_within_the_picture_wherever_the_box_is() -> None:
    """Loss: names cut off at the border of the picture, where half of the objects are."""
    found = places([[0, 0, 50, 50], [600, 0, 639, 479], [0, 470, 30, 479], [0, 0, 639, 479]], (80, 16))
    for place in found:
        assert place is not None and 0 <= place[0] <= 640 - 80 and 0 <= place[1] <= 480 - 16


def test_a_label_that_fits_nowhere_is_left_out() -> None:
    """Loss: a picture of labels, below which there may have been something."""
    assert places([[0, 0, 20, 20]], (80, 16), 60, 40) == [None]
    assert places([[0, 0, 1, 1]], (8, 16), 300, 12) == [None]
    assert places([], (1, 1)) == []


boxes = st.tuples(st.integers(0, 199), st.integers(0, 99), st.integers(0, 199), st.integers(0, 99))


@given(st.lists(st.tuples(boxes, st.tuples(st.integers(1, 60), st.integers(1, 20))), max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_two_labels_ever_overlap(rows: list[tuple[tuple[int, int, int, int], tuple[int, int]]]) -> None:
    """Loss: of two labels on each other none can be read."""
    corners = np.array([(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b, c, d), _ in rows], dtype=np.int64).reshape(-1, 4)
    sizes = np.array([size for _, size in rows], dtype=np.int64).reshape(-1, 2)
    covered = np.zeros((100, 200), dtype=np.int64)
    for place, (width, height) in zip(place_labels(corners, sizes, 200, 100), sizes.tolist(), strict=True):
        if place is not None:
            part = covered[place[1] : place[1] + height, place[0] : place[0] + width]
            assert part.shape == (height, width)
            part += 1
    assert covered.max(initial=0) <= 1
    assert covered.sum() <= MOST_COVERED * covered.size


def test_lines_and_letters_grow_with_the_picture() -> None:
    """Loss: labels that nobody can read on a photograph of 12 megapixels."""
    shares = []
    for factor in (1, 4):
        image = np.full((480 * factor, 640 * factor, 3), 128, np.uint8)
        box = np.array([[100, 100, 400, 300]], np.float32) * factor
        drawn = draw_detections(image, box, np.array([0.5], np.float32), np.array([0]), ["thing"])
        assert drawn.shape == image.shape and (image == 128).all()
        shares.append(float((drawn != image).any(axis=2).mean()))
    assert 0.5 < shares[0] / shares[1] < 2, "it would be 4 if they did not"


def test_pictures_without_room_and_boxes_that_are_no_numbers_are_drawn() -> None:
    """Loss: one strip, or one diverged network, ends a command of hours."""
    for height, width in ((1, 1), (3, 20_000), (20_000, 3), (8, 8)):
        image = np.zeros((height, width, 3), np.uint8)
        box = np.array([[0, 0, width, height], [np.nan, 0, 1, 1], [-np.inf, 0, np.inf, 1]], np.float32)
        drawn = draw_detections(image, box, np.array([0.9, 0.8, 0.7], np.float32), np.array([0, 1, 0]), ["größe", "白"])
        assert drawn.shape == image.shape and drawn.any()


def test_the_first_classes_can_be_told_apart_without_red_and_green() -> None:
    """Loss: one man in twelve sees two classes as one."""
    # Lightness and the blue-yellow axis of CIELAB, which those who confuse red and green see.
    colours = np.array([[class_colour(number) for number in range(len(FIRST_COLOURS))]], np.uint8)
    seen = cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0][:, [0, 2]]
    gaps = [float(np.linalg.norm(a - b)) for place, a in enumerate(seen) for b in seen[:place]]
    assert min(gaps) > 9
    others = np.array([[class_colour(number) for number in range(8, 80)]], np.uint8)
    lightness = cv2.cvtColor(others, cv2.COLOR_RGB2LAB)[0][:, 0].astype(int)
    assert np.mean(np.abs(np.diff(lightness)) > 20) > 0.8, "neighbours among the many differ in lightness"
