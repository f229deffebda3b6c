"""A training as pictures: what is to be learned, and how it goes, interruptions included."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.index import Index
from gai_yolo.goodput.report import Interruption
from gai_yolo.reporting.canvas import FAINT, GAP, INK, PANEL, SMALL_TEXT, TITLE, Canvas, letters, text_width
from gai_yolo.reporting.drawing import Colour, Image, class_colour, in_ascii
from gai_yolo.reporting.plots import SERIES_COLOURS, Area, Axis, Series, Values, axes, density, lines, panel

BARS_HEAD, BAR_PITCH, HEAT_SIDE = 40, (15, 26), 520
"""Pixels above the bars, of one of them at least and at most, and of a heat map's panel."""
MOST_BARS = 80
CURVES_SIDES = (640, 380)
"""Pixels of one of the four plots."""
DOTTED_POINTS = 40
"""Up to so many epochs each is a dot."""
MOST_MARKED = 60
"""Interruptions up to which each has a line; of more, a stroke at the foot."""
STOPPED: Colour = (213, 94, 0)


def labels_picture(index: Index, image_size: int) -> Image:
    """Boxes of each class, their sizes and their places. (H, W, 3) RGB.

    Args:
        image_size: side of the network's input, in whose pixels sizes are given.
    """
    records = index.images
    counts = records.class_counts(len(index.categories))
    boxes, sides = records.boxes[~records.crowd].astype(np.float64), _sides_of_boxes(index)
    extents = (boxes[:, 2:] - boxes[:, :2]) * (image_size / sides.max(axis=1, initial=1))[:, None]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / sides
    rows = _shortened(counts)
    pitch = int(np.clip((2 * HEAT_SIDE - BARS_HEAD) / max(1, len(rows)), *BAR_PITCH))
    bars_height, top = BARS_HEAD + pitch * len(rows) + GAP, 2 * GAP + TITLE
    is_short = bars_height < HEAT_SIDE  # then the bars lie above the heat maps, and not beside them
    width = 2 * HEAT_SIDE + 3 * GAP
    height = top + (bars_height + HEAT_SIDE if is_short else max(bars_height, 2 * HEAT_SIDE + GAP)) + (2 if is_short else 1) * GAP
    canvas = Canvas(width, height)
    title = f"{index.source}: {len(index)} images, {len(boxes)} boxes, {len(counts)} class{'' if len(counts) == 1 else 'es'}"
    canvas.text(GAP, GAP, letters(title), TITLE - 3, width=width - 2 * GAP)
    right = width - GAP if is_short else GAP + HEAT_SIDE
    _bars(canvas, (GAP, top, right, top + bars_height if is_short else height - GAP), rows, counts, index.class_names, pitch)
    lower = top + bars_height + GAP
    corners = ((GAP, lower), (2 * GAP + HEAT_SIDE, lower)) if is_short else ((right + GAP, top), (right + GAP, top + HEAT_SIDE + GAP))
    first, second = ((x, y, x + HEAT_SIDE, y + HEAT_SIDE) for x, y in corners)
    _sizes(canvas, first, extents, image_size)
    _centres(canvas, second, centres)
    return canvas.array()


def curves_picture(history: Sequence[Mapping[str, Any]], interruptions: Iterable[Interruption]) -> Image:
    """Losses, precision and learning rate over the epochs, with what interrupted them. (H, W, 3) RGB.

    Args:
        history: the rows of training_metrics.json, at least one.
    """
    width, height = CURVES_SIDES
    canvas = Canvas(2 * width + 3 * GAP, 2 * height + 5 * GAP + TITLE)
    stops = [_epoch_of(one, history) for one in interruptions]
    canvas.text(GAP, GAP, f"{len(history)} epoch{'' if len(history) == 1 else 's'}", TITLE)
    _say_causes(canvas, list(interruptions), canvas.image.width - GAP)
    epochs = np.array([row["epoch"] for row in history], dtype=np.float64)
    x = Axis(0, max(1.0, float(epochs[-1])), "epoch", _whole(epochs[-1]))
    plots: list[tuple[str, dict[str, str], bool]] = [
        ("loss", {"train": "train_loss", "validation": "val_loss"}, False),
        ("parts of the loss in training", {"box": "train_box", "class": "train_cls", "distribution": "train_dfl"}, False),
        ("validation", {"mAP50-95": "mAP50-95", "mAP50": "mAP50"}, True),
        ("learning rate at the end of the epoch", {"": "learning_rate"}, False),
    ]
    for number, (title, columns, is_share) in enumerate(plots):
        left, top = GAP + number % 2 * (width + GAP), 2 * GAP + TITLE + number // 2 * (height + GAP)
        rows = {name: _column(history, column) for name, column in columns.items()}
        _progress(canvas, (left, top, left + width, top + height), title, x, epochs, rows, stops, is_share)
    return canvas.array()


def _progress(
    canvas: Canvas,
    area: Area,
    title: str,
    x: Axis,
    epochs: Values,
    rows: Mapping[str, Values],
    stops: Sequence[float | None],
    is_share: bool,
) -> None:
    """One plot over the epochs."""
    inner = panel(canvas, area, title)
    everything = np.concatenate(list(rows.values()))
    highest = float(np.nanmax(everything)) if np.isfinite(everything).any() else 1.0
    y = Axis(0, 1) if is_share and highest > 0.5 else Axis(0, 1.05 * highest if highest > 0 else 1.0)
    axes(canvas, inner, x, y)
    known = [stop for stop in stops if stop is not None]
    for stop in known:
        at = inner[0] + (inner[2] - inner[0]) * min(1.0, stop / x.high)
        canvas.draw.line((at, inner[1] if len(known) <= MOST_MARKED else inner[3] - 14, at, inner[3]), fill=STOPPED)
    series, right = [], area[2] - 14
    for (name, values), colour in zip(reversed([*rows.items()]), SERIES_COLOURS[: len(rows)][::-1], strict=True):
        present = np.isfinite(values)  # not every epoch is evaluated: the line goes on to the next one that is
        dots = int(present.sum()) <= DOTTED_POINTS
        series.append(Series(epochs[present], values[present], colour, dots=dots))
        newest = f"{name} {values[present][-1]:.4g}" if present.any() else f"{name} -"
        right -= text_width(newest, SMALL_TEXT)
        canvas.text(right, area[1] + 12, newest, SMALL_TEXT)
        canvas.draw.line((right - 20, area[1] + 19, right - 6, area[1] + 19), fill=colour, width=3)
        right -= 36
    lines(canvas, inner, x, y, series)


def _say_causes(canvas: Canvas, interruptions: Sequence[Interruption], right: float) -> None:
    """What the marks are, in the upper right corner."""
    if not interruptions:
        return
    causes = Counter(one.cause.split(":")[0] for one in interruptions).most_common(3)
    said = ", ".join(f"{letters(cause)} {count}" for cause, count in causes)
    words = f"{len(interruptions)} interruption{'' if len(interruptions) == 1 else 's'} ({said})"
    canvas.text(right, GAP + 4, words, SMALL_TEXT, FAINT, width=800, anchor="ra")
    at = right - min(800.0, text_width(words, SMALL_TEXT)) - 10
    canvas.draw.line((at, GAP + 2, at, GAP + 18), fill=STOPPED, width=2)


def _epoch_of(one: Interruption, history: Sequence[Mapping[str, Any]]) -> float | None:
    """Where on the axis of epochs a start ended; None if it did not know."""
    step = one.resumed_from if one.step is None else one.step
    if step is None:
        return None
    steps = [0.0, *(float(row["step"]) for row in history)]
    epochs = [0.0, *(float(row["epoch"]) for row in history)]
    if step > steps[-1]:  # in the epoch that is not completed
        return epochs[-1] + (step - steps[-1]) / max(1.0, steps[-1] - steps[-2]) * (epochs[-1] - epochs[-2])
    return float(np.interp(step, steps, epochs))


def _column(history: Sequence[Mapping[str, Any]], name: str) -> Values:
    """(N,) values of a column, NaN where there is none."""
    values = [row.get(name) for row in history]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _whole(highest: float) -> tuple[float, ...]:
    """Some whole numbers up to one."""
    step = next(step for step in (size * 10**power for power in range(9) for size in (1, 2, 5)) if highest / step <= 10)
    return tuple(float(number * step) for number in range(int(highest / step) + 1))


def _sides_of_boxes(index: Index) -> NDArray[np.float64]:
    """(N, 2) width and height of the image of each box that is no crowd region."""
    records = index.images
    boxes_of = np.diff(records.columns["first_boxes"])
    sides = np.repeat(records.columns["sizes"], boxes_of, axis=0).astype(np.float64)
    return np.asarray(sides[~records.crowd])


def _shortened(counts: NDArray[np.int64]) -> list[int | None]:
    """Classes by their boxes, the most frequent first; of very many, the ends, with None between them."""
    ordered = np.argsort(-counts, kind="stable").tolist()
    if len(ordered) <= MOST_BARS:
        return [*ordered]
    return [*ordered[: MOST_BARS // 2], None, *ordered[1 - MOST_BARS // 2 :]]


def _bars(canvas: Canvas, area: Area, rows: Sequence[int | None], counts: NDArray[np.int64], names: Sequence[str], pitch: int) -> None:
    left, top, right, _ = area
    canvas.draw.rectangle(area, fill=PANEL)
    canvas.text(left + 14, top + 10, "boxes of each class")
    start, most = left + 170, max(1, int(counts.max(initial=0)))
    room = right - start - 70
    for number, place in enumerate(rows):
        y = top + BARS_HEAD + number * pitch
        if place is None:
            canvas.text(start, y, f"... {len(counts) - len(rows) + 1} classes in between", SMALL_TEXT, FAINT)
            continue
        length = float(counts[place]) / most * room
        canvas.text(start - 8, y + pitch / 2, in_ascii(names[place], place), SMALL_TEXT, INK, start - left - 16, "rm")
        if counts[place]:
            canvas.draw.rectangle((start, y + 2, start + max(1.0, length), y + pitch - 2), fill=class_colour(place))
        canvas.text(start + length + 6, y + pitch / 2, str(counts[place]), SMALL_TEXT, FAINT, anchor="lm")


def _sizes(canvas: Canvas, area: Area, extents: Values, image_size: int) -> None:
    """Where widths and heights lie, in steps of equal ratio."""
    inner = panel(canvas, area, f"height over width of boxes, in pixels of the {image_size} x {image_size} input")
    powers = tuple(2.0**power for power in range(int(math.log2(image_size)) + 1))
    axis = Axis(1, image_size, "width", powers, is_log=True)
    places = np.clip(axis.place(np.maximum(extents, 1e-6)), 0, 1)
    axes(canvas, inner, axis, Axis(1, image_size, "", powers, is_log=True))
    density(canvas, inner, _cells(places)[::-1])


def _centres(canvas: Canvas, area: Area, centres: Values) -> None:
    inner = panel(canvas, area, "where the centres of boxes lie, from the image's upper left corner")
    shares = tuple(number / 5 for number in range(6))
    axes(canvas, inner, Axis(0, 1, "share of the width", shares), Axis(1, 0, "", shares))
    density(canvas, inner, _cells(centres))


def _cells(points: Values) -> NDArray[np.float64]:
    """How many of some points (N, 2), from 0 to 1, lie in each cell; finer, the more there are. Rows are y."""
    cells = int(np.clip(np.sqrt(len(points)) / 2, 16, 64))
    return np.histogram2d(points[:, 1], points[:, 0], bins=cells, range=[[0, 1], [0, 1]])[0]
