"""One image of a contact sheet: fitted into its place, with boxes on it and a caption below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from gai_yolo.data.formats.reading import CannotRead
from gai_yolo.data.images import decode
from gai_yolo.data.index import ImageRecord
from gai_yolo.reporting.canvas import BACKGROUND, FAINT, INK, PANEL, SMALL_TEXT, TEXT, WRONG, Canvas, shortened_to
from gai_yolo.reporting.drawing import Colour

TILE_WIDTH, PICTURE_HEIGHT, LINE = 400, 300, 18
"""Pixels of a tile, of the picture in it, and of a line of its caption."""
MARGIN = 0.5
"""So much of the image's sides is shown beyond its borders, at most, for boxes that lie there."""
LEAST_SIDE, RADIUS = 12, 18
"""Pixels on the sheet: a box that has a shorter side is hard to see, and gets a circle around it."""
MOST_LABELS = 25
"""Boxes of an image up to which each gets its name; of more, colours must do."""

Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A box to draw."""

    corners: tuple[float, ...]
    """xyxy in pixels of the image, in any order, not necessarily in it; finite."""
    colour: Colour
    label: str = ""
    is_wrong: bool = False
    """Drawn thicker, and never out of sight."""


@dataclass(frozen=True)
class Tile:
    """An image to show."""

    record: ImageRecord | None
    """None if there is no picture to be had."""
    marks: Sequence[Mark]
    caption: Sequence[tuple[str, Colour]]
    """Lines; the first one in larger letters."""


def draw_tile(canvas: Canvas, left: int, top: int, tile: Tile) -> None:
    """Draw a tile with its upper left corner at a place."""
    area = (left, top, left + TILE_WIDTH, top + PICTURE_HEIGHT)
    canvas.draw.rectangle(area, fill=PANEL)
    if tile.record is None or not _draw_picture(canvas, area, tile.record, tile.marks):
        canvas.draw.line((area[0], area[1], area[2], area[3]), fill=FAINT)
        canvas.draw.line((area[0], area[3], area[2], area[1]), fill=FAINT)
        middle = ((area[0] + area[2]) / 2, (area[1] + area[3]) / 2)
        canvas.draw.rectangle((middle[0] - 60, middle[1] - 14, middle[0] + 60, middle[1] + 14), fill=PANEL)
        canvas.text(*middle, "no picture", colour=FAINT, anchor="mm")
    for number, (text, colour) in enumerate(tile.caption):
        size = TEXT if number == 0 else SMALL_TEXT
        canvas.text(left, top + PICTURE_HEIGHT + 5 + LINE * number, text, size, colour, width=TILE_WIDTH)


def visible_part(record: ImageRecord, marks: Sequence[Mark]) -> Rectangle:
    """What is shown of the plane in which an image lies at 0, 0: the image, and its surroundings as far as something wrong lies there."""
    wrong = [mark.corners for mark in marks if mark.is_wrong]
    xs = [0.0, record.width, *(x for corners in wrong for x in corners[0::2])]
    ys = [0.0, record.height, *(y for corners in wrong for y in corners[1::2])]
    beyond_x, beyond_y = MARGIN * record.width, MARGIN * record.height
    return (
        max(min(xs), -beyond_x),
        max(min(ys), -beyond_y),
        min(max(xs), record.width + beyond_x),
        min(max(ys), record.height + beyond_y),
    )


def _draw_picture(canvas: Canvas, area: Rectangle, record: ImageRecord, marks: Sequence[Mark]) -> bool:
    """Draw image and boxes in the middle of an area; returns whether there is such an image."""
    x1, y1, x2, y2 = visible_part(record, marks)
    border = 0 if (x1, y1, x2, y2) == (0, 0, record.width, record.height) else 3
    scale = min((area[2] - area[0] - 2 * border) / (x2 - x1), (area[3] - area[1] - 2 * border) / (y2 - y1))
    try:
        pixels = decode(record, max(1, round(scale * max(record.width, record.height))))
    except (CannotRead, MemoryError):
        return False
    if pixels is None:
        return False
    # Where the image's own 0, 0 comes to lie.
    origin = ((area[0] + area[2] - scale * (x1 + x2)) / 2, (area[1] + area[3] - scale * (y1 + y2)) / 2)
    canvas.image.paste(Image.fromarray(pixels), (round(origin[0]), round(origin[1])))
    placed = [(mark, _placed(mark, origin, scale, area)) for mark in marks]
    placed.sort(key=lambda both: (both[0].is_wrong, -_area(both[1])))  # small ones on top of large ones
    for mark, corners in placed:
        _draw_box(canvas, mark, corners, area)
    if len(placed) <= MOST_LABELS:
        for mark, corners in placed:
            if mark.label:
                canvas.tag(corners[0], corners[1], shortened_to(mark.label, 160, SMALL_TEXT), mark.colour, area)
    return True


def _placed(mark: Mark, origin: tuple[float, float], scale: float, area: Rectangle) -> Rectangle:
    xs = sorted(min(max(origin[0] + scale * x, area[0]), area[2]) for x in mark.corners[0::2])
    ys = sorted(min(max(origin[1] + scale * y, area[1]), area[3]) for y in mark.corners[1::2])
    return xs[0], ys[0], xs[1], ys[1]


def _area(corners: Rectangle) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def _draw_box(canvas: Canvas, mark: Mark, corners: Rectangle, area: Rectangle) -> None:
    # A line in another brightness beside it, because the image may have the box's colour.
    canvas.draw.rectangle(corners, outline=INK if mark.is_wrong else BACKGROUND, width=5 if mark.is_wrong else 3)
    canvas.draw.rectangle(corners, outline=mark.colour, width=3 if mark.is_wrong else 2)
    if mark.is_wrong and min(corners[2] - corners[0], corners[3] - corners[1]) < LEAST_SIDE:
        x = min(max((corners[0] + corners[2]) / 2, area[0] + RADIUS), area[2] - RADIUS)
        y = min(max((corners[1] + corners[3]) / 2, area[1] + RADIUS), area[3] - RADIUS)
        canvas.draw.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), outline=WRONG, width=2)
