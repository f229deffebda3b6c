"""Pictures to look for objects in: out of files, arrays, tensors and Pillow's images."""

from __future__ import annotations

import io
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageOps

from gai_yolo.data.header import SIDES_CHANGE, Header, read_header
from gai_yolo.data.images import Image, decode_bytes, turned
from gai_yolo.errors import DataError

PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF", "TGA", "ICO", "PCX", "SGI")
"""Pillow's names of what is read. Not among them: what is text (SVG) or a program (EPS)."""
PICTURE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".gif", ".jp2", ".j2k", ".avif", ".tga", ".ico", ".pcx", ".sgi"),
    )
)
"""By which they are known in a folder, in lower case."""
MOST_PICTURE_PIXELS, MOST_PICTURE_BYTES = 200_000_000, 2**31
"""Of a picture, and of its file. A few bytes can claim to be billions of pixels, and several pictures are in memory at a time."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image to look for objects in."""

    stored: Image
    """(H, W, 3) RGB, as in the file."""
    orientation: int = 1
    """EXIF's, 1 to 8: how they are to be turned. Done later, because evaluation turns images after it has resized them."""
    path: Path | None = None

    @property
    def height(self) -> int:
        """Of the turned picture, in pixels."""
        return len(self.stored[0]) if self.orientation >= SIDES_CHANGE else len(self.stored)

    @property
    def width(self) -> int:
        """Of the turned picture, in pixels."""
        return len(self.stored) if self.orientation >= SIDES_CHANGE else len(self.stored[0])

    def upright(self) -> Image:
        """(height, width, 3) RGB, turned."""
        return turned(self.stored, self.orientation)


def read_picture(path: Path) -> Picture:
    """Read a file: with OpenCV as training does, and with Pillow what OpenCV does not know. Of several pages or frames the first.

    A JPEG that ends too early is what OpenCV makes of it, nothing or a part, as in training.

    Raises:
        DataError: there is no such file, it cannot be read or decoded, or is too large.
    """
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise DataError(f"{path}: is a folder; give the files in it.")
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{path}: is no file that can be read to its end.")
        if not 0 < about.st_size <= MOST_PICTURE_BYTES:
            raise DataError(f"{path}: {'is empty' if not about.st_size else 'is too large a file for an image'}.")
        content = path.read_bytes()
        header = read_header(io.BytesIO(content), _formats())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:  # a name with a zero in it
        raise error if isinstance(error, DataError) else DataError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(header, Header):
        raise DataError(f"{path}: is no image of a format that is known, or damaged.")
    if header.width * header.height > MOST_PICTURE_PIXELS:
        raise DataError(f"{path}: says that it has {header.width} x {header.height} pixels; at most {MOST_PICTURE_PIXELS} are read.")
    try:
        stored = decode_bytes(content, path)
        pixels = _with_pillow(content, path) if stored is None else np.asarray(cv2.cvtColor(stored, cv2.COLOR_BGR2RGB), np.uint8)
    except (MemoryError, cv2.error):
        raise DataError(f"{path}: there is no memory left to decode its {header.width} x {header.height} pixels.") from None
    return Picture(pixels, header.orientation, path)


def as_picture(value: Any, name: str) -> Picture:
    """A picture out of what is in memory; a copy, because frames of a camera come in one place.

    Args:
        value: a NumPy array (H, W, 3) uint8 **RGB**, (H, W, 4) RGBA or (H, W) grey; a torch tensor (3, H, W), uint8 0..255 or floating
            point 0..1, RGB; an image of Pillow's, which is turned as its EXIF says. What is transparent is seen as if it was not.
        name: what errors call it.

    Raises:
        TypeError: it is none of these.
        ValueError: another shape, no pixel, or numbers that are not in the range.
        DataError: an image of Pillow's, whose file is damaged.
    """
    if isinstance(value, np.ndarray):
        return Picture(_of_array(value, name))
    if isinstance(value, torch.Tensor):
        return Picture(_of_tensor(value, name))
    if isinstance(value, Pillow.Image):
        try:
            return Picture(_of_pillow(ImageOps.exif_transpose(value), name))
        except (OSError, SyntaxError, EOFError, struct.error) as error:
            raise DataError(f"{name}: cannot be decoded ({error}).") from None
    raise TypeError(f"{name}: {type(value).__name__} is no image; give a path, a NumPy array, a torch tensor or an image of Pillow's.")


def _of_array(value: Any, name: str) -> Image:
    if value.dtype != np.uint8:
        raise TypeError(f"{name}: an array of {value.dtype}; give uint8, 0 to 255, in the order red, green, blue.")
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[..., 0]
    if 0 in value.shape or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))):
        raise ValueError(f"{name}: an array of shape {value.shape}; give (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey.")
    if value.ndim == 2:
        value = np.repeat(value[..., None], 3, axis=2)
    return np.array(value[..., :3], order="C")


def _of_tensor(value: torch.Tensor, name: str) -> Image:
    if value.ndim != 3 or value.shape[0] not in (1, 3) or 0 in value.shape:
        raise ValueError(f"{name}: a tensor of shape {tuple(value.shape)}; give (3, H, W) RGB.")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise TypeError(f"{name}: a tensor that holds no plain numbers; give a dense one of uint8 or floating point.")
    value = value.detach().cpu()
    if value.is_floating_point():
        value = value.float()
        if not bool(((value >= 0) & (value <= 1)).all()):  # nor what is no number
            raise ValueError(f"{name}: floating point outside of 0 to 1; divide by 255, or give uint8.")
        value = (value * 255).round().to(torch.uint8)
    if value.dtype != torch.uint8:
        raise TypeError(f"{name}: a tensor of {value.dtype}; give uint8, 0 to 255, or floating point, 0 to 1.")
    return _of_array(value.permute(1, 2, 0).numpy(), name)


def _with_pillow(content: bytes, path: Path) -> Image:
    try:
        with Pillow.open(io.BytesIO(content), formats=_formats()) as image:
            return _of_pillow(image, str(path))
    except MemoryError:
        raise
    except Exception as error:  # of a decoder that was given somebody's bytes anything may come
        raise error if isinstance(error, DataError) else DataError(f"{path}: cannot be decoded; the file is damaged.") from None


def _of_pillow(image: Pillow.Image, name: str) -> Image:
    if image.mode == "F":
        raise DataError(f"{name}: has pixels in floating point, whose range nobody knows; convert it to 8 bits.")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**16:
            raise DataError(f"{name}: has pixels of more than 16 bits; convert it to 8 bits.")
        return _of_array((values >> 8).astype(np.uint8), name)
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return _of_array(np.asarray(image.convert("RGB")), name)


def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow has."""
    Pillow.init()
    return tuple(name for name in PICTURE_FORMATS if name in Pillow.OPEN)


def described(value: Any, number: int) -> str:
    """What errors call one of several images."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else f"image {number}"
