"""Parts of charts: panels, axes, lines, heat maps. Colours that colour-blind people tell apart (Okabe and Ito 2008, "Color Universal
Design"), and for heat one scale that grows steadily brighter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from gai_yolo.reporting.canvas import FAINT, INK, PANEL, SMALL_TEXT, TEXT, Canvas, text_width
from gai_yolo.reporting.drawing import Colour

SERIES_COLOURS: tuple[Colour, ...] = (
    *((86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (90, 130, 255)),
)
"""The blue is brighter than theirs, because the ground is dark."""
GRID: Colour = (62, 66, 75)
HEAT: NDArray[np.float64] = np.array([[24, 26, 30], [70, 50, 140], [220, 80, 90], [255, 230, 130]], dtype=np.float64)
"""(4, 3) RGB at 0, 1/3, 2/3 and 1."""
PLOT_TOP, PLOT_LEFT, PLOT_BELOW, PLOT_RIGHT = 42, 58, 44, 16
"""Pixels around what is plotted: for the title, the numbers at the axes, and nothing."""

Area = tuple[float, float, float, float]
"""xyxy in pixels."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """From where to where, and where numbers stand."""

    low: float
    high: float
    label: str = ""
    ticks: tuple[float, ...] | None = None
    """None: round numbers."""
    is_log: bool = False

    def place(self, values: Values) -> Values:
        """0 at `low`, 1 at `high`."""
        if self.is_log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray((np.log2(values) - math.log2(self.low)) / (math.log2(self.high) - math.log2(self.low)))
        return np.asarray((values - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class Series:
    """A line."""

    xs: Values
    ys: Values
    """(N,) each; NaN is a gap."""
    colour: Colour
    width: int = 2
    dots: bool = False
    """Whether each point is to be seen."""


def panel(canvas: Canvas, area: Area, title: str) -> Area:
    """The ground of a plot in an area; returns where in it the values go."""
    left, top, right, bottom = area
    canvas.draw.rectangle(area, fill=PANEL)
    canvas.text(left + 14, top + 10, title, width=right - left - 28)
    return left + PLOT_LEFT, top + PLOT_TOP, right - PLOT_RIGHT, bottom - PLOT_BELOW


def axes(canvas: Canvas, area: Area, x: Axis, y: Axis) -> None:
    """Grid and numbers around the values' area, and the words below; what goes upwards is for the title to say."""
    left, top, right, bottom = area
    taken = -math.inf
    for value in x.ticks if x.ticks is not None else round_numbers(x.low, x.high):
        at, words = left + (right - left) * float(x.place(np.array(value))), f"{value:.6g}"
        canvas.draw.line((at, top, at, bottom), fill=GRID)
        half = text_width(words, SMALL_TEXT) / 2
        if at - half > taken + 6:
            canvas.text(at, bottom + 5, words, SMALL_TEXT, FAINT, anchor="ma")
            taken = at + half
    for value in y.ticks if y.ticks is not None else round_numbers(y.low, y.high):
        at = bottom - (bottom - top) * float(y.place(np.array(value)))
        canvas.draw.line((left, at, right, at), fill=GRID)
        canvas.text(left - 8, at, f"{value:.6g}", SMALL_TEXT, FAINT, anchor="rm")
    canvas.draw.line((left, bottom, right, bottom), fill=FAINT)
    canvas.draw.line((left, top, left, bottom), fill=FAINT)
    canvas.text((left + right) / 2, bottom + 22, x.label, SMALL_TEXT, FAINT, anchor="ma")


def lines(canvas: Canvas, area: Area, x: Axis, y: Axis, series: Sequence[Series]) -> None:
    """Draw lines; the last one lies on top. What is beyond the axes is drawn at their ends."""
    left, top, right, bottom = area
    drawn: list[tuple[Values, Colour, int]] = []
    for one in series:
        across, up = (np.clip(axis.place(values), 0, 1) for axis, values in ((x, one.xs), (y, one.ys)))
        points = np.stack([left + (right - left) * across, bottom - (bottom - top) * up], axis=1)
        drawn.append((points, one.colour, one.width))
        if one.dots:
            drawn += [(point[None], one.colour, one.width) for point in points]
    canvas.curves(drawn)


def legend(canvas: Canvas, area: Area, entries: Sequence[tuple[str, str, Colour | None]]) -> None:
    """Name, value and colour of lines, one below the other; without a colour only words. Names end where the values begin."""
    left, top, right, bottom = area
    for number, (name, value, colour) in enumerate(entries):
        y = top + number * 22
        if y + 20 > bottom:
            return
        if colour is not None:
            canvas.draw.line((left, y + 8, left + 18, y + 8), fill=colour, width=3)
        canvas.text(right, y, value, anchor="ra")
        canvas.text(left + 26, y, name, colour=INK if colour is not None else FAINT, width=right - left - 34 - text_width(value, TEXT))


def heat_colours(shares: Values) -> NDArray[np.uint8]:
    """Shares (...) from 0 to 1 as colours (..., 3) RGB."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shares, stops, HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def density(canvas: Canvas, area: Area, counts: NDArray[np.float64]) -> None:
    """Fill an area with cells (rows, columns), the more the brighter; by the root, which shows few beside many."""
    left, top, right, bottom = (round(value) for value in area)
    pixels = heat_colours(np.sqrt(counts / max(1.0, float(counts.max(initial=0)))))
    picture = PillowImage.fromarray(pixels).resize((right - left, bottom - top), PillowImage.Resampling.NEAREST)
    canvas.image.paste(picture, (left, top))
    canvas.draw.rectangle((left - 1, top - 1, right, bottom), outline=FAINT)


def round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many steps of 1, 2 or 5 times a power of ten within a range."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next((factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most), 50 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
