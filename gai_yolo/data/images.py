"""Decoding images to the size that training works on, with an optional cache in memory or on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Collection, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.formats.reading import expand, patiently, read_file
from gai_yolo.data.header import SIDES_CHANGE
from gai_yolo.data.index import ImageRecord, Index
from gai_yolo.errors import DataError, refused_by
from gai_yolo.machine import available_cores, available_memory

# OpenCV's lines about files that it cannot decode name none of them; this program does.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Image = NDArray[np.uint8]
"""(H, W, 3) RGB."""

GREY = 114
"""Fill value of padding, as in the published recipe."""
CHECKSUM = struct.Struct("<4xI")
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
"""EXIF's orientations (CIPA DC-008, 4.6.5) that need OpenCV's flip (0: top down, 1: left right, -1: both), from `SIDES_CHANGE` on of the
transposed image."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_HEAD, PNG_CRC = struct.Struct(">I4s"), struct.Struct(">I")
UNUSED = b"iCCP"
"""The colour profile: OpenCV does not use it, and programs write wrong ones, of which libpng complains at each decoding."""
NO_MEMORY = -4
"""OpenCV's `Error::StsNoMem`."""
MOST_TRIED = 100
"""Images of a split that are decoded before a training begins."""
MEMORY_SHARE = 0.6
"""At most this part of the available memory is given to cached images."""


def fitted_size(record: ImageRecord, image_size: int) -> tuple[int, int]:
    """Height and width of the image after its longer side was brought to `image_size`."""
    return fitted_sides(record.height, record.width, image_size)


def fitted_sides(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width after the longer one was brought to `image_size`; at least 1."""
    scale = image_size / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resized(image: Image, height: int, width: int) -> Image:
    """An image `(H, W, 3)` in another size, with the filter that training sees images through."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    return _as_image(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def decode(record: ImageRecord, image_size: int, patience: float | None = None) -> Image | None:
    """Read and resize an image so that its longer side is `image_size`; None where its bytes were read and cannot be decoded.

    Turned as the index says, which has decided what the annotations refer to.

    Raises:
        CannotRead: the bytes cannot be had, for `patience` seconds (None: `reading.PATIENCE`).
        MemoryError: there is no room for the image.
    """
    image = decode_bytes(read_file(record.path, patience=patience), record.path)
    if image is None:
        return None
    height, width = fitted_size(record, image_size)
    if record.orientation >= SIDES_CHANGE:
        height, width = width, height
    return turned(_as_image(cv2.cvtColor(resized(image, height, width), cv2.COLOR_BGR2RGB)), record.orientation)


def decode_bytes(content: bytes, path: Path) -> Image | None:
    """The pixels of an image file as they are stored, (H, W, 3) in the order blue, green, red; None where it cannot be decoded.

    Raises:
        MemoryError: there is no room for the image; names `path`.
    """
    data = quiet_png(content) if content.startswith(PNG_SIGNATURE) else content
    try:
        array = np.frombuffer(data or b"", dtype=np.uint8)
        image = cv2.imdecode(array, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if array.size else None
    except cv2.error as error:
        if error.code == NO_MEMORY:
            raise MemoryError(f"{path}: there is no memory left to decode it") from None
        image = None
    return None if image is None else _as_image(image)


def turned(image: Image, orientation: int) -> Image:
    """Stored pixels as EXIF's orientation, 1 to 8, says that they are to be seen."""
    if orientation >= SIDES_CHANGE:
        image = _as_image(cv2.transpose(image))
    return _as_image(cv2.flip(image, FLIPS[orientation])) if orientation in FLIPS else image


def quiet_png(data: bytes) -> bytes | None:
    """A PNG file without what makes libpng complain and changes no pixel; None where it is torn or rotten, which libpng refuses as well.

    Chunks as in the PNG specification, 5.3: length, type, data, CRC-32 of type and data.
    """
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    view, start = memoryview(data), len(PNG_SIGNATURE)
    while start + CHUNK_HEAD.size + PNG_CRC.size <= len(view):
        length, kind = CHUNK_HEAD.unpack_from(view, start)
        end = start + CHUNK_HEAD.size + length + PNG_CRC.size
        if end > len(view):
            return None
        is_sound = PNG_CRC.unpack_from(view, end - PNG_CRC.size)[0] == zlib.crc32(view[start + 4 : end - PNG_CRC.size])
        is_critical = not kind[0] & 0x20
        if not is_sound and is_critical:
            return None
        if is_sound and kind != UNUSED:
            kept.append(view[start:end])
        if kind == b"IEND":
            return data if sum(map(len, kept)) == len(data) else b"".join(kept)
        start = end
    return None


def check_decodable(index: Index, image_size: int, max_bad_fraction: float) -> None:
    """Decode some images, all of a small split, before a training begins: their headers may be right, and the rest unreadable.

    Raises:
        DataError: as `refuse_undecodable`.
        CannotRead: as `decode`.
    """
    positions = [position for position in tried_positions(len(index)) if position not in index.lost]
    with ThreadPoolExecutor(available_cores()) as pool:
        images = pool.map(lambda position: decode(index.images[position], image_size) is None, positions)
        bad = {position for position, is_bad in zip(positions, images, strict=True) if is_bad}
    refuse_undecodable(index, bad, max_bad_fraction)


def tried_positions(num_images: int) -> list[int]:
    """Which images of a split are decoded before a training begins: spread over it, both ends included."""
    return list(np.unique(np.linspace(0, num_images - 1, min(MOST_TRIED, num_images)).round().astype(int)).tolist())


def refuse_undecodable(index: Index, undecodable: Set[int], max_bad_fraction: float) -> None:
    """Judge a split by those of its images that are tried before a training begins.

    Args:
        undecodable: positions of images that cannot be decoded; others than those that are tried do not count.

    Raises:
        DataError: of those that are tried, more than `max_bad_fraction` cannot be decoded.
    """
    positions = tried_positions(len(index))
    bad = [index.images[position].path for position in positions if position in undecodable]
    if len(bad) > max_bad_fraction * len(positions) or len(bad) == len(positions):
        raise DataError(
            f"{index.source}: {len(bad)} of {len(positions)} images that were tried cannot be decoded, more than data.max_bad_fraction = "
            f"{max_bad_fraction:g} allows (first: {bad[0]}); restore the files, or convert them to jpg or png with 8 bits."
        )


class ImageSource:
    """Brings images by their position in the index; the result is the same with every cache.

    Args:
        cache: `none`, `ram` (filled on construction, shared with forked loader workers) or `disk` (filled on first use).
        lost: positions of images that are not there any more, see `Index.lost`.

    Raises:
        DataError: the cache folder cannot be made.
        CannotRead: as `decode`, while the memory is filled.
    """

    def __init__(
        self, records: Sequence[ImageRecord], image_size: int, cache: str, cache_folder: Path, lost: Collection[int] = frozenset()
    ) -> None:
        self.records = records
        self._lost = lost
        self.image_size = image_size
        self._folder = expand(cache_folder) / "images" if cache == "disk" else None
        self._memory: list[Image | None] | None = None
        self.note = ""
        """What the user should be told about the cache, or an empty string."""
        if cache == "ram":
            self._fill_memory()
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                refusal = DataError(f"data.cache_folder: cannot write to {self._folder} ({error.strerror}); set another folder.")
                raise refused_by(error, refusal) from None

    def load(self, position: int) -> Image | None:
        """The image at a position, longer side `image_size`; None where it cannot be decoded. Not to be written to. Raises as `decode`."""
        if position in self._lost:
            return None
        if self._memory is not None:
            return self._memory[position]
        if self._folder is not None:
            return self._from_disk(self.records[position], self._folder)
        return decode(self.records[position], self.image_size)

    def _fill_memory(self) -> None:
        needed = sum(height * width * 3 for height, width in (fitted_size(r, self.image_size) for r in self.records))
        share = int(available_memory() * MEMORY_SHARE) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if needed > share:
            self.note = f"data.cache: ram would need {needed / 2**30:.1f} GiB of {share / 2**30:.1f} GiB; going on without a cache"
            return
        with ThreadPoolExecutor(min(32, available_cores() + 4)) as pool:
            self._memory = list(pool.map(self.load, range(len(self.records))))

    def _from_disk(self, record: ImageRecord, folder: Path) -> Image | None:
        stat = patiently(record.path.stat, record.path)
        file = f"{record.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {stat.st_ctime_ns}"
        key = f"{file} {self.image_size} {record.orientation}"
        cached = folder / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()}.npy"
        try:
            return unpack_image(cached.read_bytes())
        except (OSError, ValueError, EOFError):
            pass  # Not there yet, or torn by a crash: decode it again.
        image = decode(record, self.image_size)
        if image is not None:
            _store(cached, image)
        return image


def _store(path: Path, image: Image) -> None:
    # A full cache disk costs speed, never training.
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pack_image(image))
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink()


def pack_image(image: Image) -> bytes:
    """An image with a checksum before it. Not synced: a power cut may leave zeros in place of any part of a file, which the checksum tells,
    and then it is decoded once more; waiting for the disk would cost each image more than that."""
    stream = io.BytesIO()
    np.save(stream, image)
    data = stream.getvalue()
    return CHECKSUM.pack(zlib.crc32(data)) + data


def unpack_image(data: bytes) -> Image:
    """The reverse; raises `ValueError` or `EOFError` for other bytes."""
    body = memoryview(data)[CHECKSUM.size :]
    if len(data) < CHECKSUM.size or CHECKSUM.unpack_from(data)[0] != zlib.crc32(body):
        raise ValueError("torn, or not written by this version")
    return _as_image(np.load(io.BytesIO(body)))


def _as_image(array: Any) -> Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"not an RGB image: {array.shape} {array.dtype}")
    return array  # type: ignore[no-any-return]
