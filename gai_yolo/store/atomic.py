"""Publishing a file so that its name holds all of it or what was there before."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def publish(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a unique temporary one beside it: write, fsync, rename, fsync the folder.

    After return the content survives a crash of the machine. If anything fails, or the process is killed at any moment,
    `path` holds its old content or is absent as before; a killed writer may leave a `*.tmp` file behind.

    Args:
        write: is handed the open binary file.

    Raises:
        OSError: the disk refuses; nothing was changed under `path`.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def publish_text(path: Path, text: str) -> None:
    """`publish` for UTF-8 text."""
    publish(path, lambda file: file.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems cannot sync a folder and say so.
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
