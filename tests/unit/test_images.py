"""Decoding and caching images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.data.images import ImageSource, decode, fitted_size, pack_image
from gai_yolo.data.index import ImageRecord, make_record

WriteImages = Callable[[int], list[ImageRecord]]
SIZE = 64


def test_longer_side_is_brought_to_the_image_size(write_images: WriteImages) -> None:
    """Loss: distorted pictures, or sizes that differ from what the boxes are scaled by."""
    for record in write_images(4):
        image = decode(record, SIZE)
        assert image is not None
        assert image.shape == (*fitted_size(record, SIZE), 3)
        assert max(image.shape) == SIZE
        assert abs(image.shape[0] / image.shape[1] - record.height / record.width) < 0.03


@pytest.mark.parametrize("width", [1, 3000])
def test_extreme_shapes_keep_at_least_one_pixel(width: int, tmp_path: Path) -> None:
    """Loss: a strip of 1 x 3000 pixels ends the run in a resize to nothing."""
    path = tmp_path / "strip.png"
    assert cv2.imwrite(str(path), np.full((3001 - width, width, 3), 7, dtype=np.uint8))
    image = decode(make_record(1, path, width, 3001 - width, [], []), SIZE)
    assert image is not None and sorted(image.shape[:2]) == [1, SIZE]


def test_grey_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    """Loss: the first grey or transparent file of a data set ends the run."""
    for name, shape in (("grey", (8, 8)), ("alpha", (8, 8, 4))):
        path = tmp_path / f"{name}.png"
        assert cv2.imwrite(str(path), np.full(shape, 200, dtype=np.uint8))
        image = decode(make_record(1, path, 8, 8, [], []), SIZE)
        assert image is not None and image.shape == (SIZE, SIZE, 3) and (image == 200).all()


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    """Loss: a phone's pictures are turned under their boxes, which refer to the pixels as stored."""
    from PIL import Image as Pillow

    exif = Pillow.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:, :16] = 255
    Pillow.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    image = decode(make_record(1, tmp_path / "a.jpg", 32, 16, [], []), 32)
    assert image is not None and image.shape == (16, 32, 3)
    assert image[:, :16].min() > 250 and image[:, 16:].max() < 5


def cached_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "images").iterdir())


def test_disk_cache_is_filled_once_and_used(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: a cache that is written and never read."""
    records = write_images(2)
    first = [ImageSource(records, SIZE, "disk", tmp_path / "cache").load(p) for p in (0, 1)]
    files = cached_files(tmp_path)
    assert len(files) == 2
    marked = np.zeros((48, 64, 3), dtype=np.uint8)
    for file in files:
        file.write_bytes(pack_image(marked))
    again = ImageSource(records, SIZE, "disk", tmp_path / "cache").load(0)
    assert again is not None and not again.any(), "it comes from the cache"
    assert first[0] is not None and first[0].any()


@pytest.mark.parametrize("left", ["empty", "header", "half", "garbage", "other array", "zeros at the end", "zeros"])
def test_torn_cache_file_is_decoded_again(left: str, write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: a power cut during the first epoch makes every later start fail, or train on black pictures."""
    records = write_images(1)
    source = ImageSource(records, SIZE, "disk", tmp_path / "cache")
    expected = source.load(0)
    (file,) = cached_files(tmp_path)
    whole = file.read_bytes()
    if left.startswith("zeros"):
        kept = len(whole) // 2 if "end" in left else 0
        file.write_bytes(whole[:kept] + bytes(len(whole) - kept))
    elif left == "other array":
        np.save(file, np.zeros((4, 4)))
    else:
        file.write_bytes({"empty": b"", "header": whole[:40], "half": whole[: len(whole) // 2], "garbage": b"x" * 300}[left])
    for _ in range(2):
        image = source.load(0)
        assert expected is not None and image is not None and np.array_equal(image, expected)
        assert file.read_bytes() == whole, "and mended"


def test_changed_image_is_not_taken_from_the_disk_cache(tmp_path: Path) -> None:
    """Loss: a corrected data set goes on with the old pictures, or another image size with the old size."""
    path = tmp_path / "a.bmp"  # the same number of bytes whatever the picture
    record = make_record(1, path, 64, 48, [], [])
    levels = []
    for number, level in enumerate((10, 250)):
        assert cv2.imwrite(str(path), np.full((48, 64, 3), level, dtype=np.uint8))
        os.utime(path, (1e9 + number, 1e9 + number))
        image = ImageSource([record], SIZE, "disk", tmp_path / "cache").load(0)
        assert image is not None
        levels.append(int(image.max()))
    assert levels == [10, 250]
    smaller = ImageSource([record], 32, "disk", tmp_path / "cache").load(0)
    assert smaller is not None and max(smaller.shape) == 32


def test_picture_that_was_replaced_under_its_old_size_and_time_is_not_taken_from_the_disk_cache(tmp_path: Path) -> None:
    """Loss: a tool that keeps times (rsync, tar) brings other pictures, and the old ones are trained on."""
    path = tmp_path / "a.bmp"
    source = ImageSource([make_record(1, path, 64, 48, [], [])], SIZE, "disk", tmp_path / "cache")
    levels = []
    for level in (10, 250):
        assert cv2.imwrite(str(path), np.full((48, 64, 3), level, dtype=np.uint8))
        os.utime(path, (1e9, 1e9))
        image = source.load(0)
        assert image is not None
        levels.append(int(image.max()))
    assert levels == [10, 250]


FULL_DISK = """
import resource, sys
from pathlib import Path
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import make_record
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # writing beyond it fails like a full disk
source = ImageSource([make_record(1, Path(sys.argv[1]), 64, 48, [], [])], 64, "disk", Path(sys.argv[2]))
for _ in range(3):
    assert source.load(0).shape == (48, 64, 3)
"""


def test_full_cache_disk_costs_speed_only(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: training ends because a cache is full, or fills the last of the disk with halves of files."""
    (record,) = write_images(1)
    command = [sys.executable, "-c", FULL_DISK, str(record.path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert cached_files(tmp_path) == [], "no halves are left"


def test_ram_cache_too_large_for_the_machine_is_told_and_left_out(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: the machine swaps, or the kernel kills the run, because of a setting meant to speed it up."""
    records = write_images(2)
    huge = [*records, *(replace(records[0], image_id=i) for i in range(1000))]
    source = ImageSource(huge, 2**17, "ram", tmp_path)  # nothing is decoded at this size
    assert "ram would need" in source.note
    small = ImageSource(records, SIZE, "ram", tmp_path)
    assert small.note == ""
    records[0].path.unlink()
    assert small.load(0) is not None, "it comes from memory"
