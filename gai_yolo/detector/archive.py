"""The archive that `torch.save` writes: a zip file whose parts are stored as they are, each once."""

from __future__ import annotations

import lzma
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from gai_yolo.errors import CheckpointError, refused_by

PARSER_ERRORS = (
    *(RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, MemoryError, AssertionError, ArithmeticError),
    *(struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pickle.UnpicklingError, safetensors.SafetensorError),
)
"""A truncated or overwritten archive fails anywhere in the parser; all of it means the same to the user."""
BEGIN, END, LONG_END = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06"
"""The first bytes of an archive, and of the records at its end: of the zip format (APPNOTE 4.3.7, 4.3.16, 4.3.14)."""
END_SIZE, LONG_END_AT = 22, 22 + 20 + 56
"""Bytes of the last record, and how far from the end of the file the record for large files begins, if there is one."""
LARGEST_LIST = 16 << 20
"""Bytes of the list of what is in an archive; some 90 a tensor."""


class DamagedFile(CheckpointError):
    """Not a file that `torch.save` has written, or no longer."""


def damaged(path: Path) -> DamagedFile:
    """What is said of a file that is nothing that is known."""
    return DamagedFile(f"{path}: damaged or not a checkpoint; restore it from a copy or take another one.")


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """Open a file written by `torch.save` on the CPU, without running any code in it.

    Raises:
        CheckpointError: missing, damaged, or holding objects other than tensors and plain data.
    """
    try:
        with path.open("rb") as file:
            check_sums(path, file)
            return load_checkpoint(path, file)
    except OSError as error:
        raise refused_by(error, CheckpointError(f"{path}: cannot be read ({error.strerror or error}).")) from None


def load_checkpoint(path: Path, file: BinaryIO) -> dict[str, Any]:
    """As `read_checkpoint_file`, from an open file whose bytes are known to be good; `path` is for messages only.

    Raises:
        DamagedFile: damaged, or not such a file.
        CheckpointError: holding objects other than tensors and plain data.
        OSError: the disk refuses.
    """
    try:
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's words for what it does not know, and for modules that it blocks outright (os, sys).
        if any(words in str(error).lower() for words in ("unsupported global", "unsupported class", "is blocked")):
            raise CheckpointError(
                f"{path}: holds program objects, not only tensors, and is not opened because they could run code; "
                "export its state dict with the program that wrote it and give that file."
            ) from None
        raise damaged(path) from None
    except OSError:
        raise
    except PARSER_ERRORS:
        raise damaged(path) from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: holds a {type(content).__name__}, not a checkpoint or a state dict.")
    return content


def check_sums(path: Path, file: BinaryIO) -> None:
    """torch.load does not look at the archive's checksums: a flipped bit in a tensor would pass.

    Raises:
        DamagedFile: a sum is another, or the archive is one that `torch.save` does not write.
        OSError: the disk refuses.
    """
    try:
        if zipfile.is_zipfile(file):
            with opened(file) as archive:
                if archive.testzip() is not None:
                    raise damaged(path)
    except (CheckpointError, OSError):
        raise
    except PARSER_ERRORS:
        raise damaged(path) from None


def opened(file: BinaryIO) -> zipfile.ZipFile:
    """The archive in a file, whose parts are together no larger than the file.

    Raises:
        zipfile.BadZipFile, ...: none, or not of the kind that `torch.save` writes: compressed, with parts of one name or of one place.
    """
    length = file.seek(0, os.SEEK_END)
    if _size_of_list(file, length) > LARGEST_LIST:
        raise zipfile.BadZipFile("holds more parts than a network has tensors")
    file.seek(0)
    if file.read(len(BEGIN)) != BEGIN:
        raise zipfile.BadZipFile("something else stands before it")
    archive = zipfile.ZipFile(file)
    parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size or part.flag_bits & 1 for part in parts):
        raise zipfile.BadZipFile("compressed or encrypted")
    if len({part.filename for part in parts}) < len(parts) or sum(part.file_size for part in parts) > length:
        raise zipfile.BadZipFile("one part twice")
    return archive


def _size_of_list(file: BinaryIO, length: int) -> int:
    """Bytes of the list of parts, before anything is made of it."""
    file.seek(max(0, length - LONG_END_AT))
    tail = file.read(LONG_END_AT)
    if not tail[-END_SIZE:].startswith(END) or tail[-2:] != b"\0\0":
        raise zipfile.BadZipFile("no end, or a comment behind it")
    size: int = struct.unpack("<L", tail[-10:-6])[0]
    if len(tail) == LONG_END_AT and tail.startswith(LONG_END):
        size = max(size % 0xFFFFFFFF, struct.unpack("<Q", tail[40:48])[0])
    return size
