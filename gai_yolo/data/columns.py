"""Arrays in one file that is mapped rather than read: all processes of a machine that use it share its pages.

Layout: `MAGIC`, length of the header and checksum (CRC-32) of all that comes behind them, little-endian; the header, JSON; each array as it
lies in memory, at a multiple of `ALIGNMENT`.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gai_yolo.machine import is_on_this_machine

MAGIC = b"gaiarray"
FILE_HEAD = struct.Struct("<8sII")
ALIGNMENT = 64
CHECKED_AT_ONCE = 4 << 20
"""Bytes that are looked at together."""


def write_columns(file: BinaryIO, described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays, and what JSON can say beside them.

    Raises:
        OSError: the disk refuses.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    places = {name: [array.dtype.str, array.shape] for name, array in whole.items()}
    header = json.dumps({"described": described, "arrays": places}).encode()
    header += b" " * (-(FILE_HEAD.size + len(header)) % ALIGNMENT)
    parts = [header]
    for array in whole.values():
        parts += [array.tobytes(), b"\0" * (-array.nbytes % ALIGNMENT)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    file.write(FILE_HEAD.pack(MAGIC, len(header), checksum))
    for part in parts:
        file.write(part)


def map_columns(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The reverse; the arrays cannot be written to. The file may be replaced or removed meanwhile, but not changed.

    Raises:
        OSError: the file cannot be read.
        ValueError, LookupError, TypeError: it is torn, or of another make.
    """
    with path.open("rb") as file:
        magic, header_size, checksum = FILE_HEAD.unpack(file.read(FILE_HEAD.size).ljust(FILE_HEAD.size, b"\0"))
        # The checksum is read past the mapping, so that only what is used later counts as this process's memory.
        if magic != MAGIC or (FILE_HEAD.size + header_size) % ALIGNMENT or checksum != _checksum(file):
            raise ValueError("torn, or of another make")
        data: mmap.mmap | bytes
        if is_on_this_machine(path):
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            # A page that a server has no more, because another machine has removed the file, ends a process by SIGBUS.
            file.seek(0)
            data = file.read()
    start = FILE_HEAD.size + header_size
    header = json.loads(data[FILE_HEAD.size : start])
    arrays: dict[str, NDArray[Any]] = {}
    for name, (kind, shape) in header["arrays"].items():
        dtype, count = np.dtype(kind), math.prod(shape)
        arrays[name] = (np.frombuffer(data, dtype, count, start) if count else np.zeros(0, dtype)).reshape(shape)
        start += count * dtype.itemsize + -(count * dtype.itemsize) % ALIGNMENT
    return header["described"], arrays


def _checksum(file: BinaryIO) -> int:
    checksum = 0
    while piece := file.read(CHECKED_AT_ONCE):
        checksum = zlib.crc32(piece, checksum)
    return checksum
