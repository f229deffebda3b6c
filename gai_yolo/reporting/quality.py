"""How good a detector is, as pictures: precision over recall, what a confidence is worth, which class is taken for which.

Up to `MOST_LINES` classes have lines of their own; of more, the best and the worst, and the others as a grey crowd behind the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from gai_yolo.evaluation.confusion import Confusion
from gai_yolo.evaluation.curves import CONFIDENCES, CURVE_IOU, RECALLS, Curves, OperatingPoint
from gai_yolo.reporting.canvas import FAINT, GAP, INK, PANEL, SMALL_TEXT, TEXT, TITLE, Canvas, letters, text_width
from gai_yolo.reporting.drawing import FIRST_COLOURS, Colour, Image, class_colour, in_ascii
from gai_yolo.reporting.plots import SERIES_COLOURS, Area, Axis, Series, axes, heat_colours, legend, lines, panel

MOST_LINES = len(SERIES_COLOURS)
CROWD: Colour = (84, 88, 98)
PLOT_SIDES, LEGEND_WIDTH = (620, 460), 300
"""Pixels of a plot and of what names its lines."""
SHARES = tuple(number / 5 for number in range(6))
MATRIX_SIDE, LEAST_CELL, MOST_CELL, LEAST_NUMBERED, LEAST_RULED = 1150, 2, 54, 30, 6
"""Pixels: of a matrix, about; of its cells; of a cell in which a number has room; and of one that a line may part from its neighbours."""
NAME_ROOM, NAME_PITCH = 170, 13
"""Pixels for the names beside a matrix, and from one name to the next at least."""


def precision_recall_picture(subject: str, curves: Curves, names: Sequence[str]) -> Image:
    """Precision over recall of the classes and their mean. (H, W, 3) RGB.

    Args:
        subject: what was evaluated.
        names: of the K classes.
    """
    means = np.array([row.mean() if curves.positives[place] else np.nan for place, row in enumerate(curves.precisions)])
    chosen = _chosen(curves, means)
    canvas = Canvas(PLOT_SIDES[0] + LEGEND_WIDTH + 4 * GAP, PLOT_SIDES[1] + 3 * GAP + TITLE)
    canvas.text(GAP, GAP, letters(f"{subject}: precision over recall, IoU {CURVE_IOU:.2f}"), TITLE, width=canvas.image.width - 2 * GAP)
    top = 2 * GAP + TITLE
    x, y = Axis(0, 1, "recall", SHARES), Axis(0, 1, "", SHARES)
    area = panel(canvas, (GAP, top, GAP + PLOT_SIDES[0], top + PLOT_SIDES[1]), "precision")
    _plot(canvas, area, (x, y), RECALLS, curves.precisions, curves, chosen)
    _legend(
        canvas,
        (2 * GAP + PLOT_SIDES[0], top, canvas.image.width - GAP, canvas.image.height - GAP),
        ("AP50", _mean_of(means)),
        means,
        names,
        chosen,
    )
    return canvas.array()


def confidence_picture(subject: str, curves: Curves, names: Sequence[str], best: OperatingPoint | None) -> Image:
    """F1, precision and recall over the confidence that is asked for. (H, W, 3) RGB.

    Args:
        subject: what was evaluated.
        names: of the K classes.
        best: the confidence to mark.
    """
    f1 = curves.f1
    highest = np.array([row.max() if curves.positives[place] else np.nan for place, row in enumerate(f1)])
    chosen = _chosen(curves, highest)
    width, height = PLOT_SIDES
    canvas = Canvas(2 * width + 3 * GAP, 2 * height + 4 * GAP + TITLE)
    canvas.text(GAP, GAP, letters(f"{subject}: what a confidence is worth, IoU {CURVE_IOU:.2f}"), TITLE, width=canvas.image.width - 2 * GAP)
    x = Axis(0, 1, "confidence", SHARES)
    for number, (title, values) in enumerate((("F1", f1), ("precision", curves.precision), ("recall", curves.recall))):
        left, top = GAP + number % 2 * (width + GAP), 2 * GAP + TITLE + number // 2 * (height + GAP)
        area = panel(canvas, (left, top, left + width, top + height), title)
        _plot(canvas, area, (x, Axis(0, 1, "", SHARES)), CONFIDENCES, values, curves, chosen)
        if best is not None:
            at = area[0] + (area[2] - area[0]) * best.confidence
            canvas.draw.line((at, area[1], at, area[3]), fill=FAINT)
            words = f"{best.confidence:.3f}: mean {getattr(best, title.lower()):.3f}"
            is_left = at + text_width(words, SMALL_TEXT) + 8 > area[2]
            canvas.text(at + (-5 if is_left else 5), area[1] - 16, words, SMALL_TEXT, FAINT, anchor="ra" if is_left else "la")
    left, top = 2 * GAP + width, 3 * GAP + TITLE + height
    _legend(
        canvas,
        (left + GAP, top, left + GAP + LEGEND_WIDTH, top + height),
        ("highest F1", 0.0 if best is None else best.f1),
        highest,
        names,
        chosen,
    )
    return canvas.array()


def confusion_picture(subject: str, confusion: Confusion, names: Sequence[str]) -> Image:
    """Boxes of a class (row) that were found as a class (column), and the background. (H, W, 3) RGB.

    Args:
        subject: what was evaluated.
        names: of the K classes; of very many not each is written.
    """
    matrix = confusion.matrix
    count = len(matrix)
    cell = int(np.clip(MATRIX_SIDE // count, LEAST_CELL, MOST_CELL))
    side = cell * count
    labels = [*(in_ascii(name, place) for place, name in enumerate(names)), "background"]
    size, stride = min(TEXT, max(SMALL_TEXT - 1, cell - 2)), -(-NAME_PITCH // cell)
    room = min(NAME_ROOM, max(text_width(label, size) for label in labels) + 12)
    left, top = GAP + round(room), 3 * GAP + 2 * TITLE + round(room)
    canvas = Canvas(max(left + side + GAP, 760), top + side + 2 * GAP + TEXT)
    title = f"{subject}: which class is taken for which, confidence from {confusion.confidence:g}, IoU from {confusion.iou:g}"
    canvas.text(GAP, GAP, letters(title), TITLE - 3, width=canvas.image.width - 2 * GAP)
    words = "rows: what is there; columns: what it is taken for; colour: share of the row, from 0 to 100 %"
    canvas.text(GAP, GAP + TITLE + 6, words, SMALL_TEXT, FAINT)
    bar = heat_colours(np.sqrt(np.linspace(0, 1, 120)))[None].repeat(12, axis=0)
    canvas.image.paste(PillowImage.fromarray(bar), (round(GAP + text_width(words, SMALL_TEXT) + 10), GAP + TITLE + 7))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # The root, as in other heat maps, so that rare mix-ups are seen.
    pixels = heat_colours(np.sqrt(shares)).repeat(cell, axis=0).repeat(cell, axis=1)
    if cell >= LEAST_RULED:
        pixels[::cell] = pixels[:, ::cell] = PANEL
    canvas.image.paste(PillowImage.fromarray(pixels), (left, top))
    canvas.draw.rectangle((left - 1, top - 1, left + side, top + side), outline=FAINT)
    for place, label in enumerate(labels):
        if place % stride == 0 or (place == len(labels) - 1 and (place % stride) * cell >= NAME_PITCH):
            middle = (place + 0.5) * cell
            colour = FAINT if place == len(labels) - 1 else INK
            canvas.text(left - 6, top + middle, label, size, colour, room - 6, "rm")
            canvas.upwards(left + middle - (size + 4) / 2, top - 6, label, size, colour, room - 6)
    if cell >= LEAST_NUMBERED:
        _write_counts(canvas, (left, top), cell, matrix, shares)
    words = "last column: not found; last row: found where nothing is"
    canvas.text(GAP, top + side + 8, words, SMALL_TEXT, FAINT)
    return canvas.array()


def _write_counts(canvas: Canvas, corner: tuple[int, int], cell: int, matrix: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    for row, column in zip(*(places.tolist() for places in np.nonzero(matrix)), strict=True):
        words = str(matrix[row, column])
        size = next((size for size in (TEXT, SMALL_TEXT, SMALL_TEXT - 2) if text_width(words, size) <= cell - 4), SMALL_TEXT - 3)
        colour = (20, 20, 20) if shares[row, column] > 0.55 else INK
        canvas.text(corner[0] + (column + 0.5) * cell, corner[1] + (row + 0.5) * cell, words, size, colour, anchor="mm")


def _chosen(curves: Curves, quality: NDArray[np.float64]) -> list[int]:
    """The classes with lines of their own, the best ones first."""
    ordered = sorted(curves.measured.tolist(), key=lambda place: -quality[place])
    if len(ordered) <= MOST_LINES:
        return ordered
    few = MOST_LINES // 2
    return ordered[:few] + ordered[-few:]


def line_colours(chosen: Sequence[int]) -> list[Colour]:
    """Of the lines of classes: as on the pictures, where the classes are few enough to be told apart by them."""
    few = max(chosen, default=0) < len(FIRST_COLOURS)
    return [class_colour(place) if few else SERIES_COLOURS[number] for number, place in enumerate(chosen)]


def _plot(
    canvas: Canvas,
    area: Area,
    both: tuple[Axis, Axis],
    xs: NDArray[np.float64],
    values: NDArray[np.float64],
    curves: Curves,
    chosen: Sequence[int],
) -> None:
    """Draw the lines (K, N) over (N,) of some classes, of the others in grey, and of the mean."""
    axes(canvas, area, *both)
    measured = curves.measured
    step = 1 + len(xs) // 250  # the crowd needs no more points than there are pixels
    others = [Series(xs[::step], values[place, ::step], CROWD, 1) for place in measured.tolist() if place not in chosen]
    own = [Series(xs, values[place], colour) for place, colour in zip(chosen, line_colours(chosen), strict=True)]
    lines(canvas, area, *both, [*others, *own[::-1], *_mean(xs, values[measured])])


def _mean(xs: NDArray[np.float64], values: NDArray[np.float64]) -> list[Series]:
    """Of the classes that have a value, if there are several."""
    if len(values) < 2:
        return []
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return [Series(xs, np.where(count > 0, total / np.maximum(count, 1), np.nan), INK, 3)]


def _legend(
    canvas: Canvas, area: Area, first: tuple[str, float], quality: NDArray[np.float64], names: Sequence[str], chosen: Sequence[int]
) -> None:
    """Name the lines, with a number of each class; `first` says what it is, and what it is for their mean."""
    defined = quality[~np.isnan(quality)]
    entries: list[tuple[str, str, Colour | None]] = [("", first[0], None)]
    if len(defined) > 1:
        entries.append((f"mean of {len(defined)} classes", f"{first[1]:.3f}", INK))
    if not len(defined):
        entries.append(("no boxes to be found", "", None))
    own: list[tuple[str, str, Colour | None]]
    pairs = zip(chosen, line_colours(chosen), strict=True)
    own = [(in_ascii(names[place], place), f"{quality[place]:.3f}", colour) for place, colour in pairs]
    if len(defined) > len(own):
        half = len(own) // 2
        between: tuple[str, str, Colour | None] = (f"{len(defined) - len(own)} classes in between", "", CROWD)
        entries += [*own[:half], between, *own[half:]]
    else:
        entries += own
    absent = len(names) - len(defined)
    if absent and len(defined):
        entries.append((f"{absent} without a box: not measured", "", None))
    legend(canvas, area, entries)


def _mean_of(quality: NDArray[np.float64]) -> float:
    defined = quality[~np.isnan(quality)]
    return float(defined.mean()) if len(defined) else 0.0
