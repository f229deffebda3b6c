"""Statistics of a data set as pictures: classes, boxes, images; train and val side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from gai_yolo.data.formats.check import Split
from gai_yolo.data.index import Index
from gai_yolo.data_check.canvas import FAINT, GAP, SMALL_TEXT, SPLIT_COLOURS, TITLE, Canvas
from gai_yolo.data_check.plots import Values, counting, heat_map, histogram, name_splits, page, powers, ranking
from gai_yolo.data_check.report import Report, box_array
from gai_yolo.data_check.tables import num_boxes, shortened
from gai_yolo.reporting.drawing import Image, class_colour, in_ascii

CLASSES_WIDTH, NAMES_WIDTH, NUMBERS_WIDTH, BAR = 1100, 240, 90, 15
"""Of the class histogram: its width, that of the names and of the numbers behind the bars, and the height of a bar, in pixels."""


def class_chart(report: Report) -> Image:
    """Boxes of each class in both splits; of very many classes the most frequent and the rarest.

    Returns:
        (H, W, 3) RGB.
    """
    rows = shortened(report.classes)
    row, top = 2 * BAR + 10, 3 * GAP + TITLE
    canvas = Canvas(CLASSES_WIDTH, top + row * len(rows) + GAP)
    canvas.text(GAP, GAP, f"boxes of {len(report.classes)} classes", TITLE)
    name_splits(canvas, list(report.splits))
    most = max((num_boxes(count) for one in report.classes for count in (one.train, one.val)), default=0)
    scale = (CLASSES_WIDTH - 2 * GAP - NAMES_WIDTH - NUMBERS_WIDTH) / max(1, most)
    for number, one in enumerate(rows):
        y = top + number * row
        if isinstance(one, int):
            canvas.text(GAP + NAMES_WIDTH, y + 6, f"... {one} classes in between", colour=FAINT)
            continue
        position = report.classes.index(one)
        canvas.draw.rectangle((GAP, y + 4, GAP + 14, y + 18), fill=class_colour(position))
        canvas.text(GAP + 22, y + 3, in_ascii(one.name, position), width=NAMES_WIDTH - 34)
        for place, (split, count) in enumerate((("train", one.train), ("val", one.val))):
            upper, x = y + place * BAR, GAP + NAMES_WIDTH
            length = num_boxes(count) * scale
            if length:
                canvas.draw.rectangle((x, upper, x + max(length, 1), upper + BAR - 2), fill=SPLIT_COLOURS[split])
            canvas.text(x + length + 6, upper, "-" if count is None else str(count.boxes), SMALL_TEXT, FAINT)
    return canvas.array()


def box_chart(indexes: Mapping[Split, Index]) -> Image:
    """Sizes, shapes and places of boxes.

    Returns:
        (H, W, 3) RGB.
    """
    boxes = {split: box_array(index).astype(np.float64) for split, index in indexes.items()}
    sides = {split: array[:, 2:] - array[:, :2] for split, array in boxes.items()}
    lengths = {split: np.sqrt(side.prod(axis=1)) for split, side in sides.items()}
    aspects = {split: side[:, 0] / side[:, 1] for split, side in sides.items()}
    fractions = np.concatenate([_fractions(index) for index in indexes.values()])
    centres, extents = (fractions[:, :2] + fractions[:, 2:]) / 2, fractions[:, 2:] - fractions[:, :2]
    canvas = page("boxes", list(indexes))
    borders = {32.0: "from 32: medium", 96.0: "from 96: large"}
    histogram(canvas, 0, "square root of a box's width x height, pixels", lengths, powers(lengths, 4), borders)
    histogram(canvas, 1, "width / height of a box", aspects, powers(aspects, 4))
    heat_map(canvas, 2, "size of boxes, as fractions of the image", extents, ("width", "height"), from_top=False)
    heat_map(canvas, 3, "centres of boxes in the image", centres, ("", ""), from_top=True)
    return canvas.array()


def image_chart(indexes: Mapping[Split, Index]) -> Image:
    """Sizes and shapes of images, and how many boxes they have.

    Returns:
        (H, W, 3) RGB.
    """
    sizes = {split: np.array([(image.width, image.height) for image in index.images], dtype=float) for split, index in indexes.items()}
    longer = {split: size.max(axis=1) for split, size in sizes.items()}
    aspects = {split: size[:, 0] / size[:, 1] for split, size in sizes.items()}
    counts = {split: np.array([(~image.crowd).sum() for image in index.images], float) for split, index in indexes.items()}
    named = {split: Counter(f"{image.width} x {image.height}" for image in index.images) for split, index in indexes.items()}
    canvas = page("images", list(indexes))
    ranking(canvas, 0, "images of the most frequent sizes, pixels", named)
    histogram(canvas, 1, "longer side of an image, pixels", longer, powers(longer, 8))
    histogram(canvas, 2, "width / height of an image", aspects, powers(aspects, 8))
    histogram(canvas, 3, "boxes of an image", counts, counting(counts))
    return canvas.array()


def _fractions(index: Index) -> Values:
    """(N, 4) boxes of a split, xyxy as fractions of their images' sides."""
    sides = [(image.width, image.height) * 2 for image in index.images for is_crowd in image.crowd if not is_crowd]
    return box_array(index).astype(np.float64) / np.array(sides, dtype=np.float64).reshape(-1, 4)
