"""Pictures for people: ground truth and predictions side by side."""

from __future__ import annotations

import colorsys
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

# OpenCV takes 0.15 s to load, but whoever draws has decoded images with it before.
import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

MIN_DRAWN, MAX_DRAWN = 640, 960
"""Longer side of a drawn image in pixels: labels need room, and a log of full-size photographs would be gigabytes."""
MIN_WIDTH = 320
"""A tall, narrow image gets a margin on the right, so that caption and labels stay readable."""
CAPTION_HEIGHT, PANEL_GAP = 34, 10
DRAWN_BACKGROUND: Colour = (24, 26, 30)
FONT = cv2.FONT_HERSHEY_SIMPLEX
LABEL_SCALE, CAPTION_SCALE = 0.45, 0.6
DRAWN_QUALITY = 92


def draw_comparison(
    image: Image,
    truth_boxes: NDArray[np.float32],
    truth_classes: NDArray[np.int64],
    predicted_boxes: NDArray[np.float32],
    predicted_scores: NDArray[np.float32],
    predicted_classes: NDArray[np.int64],
    class_names: Sequence[str],
    min_score: float = 0.25,
) -> Image:
    """Draw the annotated boxes on the left and the predicted ones on the right.

    Args:
        image: (H, W, 3) RGB.
        truth_boxes: (N, 4) xyxy in pixels of `image`, with `truth_classes` (N,).
        predicted_boxes: (M, 4) xyxy in pixels of `image`, with `predicted_scores` (M,) in [0, 1] and `predicted_classes` (M,).
        class_names: name of each class position.
        min_score: predictions below it are not drawn.

    Returns:
        RGB picture; each side's longer edge has 640 to 960 pixels, whatever the size of `image`.
    """
    shown = predicted_scores >= min_score
    # Lowest score first, so that the surest label ends on top; equal scores keep their order.
    order = np.flatnonzero(shown)[np.argsort(predicted_scores[shown], kind="stable")]
    truth_texts = [in_ascii(class_names[c], c) for c in truth_classes.tolist()]
    texts = [f"{in_ascii(class_names[predicted_classes[i]], int(predicted_classes[i]))} {predicted_scores[i]:.2f}" for i in order]
    truth = _panel(image, truth_boxes, truth_classes, truth_texts, f"ground truth: {_count(len(truth_boxes))}")
    caption = f"predictions: {_count(len(order))} (score >= {min_score:g})"
    predicted = _panel(image, predicted_boxes[order], predicted_classes[order], texts, caption)
    gap = np.full((truth.shape[0], PANEL_GAP, 3), DRAWN_BACKGROUND, dtype=np.uint8)
    return np.concatenate([truth, gap, predicted], axis=1)


def write_image(path: Path, image: Image) -> None:
    """Write an RGB picture as PNG or JPEG, after the suffix of `path`; a reader never sees half a file.

    Raises:
        OSError: the folder cannot be written to. The picture is not fsynced: it can be drawn again.
    """
    assert path.suffix.lower() in {".png", ".jpg", ".jpeg"}, f"no such picture format: {path}"
    options = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, DRAWN_QUALITY]
    done, data = cv2.imencode(path.suffix.lower(), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert done, f"OpenCV cannot encode {path.suffix}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.tobytes())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def class_colour(position: int) -> Colour:
    """RGB colour of a class: neighbours differ clearly, and the same class always has the same one."""
    # Steps of the golden ratio spread any number of hues evenly; two alternations keep hues that come close apart.
    hue = (0.56 + position * 0.618034) % 1.0
    saturation, value = (0.85, 0.6)[position // 2 % 2], (1.0, 0.85)[position // 4 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(image: Image, boxes: NDArray[np.float32], classes: NDArray[np.int64], texts: Sequence[str], caption: str) -> Image:
    """One side: the resized image under a caption, with boxes below all labels."""
    height, width = image.shape[:2]
    scale = float(np.clip(max(height, width), MIN_DRAWN, MAX_DRAWN)) / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = np.full((size[1], max(size[0], MIN_WIDTH), 3), DRAWN_BACKGROUND, dtype=np.uint8)
    canvas[:, : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # A network that diverged predicts boxes that are not numbers; they have no place in the picture.
    drawable = np.flatnonzero(np.isfinite(boxes).all(axis=1)).tolist()
    corners = np.clip(np.round(boxes[drawable] * scale), 0, [size[0] - 1, size[1] - 1] * 2).astype(np.int64).tolist()
    colours = [class_colour(int(classes[i])) for i in drawable]
    for (left, top, right, bottom), colour in zip(corners, colours, strict=True):
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, 2, cv2.LINE_AA)
    for i, (left, top, _, _), colour in zip(drawable, corners, colours, strict=True):
        _label(canvas, texts[i], left, top, colour)
    return np.concatenate([_caption(caption, canvas.shape[1]), canvas])


def _label(canvas: Image, text: str, left: int, top: int, colour: Colour) -> None:
    """Write on a filled tag above the box, or inside it where the picture ends; never cut off at the right."""
    (width, height), baseline = cv2.getTextSize(text, FONT, LABEL_SCALE, 1)
    tag_width, tag_height = width + 6, height + baseline + 3
    x = max(0, min(left - 1, canvas.shape[1] - tag_width))
    y = top - tag_height if top >= tag_height else top
    cv2.rectangle(canvas, (x, y), (x + tag_width, y + tag_height), colour, cv2.FILLED)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(canvas, text, (x + 3, y + height + 2), FONT, LABEL_SCALE, ink, 1, cv2.LINE_AA)


def _caption(text: str, width: int) -> Image:
    strip = np.full((CAPTION_HEIGHT, width, 3), DRAWN_BACKGROUND, dtype=np.uint8)
    natural = cv2.getTextSize(text, FONT, CAPTION_SCALE, 1)[0][0]
    scale = CAPTION_SCALE * min(1.0, (width - 16) / natural)
    cv2.putText(strip, text, (8, CAPTION_HEIGHT - 11), FONT, scale, (235, 235, 235), 1, cv2.LINE_AA)
    return strip


def in_ascii(name: str, position: int) -> str:
    """A name in the ASCII letters OpenCV's font has: accents dropped, names in other scripts as `class 3`."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    shown = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in bare)
    return shown if 2 * shown.count("?") < len(shown) else f"class {position}"


def _count(number: int) -> str:
    return f"{number} object{'' if number == 1 else 's'}"
