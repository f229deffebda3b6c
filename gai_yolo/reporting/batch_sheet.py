"""What the network sees: samples as they come out of augmentation, with the boxes that it is to find."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image as PillowImage

from gai_yolo.data.augment import Sample
from gai_yolo.reporting.canvas import BACKGROUND, GAP, TEXT, TITLE, Canvas, legend_rows, shortened_to
from gai_yolo.reporting.drawing import Image, class_colour, in_ascii

SHEET_COLUMNS, MOST_SHOWN, SHEET_TILE = 4, 16, 320
"""Samples side by side, on a sheet, and pixels of one."""
MOST_TAGGED = 20
"""Boxes of a sample up to which each has its name; of more, the colours must do."""


def batch_picture(title: str, samples: Sequence[Sample], names: Sequence[str]) -> Image:
    """Draw at most `MOST_SHOWN` square samples. (H, W, 3) RGB.

    Args:
        names: of the classes.
    """
    shown = samples[:MOST_SHOWN]
    labels = [in_ascii(name, place) for place, name in enumerate(names)]
    width = SHEET_COLUMNS * (SHEET_TILE + GAP) + GAP
    legend = legend_rows(labels, width - 2 * GAP)
    top = 2 * GAP + TITLE + len(legend) * (TEXT + 8)
    canvas = Canvas(width, top + -(-len(shown) // SHEET_COLUMNS) * (SHEET_TILE + GAP))
    canvas.text(GAP, GAP, title, TITLE, width=width - 2 * GAP)
    for number, entries in enumerate(legend):
        y = 2 * GAP + TITLE + number * (TEXT + 8) - 4
        for x, label, colour in entries:
            canvas.draw.rectangle((GAP + x, y + 2, GAP + x + 14, y + 14), fill=colour)
            canvas.text(GAP + x + 20, y, label)
    for number, sample in enumerate(shown):
        left, upper = GAP + number % SHEET_COLUMNS * (SHEET_TILE + GAP), top + number // SHEET_COLUMNS * (SHEET_TILE + GAP)
        _draw_sample(canvas, left, upper, sample, labels)
    return canvas.array()


def _draw_sample(canvas: Canvas, left: int, top: int, sample: Sample, labels: Sequence[str]) -> None:
    side = sample.image.shape[0]
    scale = SHEET_TILE / side
    filter_ = PillowImage.Resampling.BOX if scale < 1 else PillowImage.Resampling.NEAREST
    canvas.image.paste(PillowImage.fromarray(sample.image).resize((SHEET_TILE, SHEET_TILE), filter_), (left, top))
    area = (left, top, left + SHEET_TILE - 1, top + SHEET_TILE - 1)
    placed = [tuple(offset + scale * value for offset, value in zip((left, top) * 2, box, strict=True)) for box in sample.boxes.tolist()]
    classes = sample.classes.tolist()
    for (x1, y1, x2, y2), place in zip(placed, classes, strict=True):
        corners = (max(x1, area[0]), max(y1, area[1]), min(x2, area[2]), min(y2, area[3]))
        # A line in another brightness beside it, because the image may have the box's colour.
        canvas.draw.rectangle(corners, outline=BACKGROUND, width=3)
        canvas.draw.rectangle(corners, outline=class_colour(place), width=2)
    if len(placed) <= MOST_TAGGED:
        for (x1, y1, _, _), place in zip(placed, classes, strict=True):
            canvas.tag(x1, y1, shortened_to(labels[place], 110, 12), class_colour(place), area)
