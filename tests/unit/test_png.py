"""PNG files of which libpng complains on the terminal: decoded in silence, or found to be broken in silence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gai_yolo.data.images import PNG_SIGNATURE, decode, quiet_png
from gai_yolo.data.index import make_record

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def png(mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    told = PngImagePlugin.PngInfo()
    told.add_text("what", "a text")
    Image.fromarray(PIXELS).convert(mode).save(stream, "PNG", pnginfo=told, **options)
    return stream.getvalue()


def decoded(path: Path, data: bytes) -> np.ndarray | None:
    path.write_bytes(data)
    return decode(make_record(1, path, 32, 24, [], []), 32)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize(
    "options", [{}, {"icc_profile": b"x" * 500}, {"icc_profile": b"bad"}, {"dpi": (300, 300)}], ids=lambda one: next(iter(one), "-")
)
def test_nothing_is_said_and_no_pixel_changes(
    mode: str, options: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Loss: a line of "libpng warning: iCCP: ..." for each image in each epoch, between the lines of the progress."""
    data = png(mode, **options) + b"what some cameras append"
    wanted = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    capfd.readouterr()
    found = decoded(tmp_path / "a.png", data)
    assert found is not None and wanted is not None and np.array_equal(found, wanted[:, :, ::-1])
    assert capfd.readouterr().err == ""


def test_what_is_torn_or_rotten_is_found_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: "libpng error: PNG input buffer is incomplete", of which file nobody knows."""
    data = png()
    for size in range(0, len(data), 13):
        assert decoded(tmp_path / "a.png", data[:size]) is None
    for place in range(data.index(b"IDAT") + 4, len(data), 7):
        assert decoded(tmp_path / "a.png", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is None
    assert capfd.readouterr().err == ""


def test_a_remark_that_is_rotten_spoils_no_picture(tmp_path: Path) -> None:
    """Loss: a picture that every viewer shows."""
    data = png()
    place = data.index(b"a text")
    assert decoded(tmp_path / "a.png", data[:place] + b"b" + data[place + 1 :]) is not None


def test_a_length_beyond_the_end_is_no_chunk() -> None:
    """Loss: an exception in a loader, or all of the memory."""
    chunk = struct.pack(">I4s", 2**32 - 1, b"IDAT")
    assert quiet_png(PNG_SIGNATURE + chunk) is None and quiet_png(PNG_SIGNATURE) is None and quiet_png(b"") is None
    end = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
    assert quiet_png(PNG_SIGNATURE + end) == PNG_SIGNATURE + end
