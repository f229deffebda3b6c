"""Pictures out of files and of memory."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gai_yolo.errors import DataError
from gai_yolo.inference.pictures import as_picture, read_picture

RNG = np.random.default_rng(5)
RGB = np.asarray(cv2.GaussianBlur(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8), (0, 0), 4), np.uint8)
"""Red, green and blue differ."""


def distance(path: Path, expected: Any = RGB) -> float:
    """Mean difference of a file's picture from what it should be."""
    picture = read_picture(path).upright()
    assert picture.shape == expected.shape and picture.dtype == np.uint8
    return float(np.abs(picture.astype(float) - expected).mean())


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.ppm", "a.gif", "a.jpg", "a.tga", "a.jp2"])
def test_usual_formats_are_read_in_rgb(name: str, tmp_path: Path) -> None:
    """Loss: red and blue exchanged, or a format that every program reads refused."""
    Image.fromarray(RGB).save(tmp_path / name, lossless=True)  # of those that take it
    assert distance(tmp_path / name) < 4
    with (tmp_path / name).open("rb") as file:
        assert file.read(4), "the file is left as it was"


def test_what_scanners_printers_and_designers_write_is_read(tmp_path: Path) -> None:
    """Loss: a folder of photographs from a printing house of which none is looked at."""
    image = Image.fromarray(RGB)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert distance(tmp_path / "cmyk.jpg") < 6
    grey = np.asarray(image.convert("L"))
    three = np.repeat(grey[..., None], 3, axis=2)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "wide.tif")
    image.convert("LA").save(tmp_path / "alpha.png")
    for name in ("deep.png", "deep.tif", "wide.tif", "alpha.png"):
        assert distance(tmp_path / name, three) < 1.5, name
    image.quantize(200).save(tmp_path / "palette.png", transparency=3)
    assert distance(tmp_path / "palette.png") < 8
    Image.fromarray(RGB[::-1]).save(tmp_path / "moving.gif", save_all=True, append_images=[image])
    assert distance(tmp_path / "moving.gif", RGB[::-1]) < 4, "the first of its pictures"


def test_photographs_are_turned_as_a_person_sees_them(tmp_path: Path) -> None:
    """Loss: boxes that lie beside the objects in every viewer."""
    image = Image.fromarray(RGB)
    exif = Image.Exif()
    for orientation, stored in ((6, Image.Transpose.ROTATE_90), (5, Image.Transpose.TRANSPOSE), (3, Image.Transpose.ROTATE_180)):
        exif[0x0112] = orientation
        image.transpose(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
        picture = read_picture(tmp_path / "a.jpg")
        assert (picture.height, picture.width) == (40, 60)
        assert distance(tmp_path / "a.jpg") < 4
        with Image.open(tmp_path / "a.jpg") as opened:
            assert np.abs(as_picture(opened, "it").upright().astype(float) - RGB).mean() < 4


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 20_000, 3), (20_000, 3, 3)])
def test_strange_shapes_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Loss: one strip ends a command of hours."""
    Image.fromarray(np.full(shape, 7, np.uint8)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").upright().shape == shape


def bomb() -> bytes:
    """A small PNG that claims 60000 x 60000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    rows = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(rows)


def test_what_is_no_picture_is_said_with_its_name(tmp_path: Path) -> None:
    """Loss: a traceback; memory that is gone; a command that waits for a pipe for ever."""
    png = cv2.imencode(".png", RGB)[1].tobytes()
    contents = {"empty.jpg": b"", "text.jpg": b"hello", "half.png": png[: len(png) // 2], "bomb.png": bomb()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    said = {}
    for name in (*contents, "float.tif", "folder.jpg", "broken.jpg", "pipe.jpg", "missing.jpg", "zero\0.jpg"):
        with pytest.raises(DataError) as caught:
            read_picture(tmp_path / name)
        said[name] = str(caught.value)
        assert said[name].startswith(f"{tmp_path / name}: "), said[name]
    assert "is empty" in said["empty.jpg"] and "is a folder" in said["folder.jpg"] and "damaged" in said["half.png"]
    assert "60000 x 60000" in said["bomb.png"] and "floating point" in said["float.tif"]
    assert "No such file" in said["broken.jpg"] and "No such file" in said["missing.jpg"] and "no file" in said["pipe.jpg"]


def test_arrays_tensors_and_images_of_pillow_give_the_same_picture() -> None:
    """Loss: a result that depends on how the picture came here."""
    chw = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
    alpha = np.concatenate([RGB, np.zeros((40, 60, 1), np.uint8)], axis=2)
    for value in (RGB, alpha, chw, chw.float() / 255, (chw.double() / 255).requires_grad_(), Image.fromarray(RGB), Image.fromarray(alpha)):
        assert np.array_equal(as_picture(value, "it").upright(), RGB)
    grey = as_picture(RGB[..., 0], "it").upright()
    assert np.array_equal(grey, np.repeat(RGB[..., :1], 3, axis=2))
    assert np.array_equal(as_picture(RGB[..., :1], "it").upright(), grey)
    assert np.array_equal(as_picture(chw[:1], "it").upright(), grey)


def test_a_picture_keeps_what_it_was_when_the_array_changes() -> None:
    """Loss: the frames of a camera, which come in one place, are all the last one."""
    frame = RGB.copy()
    picture = as_picture(frame, "it")
    frame[:] = 0
    assert np.array_equal(picture.upright(), RGB)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (RGB.astype(np.float32), TypeError, "array of float32; give uint8"),
        (RGB.astype(np.int64), TypeError, "array of int64"),
        (RGB[0, 0], ValueError, r"shape \(3,\)"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"shape \(4, 4, 2\); give \(H, W, 3\) RGB"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "shape"),
        (torch.zeros(4, 4, 3), ValueError, r"shape \(4, 4, 3\); give \(3, H, W\)"),
        (torch.full((3, 4, 4), 200.0), ValueError, "outside of 0 to 1"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "outside of 0 to 1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "tensor of torch.int64"),
        (torch.zeros(3, 4, 4, device="meta"), TypeError, "no plain numbers"),
        (torch.zeros(3, 4, 4).to_sparse(), TypeError, "no plain numbers"),
        (b"bytes", TypeError, "bytes is no image"),
        (None, TypeError, "NoneType is no image"),
    ],
)
def test_what_is_no_picture_in_memory_is_a_mistake_that_is_named(value: Any, kind: type[Exception], says: str) -> None:
    """Loss: a picture that was divided by 255 twice, looked at as black."""
    with pytest.raises(kind, match=f"^image 4: .*{says}"):
        as_picture(value, "image 4")
