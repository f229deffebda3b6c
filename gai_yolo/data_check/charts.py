"""Statistics of a data set as pictures: classes, boxes, images; train and val side by side.

What a histogram shows are shares of a split, so that a large one and a small one can be compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.formats.check import Split
from gai_yolo.data.index import Index
from gai_yolo.data_check.report import Report, box_array
from gai_yolo.data_check.tables import num_boxes, shortened
from gai_yolo.reporting.canvas import FAINT, GAP, INK, PANEL, SMALL_TEXT, SPLIT_COLOURS, TEXT, TITLE, Canvas, text_width
from gai_yolo.reporting.drawing import Image, class_colour, in_ascii
from gai_yolo.reporting.plots import density

CLASSES_WIDTH, NAMES_WIDTH, NUMBERS_WIDTH, BAR = 1100, 240, 90, 15
"""Of the class histogram: its width, that of the names and of the numbers behind the bars, and the height of a bar, in pixels."""
PLOT_WIDTH, HEIGHT = 560, 320
"""Of a plot with its title, in pixels."""
PLOT_HEAD, FOOT, SIDE = 34, 26, 16
"""Around what is plotted: room for the title, for numbers, and at the sides."""
LEAST_CELLS, MOST_CELLS = 12, 64
"""Of a heat map, to each side; the more, the more points there are."""
MOST_ROWS = 8
"""Of a list of bars."""
MOST_COUNTS = 40
"""Bars of a histogram of counts."""

Values = NDArray[np.float64]
BySplit = Mapping[Split, Values]
Bins = tuple[Values, list[tuple[float, str]]]
"""How values are sorted into bars: (bars + 1,) ascending edges, of which a bar holds its lower one; numbers below the axis, and the edges
at which they stand."""


def class_chart(report: Report) -> Image:
    """Boxes of each class in both splits; of very many classes the most frequent and the rarest. (H, W, 3) RGB."""
    rows = shortened(report.classes)
    row, top = 2 * BAR + 10, 3 * GAP + TITLE
    canvas = Canvas(CLASSES_WIDTH, top + row * len(rows) + GAP)
    canvas.text(GAP, GAP, f"boxes of {len(report.classes)} classes", TITLE)
    _name_splits(canvas, list(report.splits))
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
    """Sizes, shapes and places of boxes. (H, W, 3) RGB."""
    boxes = {split: box_array(index).astype(np.float64) for split, index in indexes.items()}
    sides = {split: array[:, 2:] - array[:, :2] for split, array in boxes.items()}
    lengths = {split: np.sqrt(side.prod(axis=1)) for split, side in sides.items()}
    aspects = {split: side[:, 0] / side[:, 1] for split, side in sides.items()}
    fractions = np.concatenate([_fractions(index) for index in indexes.values()])
    centres, extents = (fractions[:, :2] + fractions[:, 2:]) / 2, fractions[:, 2:] - fractions[:, :2]
    canvas = _page("boxes", list(indexes))
    borders = {32.0: "from 32: medium", 96.0: "from 96: large"}
    _histogram(canvas, 0, "square root of a box's width x height, pixels", lengths, _powers(lengths, 4), borders)
    _histogram(canvas, 1, "width / height of a box", aspects, _powers(aspects, 4))
    _heat_map(canvas, 2, "size of boxes, as fractions of the image", extents, ("width", "height"), from_top=False)
    _heat_map(canvas, 3, "centres of boxes in the image", centres, ("", ""), from_top=True)
    return canvas.array()


def image_chart(indexes: Mapping[Split, Index]) -> Image:
    """Sizes and shapes of images, and how many boxes they have. (H, W, 3) RGB."""
    sizes = {split: np.array([(image.width, image.height) for image in index.images], dtype=float) for split, index in indexes.items()}
    longer = {split: size.max(axis=1) for split, size in sizes.items()}
    aspects = {split: size[:, 0] / size[:, 1] for split, size in sizes.items()}
    counts = {split: np.array([(~image.crowd).sum() for image in index.images], float) for split, index in indexes.items()}
    named = {split: Counter(f"{image.width} x {image.height}" for image in index.images) for split, index in indexes.items()}
    canvas = _page("images", list(indexes))
    _ranking(canvas, 0, "images of the most frequent sizes, pixels", named)
    _histogram(canvas, 1, "longer side of an image, pixels", longer, _powers(longer, 8))
    _histogram(canvas, 2, "width / height of an image", aspects, _powers(aspects, 8))
    _histogram(canvas, 3, "boxes of an image", counts, _counting(counts))
    return canvas.array()


def _fractions(index: Index) -> Values:
    """(N, 4) boxes of a split, xyxy as fractions of their images' sides."""
    sides = [(image.width, image.height) * 2 for image in index.images for is_crowd in image.crowd if not is_crowd]
    return box_array(index).astype(np.float64) / np.array(sides, dtype=np.float64).reshape(-1, 4)


def _powers(values: BySplit, bars: int) -> Bins:
    """Bars of equal ratio, so many from one power of two to the next; for positive values."""
    everything = np.concatenate(list(values.values()))
    low, high = (0, 1) if not len(everything) else (math.floor(math.log2(everything.min())), math.floor(math.log2(everything.max())) + 1)
    edges = 2.0 ** (np.arange(bars * (high - low) + 1) / bars + low)
    return edges, [(2.0**power, f"{2.0**power:.3g}" if power < 10 else str(2**power)) for power in range(low, high + 1)]


def _counting(values: BySplit) -> Bins:
    """A bar for each whole number from 0, or for several if there are many."""
    most = int(max((array.max() for array in values.values() if len(array)), default=0))
    step = -(-(most + 1) // MOST_COUNTS)
    edges = np.arange(0, most + step + 1, step, dtype=np.float64)
    return edges, [(edge, f"{edge:.0f}") for edge in edges[:-1]]


def _page(title: str, splits: Sequence[str]) -> Canvas:
    """A picture with room for four plots."""
    canvas = Canvas(2 * PLOT_WIDTH + 3 * GAP, 2 * GAP + TITLE + 2 * (HEIGHT + GAP))
    canvas.text(GAP, GAP, title, TITLE)
    _name_splits(canvas, splits)
    return canvas


def _name_splits(canvas: Canvas, splits: Sequence[str]) -> None:
    """Say in the upper right corner which colour is which split's."""
    x = canvas.image.width - GAP
    for split in reversed(splits):
        x -= round(text_width(split, TEXT))
        canvas.text(x, GAP, split)
        canvas.draw.rectangle((x - 20, GAP + 2, x - 6, GAP + 14), fill=SPLIT_COLOURS[split])
        x -= 40


def _histogram(canvas: Canvas, place: int, title: str, values: BySplit, bins: Bins, lines: Mapping[float, str] | None = None) -> None:
    """Draw shares of splits side by side.

    Args:
        place: 0 to 3 on the page.
        values: (N,) of each split, all between the first and the last edge.
        lines: values that are marked, and the words beside them.
    """
    left, top, right, bottom = _frame(canvas, place, title)
    edges, ticks = bins
    bars = len(edges) - 1
    wide = (right - left) / bars
    shares = {split: np.histogram(array, edges)[0] / max(1, len(array)) for split, array in values.items()}
    most = max(1e-9, *(float(share.max()) for share in shares.values()))

    def x_of(value: float) -> float:
        return left + wide * float(np.interp(value, edges, np.arange(bars + 1)))

    thick = wide * 0.9 / len(shares)
    for number, (split, share) in enumerate(shares.items()):
        for bar in np.flatnonzero(share).tolist():
            x = left + wide * (bar + 0.05) + number * thick
            height = max(1.0, (bottom - top) * share[bar] / most)
            canvas.draw.rectangle((x, bottom - height, x + max(thick - 1, 1), bottom), fill=SPLIT_COLOURS[split])
    for value, words in (lines or {}).items():
        if edges[0] < value < edges[-1]:
            canvas.draw.line((x_of(value), top, x_of(value), bottom), fill=FAINT)
            canvas.text(x_of(value), top - 16, words, SMALL_TEXT, FAINT, anchor="ma")
    canvas.draw.line((left, bottom, right, bottom), fill=FAINT)
    canvas.text(right, top - PLOT_HEAD, f"highest: {100 * most:.3g} %", SMALL_TEXT, FAINT, anchor="ra")
    taken = -math.inf
    for value, words in ticks:
        x, half = x_of(value), text_width(words, SMALL_TEXT) / 2
        if x - half > max(taken + 6, left - SIDE) and x + half <= right + SIDE:
            canvas.draw.line((x, bottom, x, bottom + 4), fill=FAINT)
            canvas.text(x, bottom + 6, words, SMALL_TEXT, FAINT, anchor="ma")
            taken = x + half


def _ranking(canvas: Canvas, place: int, title: str, counts: Mapping[Split, Mapping[str, int]]) -> None:
    """Draw a list of bars: how often each split has something, the most frequent first.

    Args:
        counts: for each split, how often it has what.
    """
    left, top, right, bottom = _frame(canvas, place, title)
    total = sum((Counter(of_split) for of_split in counts.values()), Counter[str]())
    names = [name for name, _ in total.most_common()]
    if len(names) > MOST_ROWS:
        canvas.text(right, top - PLOT_HEAD, f"{MOST_ROWS} of {len(names)}", SMALL_TEXT, FAINT, anchor="ra")
    start, thick = left + 110, (bottom - top) / MOST_ROWS / (len(counts) + 0.6)
    most = max((of_split.get(name, 0) for of_split in counts.values() for name in names), default=1)
    for row, name in enumerate(names[:MOST_ROWS]):
        upper = top + row * (bottom - top) / MOST_ROWS
        canvas.text(left, upper + thick * len(counts) / 2, name, width=100, anchor="lm")
        for number, (split, of_split) in enumerate(counts.items()):
            count, y = of_split.get(name, 0), upper + number * thick
            length = count / most * (right - start - 60)
            if count:
                canvas.draw.rectangle((start, y, start + max(length, 1), y + thick - 2), fill=SPLIT_COLOURS[split])
            canvas.text(start + length + 6, y + thick / 2 - 1, str(count), SMALL_TEXT, FAINT, anchor="lm")


def _heat_map(canvas: Canvas, place: int, title: str, points: Values, axes: tuple[str, str], from_top: bool) -> None:
    """Draw where most of some points are, the denser the brighter.

    Args:
        points: (N, 2) x and y, from 0 to 1.
        axes: what they are; empty if there is nothing to say.
        from_top: y grows downwards, as in an image.
    """
    left, top, right, bottom = _frame(canvas, place, title)
    cells = int(np.clip(np.sqrt(len(points)) / 2, LEAST_CELLS, MOST_CELLS))
    side = int(bottom - top)
    counts = np.histogram2d(points[:, 1], points[:, 0], bins=cells, range=[[0, 1], [0, 1]])[0]
    x = round((left + right - side) / 2)
    density(canvas, (x, round(top), x + side, round(top) + side), counts[:: 1 if from_top else -1])
    for number, words in enumerate(("0", axes[0], "1")):
        canvas.text(x + side * number / 2, bottom + 6, words, SMALL_TEXT, FAINT, anchor="ma")
    for number, words in enumerate(("0", axes[1], "1")):
        y = top + side * number / 2 if from_top else bottom - side * number / 2
        canvas.text(x - 8, y, words, SMALL_TEXT, FAINT, anchor="rm")


def _frame(canvas: Canvas, place: int, title: str) -> tuple[float, float, float, float]:
    """Draw the ground of a plot; returns where in it (xyxy) the values go."""
    left, top = GAP + place % 2 * (PLOT_WIDTH + GAP), 2 * GAP + TITLE + place // 2 * (HEIGHT + GAP)
    canvas.draw.rectangle((left, top, left + PLOT_WIDTH, top + HEIGHT), fill=PANEL)
    canvas.text(left + SIDE, top + 8, title, TEXT, INK)
    return (left + SIDE, top + PLOT_HEAD + 8, left + PLOT_WIDTH - SIDE, top + HEIGHT - FOOT)
