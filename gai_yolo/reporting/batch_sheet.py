"""What the network sees: samples as they come out of augmentation, with the boxes that it is to find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PillowImage

from gai_yolo.data.augment import Sample
from gai_yolo.reporting.canvas import GAP, headed, shortened_to
from gai_yolo.reporting.drawing import Image, draw_boxes, in_ascii, label_scale

SHEET_COLUMNS, MOST_SHOWN, SHEET_TILE = 4, 16, 320
"""Samples side by side, on a sheet, and pixels of one."""


def batch_picture(title: str, samples: Sequence[Sample], names: Sequence[str]) -> Image:
    """Draw at most `MOST_SHOWN` square samples. (H, W, 3) RGB.

    Args:
        names: of the classes.
    """
    shown = samples[:MOST_SHOWN]
    labels = [in_ascii(name, place) for place, name in enumerate(names)]
    width = SHEET_COLUMNS * (SHEET_TILE + GAP) + GAP
    canvas, top = headed(title, labels, width, -(-len(shown) // SHEET_COLUMNS) * (SHEET_TILE + GAP))
    for number, sample in enumerate(shown):
        left, upper = GAP + number % SHEET_COLUMNS * (SHEET_TILE + GAP), top + number // SHEET_COLUMNS * (SHEET_TILE + GAP)
        canvas.image.paste(PillowImage.fromarray(_tile(sample, labels)), (left, upper))
    return canvas.array()


def _tile(sample: Sample, labels: Sequence[str]) -> Image:
    scale = SHEET_TILE / sample.image.shape[0]
    filter_ = PillowImage.Resampling.BOX if scale < 1 else PillowImage.Resampling.NEAREST
    tile = np.array(PillowImage.fromarray(sample.image).resize((SHEET_TILE, SHEET_TILE), filter_))
    texts = [shortened_to(labels[place], 110, 12) for place in sample.classes.tolist()]
    draw_boxes(tile, sample.boxes * np.float32(scale), sample.classes, texts, label_scale(SHEET_TILE, SHEET_TILE))
    return tile
