"""Pictures for people: boxes with labels on an image, ground truth and predictions side by side."""

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

from gai_yolo.reporting.placing import place_labels

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
SMALLEST_LABEL, LARGEST_LABEL = 0.33, 8.0
"""Of OpenCV's font, whose capital letters have 21 pixels at 1.0."""
LINE_SHARE = 0.0018
"""Thickness of a box's line, as part of a picture's height and width together: 2 pixels at 640 x 480."""
FIRST_COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167), (190, 190, 190)),
)
"""Of the first classes: those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), which colour-blind people tell apart; grey in the
place of black, which is not seen on dark pictures."""
LIGHTNESSES = (0.72, 0.42, 0.58, 0.32)
"""Of the classes after them, in turn: more hues than eight nobody tells apart, light from dark everybody."""


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
    # The surest first, which get the best places for their labels; equal scores keep their order.
    order = np.argsort(-predicted_scores, kind="stable")
    order = order[predicted_scores[order] >= min_score]
    truth_texts = [in_ascii(class_names[c], c) for c in truth_classes.tolist()]
    texts = label_texts(predicted_scores[order], predicted_classes[order], class_names)
    truth = _panel(image, truth_boxes, truth_classes, truth_texts, f"ground truth: {_count(len(truth_boxes))}")
    caption = f"predictions: {_count(len(order))} (score >= {min_score:g})"
    predicted = _panel(image, predicted_boxes[order], predicted_classes[order], texts, caption)
    gap = np.full((truth.shape[0], PANEL_GAP, 3), DRAWN_BACKGROUND, dtype=np.uint8)
    return np.concatenate([truth, gap, predicted], axis=1)


def draw_detections(
    image: Image, boxes: NDArray[np.float32], scores: NDArray[np.float32], classes: NDArray[np.int64], class_names: Sequence[str]
) -> Image:
    """A copy of an image, at its own size, with boxes, names and scores on it; lines and letters grow with it.

    Args:
        image: (H, W, 3) RGB.
        boxes: (N, 4) xyxy in pixels of `image`, with `scores` (N,) in [0, 1] and `classes` (N,), by descending score.
        class_names: name of each class position.
    """
    canvas = np.array(image, order="C")
    draw_boxes(canvas, boxes, classes, label_texts(scores, classes, class_names), label_scale(*image.shape[:2]))
    return canvas


def draw_boxes(canvas: Image, boxes: NDArray[np.float32], classes: NDArray[np.int64], texts: Sequence[str], scale: float) -> None:
    """Draw on an image itself: boxes below all labels, the first ones on top.

    Args:
        canvas: (H, W, 3) RGB, contiguous.
        boxes: (N, 4) xyxy in its pixels, with `classes` (N,) and `texts`, in ASCII, the most important first.
        scale: of the letters.
    """
    height, width = canvas.shape[:2]
    # A network that diverged predicts boxes that are not numbers; they have no place in the picture.
    drawable = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    corners = np.clip(np.round(boxes[drawable]), 0, [width - 1, height - 1] * 2).astype(np.int64)
    colours = [class_colour(int(number)) for number in classes[drawable]]
    line = max(1, round(LINE_SHARE * (height + width)))
    for (left, top, right, bottom), colour in reversed(list(zip(corners.tolist(), colours, strict=True))):
        if line > 1:  # A dark one below it, because the image may have the box's colour; in a small picture it would hide too much.
            cv2.rectangle(canvas, (left, top), (right, bottom), DRAWN_BACKGROUND, line + 2 * max(1, line // 3), cv2.LINE_AA)
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, line, cv2.LINE_AA)
    shown = [texts[number] for number in drawable.tolist()]
    sizes = np.array([_tag_size(text, scale) for text in shown], dtype=np.int64).reshape(-1, 2)
    for text, place, colour in zip(shown, place_labels(corners, sizes, width, height), colours, strict=True):
        if place is not None:
            _label(canvas, text, place, colour, scale)


def label_texts(scores: NDArray[np.float32], classes: NDArray[np.int64], class_names: Sequence[str]) -> list[str]:
    """Name and score of each detection, in ASCII."""
    return [f"{in_ascii(class_names[c], c)} {score:.2f}" for c, score in zip(classes.tolist(), scores.tolist(), strict=True)]


def label_scale(height: int, width: int) -> float:
    """Of letters on an image of so many pixels: a picture of 800 x 600, and what is shown at its size, gets `LABEL_SCALE`."""
    return float(np.clip(LABEL_SCALE * (height + width) / 1400, SMALLEST_LABEL, LARGEST_LABEL))


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
    if position < len(FIRST_COLOURS):
        return FIRST_COLOURS[position]
    # Steps of the golden ratio spread any number of hues evenly.
    hue, lightness = (0.12 + position * 0.618034) % 1.0, LIGHTNESSES[position % len(LIGHTNESSES)]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(image: Image, boxes: NDArray[np.float32], classes: NDArray[np.int64], texts: Sequence[str], caption: str) -> Image:
    """One side: the resized image under a caption, with boxes below all labels."""
    height, width = image.shape[:2]
    scale = float(np.clip(max(height, width), MIN_DRAWN, MAX_DRAWN)) / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = np.full((size[1], max(size[0], MIN_WIDTH), 3), DRAWN_BACKGROUND, dtype=np.uint8)
    canvas[:, : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # Boxes end with the image; labels may use the margin beside it.
    inside = np.where(np.isfinite(boxes), np.clip(boxes * scale, 0, [size[0] - 1, size[1] - 1] * 2), np.nan).astype(np.float32)
    draw_boxes(canvas, inside, classes, texts, LABEL_SCALE)
    return np.concatenate([_caption(caption, canvas.shape[1]), canvas])


def _tag_size(text: str, scale: float) -> tuple[int, int]:
    """Width and height of a label in pixels."""
    (width, height), baseline = cv2.getTextSize(text, FONT, scale, _stroke(scale))
    return width + 2 * _margin(scale), height + baseline + _margin(scale)


def _label(canvas: Image, text: str, place: tuple[int, int], colour: Colour, scale: float) -> None:
    """Write on a filled tag whose left and top are given."""
    (left, top), (width, height) = place, _tag_size(text, scale)
    cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), colour, cv2.FILLED)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    ink = (0, 0, 0) if bright else (255, 255, 255)
    bottom = top + cv2.getTextSize(text, FONT, scale, _stroke(scale))[0][1] + _margin(scale) // 2 + 1
    cv2.putText(canvas, text, (left + _margin(scale), bottom), FONT, scale, ink, _stroke(scale), cv2.LINE_AA)


def _margin(scale: float) -> int:
    return max(2, round(scale * 7))


def _stroke(scale: float) -> int:
    return max(1, round(scale * 2))


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
