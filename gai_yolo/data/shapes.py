"""The built-in data set: textured shapes that overlap on textured grounds, drawn when it is first asked for.

Every pixel follows from the constants below and the image's number, so two machines that share no disk have the same data
set. Not promised: equal low bits of the pixels under other versions of NumPy and OpenCV or on another kind of CPU; the
boxes are far more robust, and only they are in the index's digest. Whoever changes a constant or the drawing raises
`SHAPES_VERSION`, so that old copies are not mistaken for new ones.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from gai_yolo.errors import DataError, refused_by

SHAPES_VERSION = 1
SEED = 20250218
NUM_IMAGES = {"train": 400, "val": 80}
CLASS_NAMES = ("circle", "triangle", "square", "star")
IMAGE_SIDES = (176, 257)
"""Least side and one more than the greatest, in pixels; width and height are drawn independently."""
OBJECTS = (1, 7)
"""Least number of objects and one more than the greatest."""
DIAMETERS = (28.0, 110.0)
"""Of the circle around a shape, in pixels; log-uniform."""
MIN_VISIBLE = 0.6
"""A shape of which less would be seen, behind others or beyond the border, is put elsewhere or left out."""
JPEG_QUALITY = 92

_LOCK_SECONDS = 60.0
_SHIFT = 4  # OpenCV's fixed-point bits: corners are drawn to 1/16 pixel
_CIRCLE_CORNERS = 64
_STAR_INNER = 0.45
_SHADOW_REACH = 12

Image = NDArray[np.uint8]
Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """One drawn image: (H, W, 3) uint8 BGR, and of each object the class position and its visible pixels (H, W)."""

    pixels: Image
    objects: list[tuple[int, Mask]]


def ensure_shapes(cache_folder: Path) -> Path:
    """The folder of the data set (COCO layout), drawing it first if it is not there.

    It appears by a rename, hence complete or not at all. Several processes may call at the same time: one draws and
    the others wait; where locks do not work each draws its own after a while, and the first rename stays.

    Raises:
        DataError: the folder cannot be written.
    """
    target = cache_folder / f"shapes-v{SHAPES_VERSION}"
    try:
        if target.is_dir():
            return target
        cache_folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_folder / f"{target.name}.lock", timeout=_LOCK_SECONDS)
        with suppress(Timeout, NotImplementedError):
            lock.acquire()
        try:
            if not target.is_dir():
                _publish(target)
        finally:
            lock.release()
    except OSError as error:
        refusal = DataError(
            f"{target}: cannot write the built-in data set ({error.strerror or error}); set data.cache_folder to a folder with some room."
        )
        raise refused_by(error, refusal) from None
    return target


def write_shapes(folder: Path) -> None:
    """Draw the data set into an existing empty folder: annotations/{train,val}.json and images/{train,val}.

    Raises:
        OSError: the disk refuses.
    """
    (folder / "annotations").mkdir()
    for number, (split, count) in enumerate(NUM_IMAGES.items()):
        (folder / "images" / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for position in range(count):
            scene = draw_scene(number, position)
            name = f"shapes_{position + 1:06d}.jpg"
            done, data = cv2.imencode(".jpg", scene.pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            assert done, "OpenCV could not encode a JPEG"
            (folder / "images" / split / name).write_bytes(data.tobytes())
            height, width = scene.pixels.shape[:2]
            images.append({"id": position + 1, "file_name": name, "width": width, "height": height})
            for class_position, visible in scene.objects:
                annotations.append(_annotation(len(annotations) + 1, position + 1, class_position, visible))
        categories = [{"id": class_position + 1, "name": name} for class_position, name in enumerate(CLASS_NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def draw_scene(split_number: int, position: int) -> Scene:
    """Draw one image; a pure function of its arguments and the constants of this file."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, SHAPES_VERSION, split_number, position])))
    width, height = (int(side) for side in rng.integers(*IMAGE_SIDES, size=2))
    canvas = _ground(rng, width, height)
    objects: list[tuple[int, Mask]] = []
    whole: list[int] = []
    for _ in range(int(rng.integers(*OBJECTS))):
        class_position = int(rng.integers(len(CLASS_NAMES)))
        placed = _place(rng, class_position, width, height, objects, whole)
        if placed is None:
            continue
        alpha, area = placed
        mask = alpha > 0.5
        objects = [(other, visible & ~mask) for other, visible in objects] + [(class_position, mask)]
        whole.append(area)
        _paint(rng, canvas, alpha)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1.0, 6.0))
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects)


def _publish(target: Path) -> None:
    temp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_shapes(temp)
        for path in (*sorted(temp.rglob("*")), temp):
            _sync(path)  # otherwise a power cut may leave a whole folder of files with zeros in them
        temp.chmod(0o755)  # mkdtemp's folders are private; a cache may be shared
        try:
            temp.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _annotation(number: int, image_id: int, class_position: int, visible: Mask) -> dict[str, Any]:
    box, area = list(cv2.boundingRect(visible.astype(np.uint8))), int(visible.sum())
    return {"id": number, "image_id": image_id, "category_id": class_position + 1, "bbox": box, "area": area, "iscrowd": 0}


def _place(
    rng: np.random.Generator, class_position: int, width: int, height: int, objects: list[tuple[int, Mask]], whole: list[int]
) -> tuple[Plane, int] | None:
    """Coverage (H, W) in [0, 1] of a new shape and its whole area in pixels, or None if it hides too much everywhere."""
    radius = float(np.exp(rng.uniform(*np.log(DIAMETERS)))) / 2
    outline = _outline(class_position, rng) * radius
    margin = int(np.ceil(radius))
    for _ in range(12):
        centre = rng.uniform((radius * 0.7, radius * 0.7), (width - radius * 0.7, height - radius * 0.7))
        padded = np.zeros((height + 2 * margin, width + 2 * margin), np.uint8)
        corners = np.rint((outline + centre + margin) * 2**_SHIFT).astype(np.int32)
        cv2.fillPoly(padded, [corners], 255, cv2.LINE_AA, _SHIFT)
        alpha: Plane = padded[margin:-margin, margin:-margin].astype(np.float32) / np.float32(255)
        mask, area = alpha > 0.5, int((padded > 127).sum())
        seen = [int((visible & ~mask).sum()) for _, visible in objects]
        enough = all(count >= MIN_VISIBLE * full for count, full in zip(seen, whole, strict=True))
        if enough and mask.sum() >= MIN_VISIBLE * area:
            return alpha, area
    return None


def _outline(class_position: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners (N, 2) of a randomly turned shape in the unit circle."""
    name = CLASS_NAMES[class_position]
    count = {"circle": _CIRCLE_CORNERS, "triangle": 3, "square": 4, "star": 10}[name]
    angles = np.arange(count) * 2 * np.pi / count + rng.uniform(0, 2 * np.pi)
    radii = np.where(np.arange(count) % 2 == 1, _STAR_INNER, 1.0) if name == "star" else np.ones(count)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _paint(rng: np.random.Generator, canvas: Plane, alpha: Plane) -> None:
    """Lay a shape with a soft shadow and a darker rim over the canvas, in place."""
    rows, columns = (_span(alpha.max(axis=axis), canvas.shape[1 - axis]) for axis in (1, 0))
    part, cover = canvas[rows, columns], alpha[rows, columns]
    height, width = cover.shape
    shift = np.array([[1, 0, rng.uniform(1, 4)], [0, 1, rng.uniform(1, 4)]], np.float64)
    shadow = cv2.GaussianBlur(cv2.warpAffine(cover, shift, (width, height)), (0, 0), 2.5)
    part *= (1 - 0.45 * shadow)[..., None]
    inner = cv2.erode(cover, np.ones((3, 3), np.uint8))
    fill = _texture(rng, width, height) * (0.55 + 0.45 * inner)[..., None]
    part += (fill - part) * cover[..., None]


def _span(cover: Plane, side: int) -> slice:
    """Where a shape and its shadow lie along one side."""
    found = np.flatnonzero(cover)
    return slice(max(int(found[0]) - _SHADOW_REACH, 0), min(int(found[-1]) + 1 + _SHADOW_REACH, side))


def _texture(rng: np.random.Generator, width: int, height: int) -> Plane:
    """(H, W, 3) BGR of a vivid material: stripes, dots, a gradient, or grain."""
    hue = float(rng.uniform(0, 180))
    first = _colour(hue, float(rng.uniform(150, 240)), float(rng.uniform(150, 250)))
    second = _colour(hue + float(rng.uniform(-25, 25)), float(rng.uniform(90, 220)), float(rng.uniform(90, 235)))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = float(rng.uniform(0, np.pi)), float(rng.uniform(6, 16))
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = int(rng.integers(4))
    if kind == 0:
        mix = np.clip(0.5 + 1.5 * np.sin(u * (2 * np.pi / period)), 0, 1)
    elif kind == 1:
        mix = np.clip(1.0 + 3 * (np.cos(u * (2 * np.pi / period)) + np.cos(v * (2 * np.pi / period)) - 0.8), 0, 1)
    elif kind == 2:
        mix = 0.5 + 0.5 * np.sin(u * (np.pi / 90) + rng.uniform(0, 2 * np.pi))
    else:
        mix = _clouds(rng, width, height, cells=max(width, height) // int(rng.integers(5, 12)))
    return _blend(first, second, mix)


def _ground(rng: np.random.Generator, width: int, height: int) -> Plane:
    """(H, W, 3) BGR of a muted ground: clouds of two tones at two scales, with a few thin lines for clutter."""
    hue = float(rng.uniform(0, 180))
    first = _colour(hue, float(rng.uniform(5, 60)), float(rng.uniform(60, 210)))
    second = _colour(hue + float(rng.uniform(-40, 40)), float(rng.uniform(5, 70)), float(rng.uniform(60, 210)))
    coarse, fine = _clouds(rng, width, height, int(rng.integers(3, 7))), _clouds(rng, width, height, int(rng.integers(20, 60)))
    canvas = _blend(first, second, 0.7 * coarse + 0.3 * fine)
    for _ in range(int(rng.integers(0, 6))):
        ends = rng.uniform((-20, -20), (width + 20, height + 20), size=(2, 2))
        tone = [float(value) for value in _colour(float(rng.uniform(0, 180)), 50.0, float(rng.uniform(50, 220)))]
        start, end = (np.rint(point * 2**_SHIFT).astype(int).tolist() for point in ends)
        cv2.line(canvas, start, end, tone, int(rng.integers(1, 3)), cv2.LINE_AA, _SHIFT)
    return canvas


def _clouds(rng: np.random.Generator, width: int, height: int, cells: int) -> Plane:
    """(H, W) smooth noise in [0, 1] with about `cells` bumps along each side."""
    noise = rng.random((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1).astype(np.float32)


def _blend(first: Plane, second: Plane, mix: NDArray[np.floating[Any]]) -> Plane:
    return (first + (second - first) * mix[..., None]).astype(np.float32)


def _colour(hue: float, saturation: float, value: float) -> Plane:
    """BGR of an OpenCV HSV colour (hue 0..180, the others 0..255)."""
    hsv = np.array([[[hue % 180, saturation, value]]], np.uint8)
    colour: Plane = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)
    return colour
