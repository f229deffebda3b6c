"""What the beginning of an image file says: its size, and how it is to be turned."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from gai_yolo.data.formats import reading
from gai_yolo.data.formats.reading import Doubt, patiently

Image.MAX_IMAGE_PIXELS = None  # only headers are read with it; what can be decoded is up to OpenCV
ORIENTATION, SIDES_CHANGE = 0x0112, 5
"""EXIF's tag, and from which of its values on width and height change places."""
MOST_PIXELS, LONGEST_SIDE = 2**30, 2**20
"""What OpenCV decodes."""
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM")
"""Formats that OpenCV decodes as well; a file that only Pillow understands would fail in the loader."""

UNREADABLE = "image unreadable"
TOO_LARGE = "image with more pixels than OpenCV decodes"
UNOPENED = "image file cannot be opened"


class Header(NamedTuple):
    """What the beginning of an image file says."""

    width: int
    height: int
    """As stored."""
    orientation: int = 1
    """1 to 8: how the stored pixels are to be turned before a person looks at them."""


def image_size(path: Path, doubt: Doubt) -> Header | str:
    """What a file's header says, or what is wrong with it: `UNREADABLE`, `TOO_LARGE`, or `UNOPENED` where the reason is beside the file.

    Raises:
        CannotRead: the disk or the network fails.
    """

    def look() -> Header | str:
        with reading.open_file(path) as file:
            return read_header(file)

    try:
        header = patiently(look, path, doubt)
    except (OSError, ValueError):
        return UNOPENED
    if isinstance(header, Header) and (header.width * header.height > MOST_PIXELS or max(header[:2]) > LONGEST_SIDE):
        return TOO_LARGE
    return header


def read_header(file: BinaryIO, formats: tuple[str, ...] = _FORMATS) -> Header | str:
    """What the beginning of an open file says, or `UNREADABLE`.

    Args:
        formats: Pillow's names of those that are tried.

    Raises:
        OSError: the disk or the network fails.
    """
    try:
        with Image.open(file, formats=formats) as image:
            header = Header(*image.size, _orientation(image))
    except OSError as error:
        if error.errno is not None:
            raise
        return UNREADABLE  # Pillow's own, of what is in the file
    except (ValueError, SyntaxError, EOFError, OverflowError, struct.error, Image.DecompressionBombError):
        return UNREADABLE
    return header if min(header[:2]) > 0 else UNREADABLE


def _orientation(image: Image.Image) -> int:
    data = image.info.get("exif")  # what stands before the pixels; Pillow's getexif() decodes a whole PNG for what may stand behind them
    if not isinstance(data, bytes) or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, LookupError, TypeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
