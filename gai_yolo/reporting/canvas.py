"""Text and colours of charts and contact sheets. Pillow's own font, so that they look alike on every machine; it has ASCII only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gai_yolo.reporting.drawing import Colour, class_colour

BACKGROUND: Colour = (24, 26, 30)
PANEL: Colour = (36, 39, 46)
INK: Colour = (235, 235, 235)
FAINT: Colour = (150, 155, 165)
OTHERS: Colour = (205, 210, 220)
WRONG: Colour = (255, 92, 92)
TRAIN: Colour = (86, 156, 255)
VAL: Colour = (255, 170, 60)
SPLIT_COLOURS: dict[str, Colour] = {"train": TRAIN, "val": VAL}
TITLE, TEXT, SMALL_TEXT = 20, 14, 12
"""Sizes of letters in pixels."""
GAP = 16
FINENESS = 4
"""Bits behind the point of a smooth line's pixels."""
MOST_IN_LEGEND = 24
"""Classes that a legend names."""


class Canvas:
    """A dark picture to draw on, RGB."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: int = TEXT, colour: Colour = INK, width: float | None = None, anchor: str = "la"
    ) -> None:
        """Write at a place; of what is longer than `width` pixels the middle is left out. `anchor` as in Pillow."""
        shown = text if width is None else shortened_to(text, width, size)
        self.draw.text((x, y), shown, fill=colour, font=font(size), anchor=anchor)

    def tag(self, x: float, y: float, text: str, colour: Colour, within: tuple[float, float, float, float]) -> None:
        """Write on a filled tag above (x, y), moved so far that it lies in a box (xyxy)."""
        width, height = text_width(text, SMALL_TEXT) + 6, SMALL_TEXT + 4
        left = max(within[0], min(x, within[2] - width))
        top = y - height if y - height >= within[1] else max(within[1], min(y, within[3] - height))
        self.draw.rectangle((left, top, left + width, top + height), fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        self.draw.text((left + 3, top + 1), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font(SMALL_TEXT))

    def curves(self, lines: Sequence[tuple[NDArray[np.float64], Colour, int]]) -> None:
        """Draw smooth lines, each (N, 2) x and y in pixels, its colour and its width. A point that is not finite is a gap; one that stands
        alone is a dot."""
        pixels = np.array(self.image)
        for points, colour, width in lines:
            ends = np.flatnonzero(~np.isfinite(points).all(axis=1))
            for piece in np.split(points, ends):
                whole = piece[np.isfinite(piece).all(axis=1)]
                corners = np.round(whole * 2**FINENESS).astype(np.int32)
                if len(whole) > 1:
                    cv2.polylines(pixels, [corners], False, colour, width, cv2.LINE_AA, FINENESS)
                elif len(whole):
                    x, y = corners[0].tolist()
                    cv2.circle(pixels, (x, y), (width + 1) << FINENESS, colour, cv2.FILLED, cv2.LINE_AA, FINENESS)
        self.image.paste(Image.fromarray(pixels))

    def upwards(self, x: float, y: float, text: str, size: int = SMALL_TEXT, colour: Colour = INK, width: float = 1e9) -> None:
        """Write from a place upwards, as wide as the letters are to its right; as `text` otherwise."""
        shown = shortened_to(text, width, size)
        mask = Image.new("L", (round(text_width(shown, size)) + 2, size + 4))
        ImageDraw.Draw(mask).text((0, 0), shown, fill=255, font=font(size))
        turned = mask.rotate(90, expand=True)
        self.image.paste(Image.new("RGB", turned.size, colour), (round(x), round(y) - turned.height), turned)

    def array(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """(H, W, 3) RGB."""
        return np.asarray(self.image)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; one of a fixed size where Pillow was built without FreeType."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """In pixels."""
    return font(size).getlength(text)


def shortened_to(text: str, width: float, size: int) -> str:
    """A text in so many pixels: of a longer one the middle is left out, because paths differ at their ends."""
    if text_width(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shown = f"{text[: kept // 3]}...{text[len(text) - (kept - kept // 3) :]}"
        if text_width(shown, size) <= width:
            return shown
    return ""


def wrapped(text: str, width: float, size: int, most: int) -> list[str]:
    """A text in at most so many lines of `width` pixels, broken anywhere if there is no blank; of the last line the middle is left out."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < most - 1 and text_width(rest, size) > width:
        fits = next(n for n in range(len(rest), 0, -1) if n == 1 or text_width(rest[:n], size) <= width)
        blank = rest.rfind(" ", fits // 2, fits + 1)
        cut = blank if blank > 0 else fits
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*lines, shortened_to(rest, width, size)] if rest else lines


def letters(text: str) -> str:
    """A text in the letters that the font has."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)


def headed(title: str, labels: Sequence[str], width: int, room: int) -> tuple[Canvas, int]:
    """A canvas with a title and a legend of the classes, if there are any, over so many pixels of room; and where that begins."""
    legend = _legend_rows(labels, width - 2 * GAP) if labels else []
    top = 2 * GAP + TITLE + len(legend) * (TEXT + 8)
    canvas = Canvas(width, top + room)
    canvas.text(GAP, GAP, title, TITLE, width=width - 2 * GAP)
    for number, entries in enumerate(legend):
        y = 2 * GAP + TITLE + number * (TEXT + 8) - 4
        for x, label, colour in entries:
            canvas.draw.rectangle((GAP + x, y + 2, GAP + x + 14, y + 14), fill=colour)
            canvas.text(GAP + x + 20, y, label)
    return canvas, top


def _legend_rows(labels: Sequence[str], width: float) -> list[list[tuple[float, str, Colour]]]:
    """Rows of (x, label, colour) that name the colours of the classes."""
    entries = [(shortened_to(label, 240, TEXT), class_colour(position)) for position, label in enumerate(labels[:MOST_IN_LEGEND])]
    if len(labels) > MOST_IN_LEGEND:
        entries.append((f"and {len(labels) - MOST_IN_LEGEND} more", BACKGROUND))
    rows: list[list[tuple[float, str, Colour]]] = [[]]
    x = 0.0
    for label, colour in entries:
        needed = text_width(label, TEXT) + 42
        if rows[-1] and x + needed > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, label, colour))
        x += needed
    return rows
