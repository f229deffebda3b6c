"""Random changes of training images. Every draw comes from the generator that is handed in; nothing else is random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.images import GREY, Image
from gai_yolo.sections import AugmentConfig

LEAST_SIDE_LEFT, LARGEST_ASPECT, LEAST_AREA = 2.0, 100.0, 0.1


@dataclass(frozen=True)
class Sample:
    """An image with its boxes."""

    image: Image
    boxes: NDArray[np.float32]
    """(N, 4) xyxy in pixels of `image`."""
    classes: NDArray[np.int64]
    """(N,)."""


def letterbox(sample: Sample, size: int) -> tuple[Sample, int, int]:
    """Centre an image, whose sides are at most `size`, on a grey square.

    Returns:
        The sample of `size` x `size` pixels, left and top padding.
    """
    height, width = sample.image.shape[:2]
    left, top = (size - width) // 2, (size - height) // 2
    canvas = np.full((size, size, 3), GREY, dtype=np.uint8)
    canvas[top : top + height, left : left + width] = sample.image
    return Sample(canvas, sample.boxes + np.array([left, top, left, top], dtype=np.float32), sample.classes), left, top


def mosaic(tiles: Sequence[Sample], size: int, rng: np.random.Generator) -> Sample:
    """Four images around a point drawn from the middle half of a canvas of `2 size` x `2 size` pixels.

    Args:
        tiles: top left, top right, bottom left, bottom right; what does not fit is cut off.
    """
    canvas = np.full((2 * size, 2 * size, 3), GREY, dtype=np.uint8)
    centre_x, centre_y = (int(v) for v in rng.uniform(size / 2, 3 * size / 2, 2))
    boxes = []
    for place, tile in enumerate(tiles):
        height, width = tile.image.shape[:2]
        left = centre_x - width if place % 2 == 0 else centre_x
        top = centre_y - height if place < 2 else centre_y
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + width, 2 * size), min(top + height, 2 * size)
        canvas[y1:y2, x1:x2] = tile.image[y1 - top : y2 - top, x1 - left : x2 - left]
        boxes.append(tile.boxes + np.array([left, top, left, top], dtype=np.float32))
    clipped = np.concatenate(boxes).clip(0, 2 * size)
    visible = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    return Sample(canvas, clipped[visible], np.concatenate([t.classes for t in tiles])[visible])


def random_affine(sample: Sample, size: int, scale: float, translate: float, rng: np.random.Generator) -> Sample:
    """Zoom by 1 - scale to 1 + scale about the centre, shift by up to `translate` of the side, cut out `size` x `size` pixels.

    Boxes are kept when both sides are above 2 px, the aspect is below 100 and more than 10 % of the area remains.
    """
    height, width = sample.image.shape[:2]
    zoom = rng.uniform(1 - scale, 1 + scale)
    shift = rng.uniform(0.5 - translate, 0.5 + translate, 2) * size
    offset_x, offset_y = shift[0] - zoom * width / 2, shift[1] - zoom * height / 2
    # OpenCV counts from pixel centres, boxes from pixel edges: hence the half pixels.
    half = (zoom - 1) / 2
    matrix = np.array([[zoom, 0, offset_x + half], [0, zoom, offset_y + half]], dtype=np.float64)
    image = cv2.warpAffine(sample.image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=(GREY, GREY, GREY))
    moved = (sample.boxes * zoom + np.array([offset_x, offset_y, offset_x, offset_y])).astype(np.float32)
    clipped = moved.clip(0, size)
    (width_left, height_left), (moved_width, moved_height) = ((corners[:, 2:] - corners[:, :2]).T for corners in (clipped, moved))
    aspect = np.maximum(width_left / (height_left + 1e-9), height_left / (width_left + 1e-9))
    keep = (width_left > LEAST_SIDE_LEFT) & (height_left > LEAST_SIDE_LEFT) & (aspect < LARGEST_ASPECT)
    keep &= width_left * height_left > LEAST_AREA * (moved_width * moved_height)
    return Sample(np.asarray(image, dtype=np.uint8), clipped[keep], sample.classes[keep])


def mixup(a: Sample, b: Sample, rng: np.random.Generator) -> Sample:
    """Blend two images with a weight from Beta(32, 32) and keep the boxes of both (Zhang et al. 2018, arXiv 1710.09412)."""
    weight = float(rng.beta(32.0, 32.0))
    image = cv2.addWeighted(a.image, weight, b.image, 1 - weight, 0.0)
    return Sample(np.asarray(image, dtype=np.uint8), np.concatenate((a.boxes, b.boxes)), np.concatenate((a.classes, b.classes)))


def random_hsv(image: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Shift the hue, scale saturation and brightness, by factors drawn from 1 - gain to 1 + gain."""
    gains = rng.uniform(-1, 1, 3) * (config.hsv_h, config.hsv_s, config.hsv_v)
    if not gains.any():
        return image
    levels = np.arange(256)
    # Hue is a circle of 180 steps in 8-bit OpenCV.
    tables = ((levels + 180 * gains[0]) % 180, (levels * (1 + gains[1])).clip(0, 255), (levels * (1 + gains[2])).clip(0, 255))
    table = np.stack(tables, axis=-1).astype(np.uint8)[None]
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)


def random_flip(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Mirror left-right and top-down with the configured probabilities."""
    horizontal, vertical = rng.random(2) < (config.flip, config.flip_vertical)
    image, boxes = sample.image, sample.boxes.copy()
    height, width = image.shape[:2]
    if horizontal:
        image, boxes[:, [0, 2]] = image[:, ::-1], width - boxes[:, [2, 0]]
    if vertical:
        image, boxes[:, [1, 3]] = image[::-1], height - boxes[:, [3, 1]]
    return Sample(np.ascontiguousarray(image), boxes, sample.classes)
