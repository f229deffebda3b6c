"""Histograms and heat maps on a canvas. What is drawn are shares of a split, so that a large one and a small one can be compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gai_yolo.data.formats.check import Split
from gai_yolo.data_check.canvas import FAINT, GAP, INK, PANEL, SMALL_TEXT, SPLIT_COLOURS, TEXT, TITLE, Canvas, text_width

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


def powers(values: BySplit, bars: int) -> Bins:
    """Bars of equal ratio, so many from one power of two to the next; for positive values."""
    everything = np.concatenate(list(values.values()))
    low, high = (0, 1) if not len(everything) else (math.floor(math.log2(everything.min())), math.floor(math.log2(everything.max())) + 1)
    edges = 2.0 ** (np.arange(bars * (high - low) + 1) / bars + low)
    return edges, [(2.0**power, f"{2.0**power:.3g}" if power < 10 else str(2**power)) for power in range(low, high + 1)]


def counting(values: BySplit) -> Bins:
    """A bar for each whole number from 0, or for several if there are many."""
    most = int(max((array.max() for array in values.values() if len(array)), default=0))
    step = -(-(most + 1) // MOST_COUNTS)
    edges = np.arange(0, most + step + 1, step, dtype=np.float64)
    return edges, [(edge, f"{edge:.0f}") for edge in edges[:-1]]


def page(title: str, splits: Sequence[str]) -> Canvas:
    """A picture with room for four plots."""
    canvas = Canvas(2 * PLOT_WIDTH + 3 * GAP, 2 * GAP + TITLE + 2 * (HEIGHT + GAP))
    canvas.text(GAP, GAP, title, TITLE)
    name_splits(canvas, splits)
    return canvas


def name_splits(canvas: Canvas, splits: Sequence[str]) -> None:
    """Say in the upper right corner which colour is which split's."""
    x = canvas.image.width - GAP
    for split in reversed(splits):
        x -= round(text_width(split, TEXT))
        canvas.text(x, GAP, split)
        canvas.draw.rectangle((x - 20, GAP + 2, x - 6, GAP + 14), fill=SPLIT_COLOURS[split])
        x -= 40


def histogram(canvas: Canvas, place: int, title: str, values: BySplit, bins: Bins, lines: Mapping[float, str] | None = None) -> None:
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


def ranking(canvas: Canvas, place: int, title: str, counts: Mapping[Split, Mapping[str, int]]) -> None:
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


def heat_map(canvas: Canvas, place: int, title: str, points: Values, axes: tuple[str, str], from_top: bool) -> None:
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
    heat = np.sqrt(counts / max(1.0, counts.max()))[:: 1 if from_top else -1, :, None]  # the root shows few beside many
    colours = np.array([[24, 26, 30], [70, 50, 140], [220, 80, 90], [255, 230, 130]], dtype=np.float64)
    pixels = np.stack([np.interp(heat[..., 0], np.linspace(0, 1, 4), colours[:, channel]) for channel in range(3)], axis=-1)
    picture = Image.fromarray(pixels.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    x = round((left + right - side) / 2)
    canvas.image.paste(picture, (x, round(top)))
    canvas.draw.rectangle((x - 1, top - 1, x + side, top + side), outline=FAINT)
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
