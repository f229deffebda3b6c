"""What the image files of a data set hold, at a cost that does not grow with it: the sizes of all, the bytes of some.

Caught: any file that has another size; a change of most or all pictures (converted, inverted, another quality or crop). Not caught:
other pictures of the same sizes in a few files that are not in the sample: if one file in a hundred was replaced by one of equal size,
it is noticed in 92 of 100 cases, if one in a thousand, in 23. Times play no part, because nodes' copies differ in them, and neither do the
folders that the files lie in.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.formats.reading import open_file, patiently
from gai_yolo.data.index import Records

SAMPLE = 256
"""Files whose bytes are read."""
FILES_IN_ROW = 4096
"""Files that one thread looks at in a row."""
GONE = (-1, -1)
PART = 256 << 10
"""Bytes at the beginning and at the end of a file that are read."""


def look(images: Records, may_be_gone: bool = False) -> NDArray[np.int64]:
    """(N, 2) size in bytes and modification time in ns of each file.

    Args:
        may_be_gone: have `GONE` for a file that is not there, instead of waiting for it.

    Raises:
        CannotRead: the disk or the network fails.
    """
    paths = list(images.paths())
    pieces = [paths[start : start + FILES_IN_ROW] for start in range(0, len(paths), FILES_IN_ROW)]
    # Threads are of use where a question waits for a server; where it does not, they are in each other's way, hence few and large pieces.
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        found = list(pool.map(lambda piece: [_stamp(path, may_be_gone) for path in piece], pieces))
    return np.array([stamp for part in found for stamp in part], dtype=np.int64).reshape(-1, 2)


def _stamp(path: str, may_be_gone: bool) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116 -- a Path for each would cost more than the question
    except OSError as error:
        if may_be_gone and isinstance(error, FileNotFoundError):
            return GONE
        status = patiently(Path(path).stat, Path(path))
    return status.st_size, status.st_mtime_ns


def sample_positions(images: Records) -> NDArray[np.int64]:
    """Which files' bytes are read, ascending. Drawn by a hash, so that it does not depend on the order, and follows no pattern that a data
    set may have."""

    def draw(position: int) -> bytes:
        return hashlib.sha256(f"{images.image_ids[position]} {images.name(position)}".encode(errors="surrogateescape")).digest()

    return np.array(sorted(heapq.nsmallest(SAMPLE, range(len(images)), key=draw)), dtype=np.int64)


def part_digests(images: Records, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(S, 32) SHA-256 of the first and last bytes of some files.

    Raises:
        CannotRead: the disk or the network fails.
    """
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        paths = [images[position].path for position in positions.tolist()]
        parts = b"".join(pool.map(lambda path: patiently(lambda: _bytes_digest(path), path), paths))
    return np.frombuffer(parts, dtype=np.uint8).reshape(-1, 32)


def content_digest(stamps: NDArray[np.int64], parts: NDArray[np.uint8]) -> str:
    """SHA-256 over the sizes of all files and the bytes of a fixed sample, the same whatever node looks at whatever copy.

    Args:
        stamps: as `look` has found them.
        parts: `part_digests` of `sample_positions`.
    """
    return hashlib.sha256(repr(stamps[:, 0].tolist()).encode() + parts.tobytes()).hexdigest()


def _bytes_digest(path: Path) -> bytes:
    with open_file(path) as file:
        digest = hashlib.sha256(file.read(PART))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(PART, size - PART))
        digest.update(file.read(PART))
    return digest.digest()
