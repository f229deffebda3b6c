"""Reading files of a data set over disks and networks that fail for a while.

What a file holds is the data set's business; that it cannot be read just now is not, and must not change what is trained on. So
an error of the disk or the network is waited out, and if it stays, the process ends to be started again.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from gai_yolo.errors import Departure, Ending

T = TypeVar("T")

PATIENCE = 40.0
"""Seconds that an error is waited out; less than a step may take before it counts as hanging (`elastic.step_timeout_seconds`)."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between tries; doubled each time."""
TELL_AFTER = 1.0
"""Seconds after which somebody is told."""
LASTING = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO}
)
"""What a data set itself may be the cause of. Everything else (EIO, ESTALE, ETIMEDOUT, EMFILE, ...) is the machines'."""


class CannotRead(Departure):
    """A file that is there, or was there when the index was read, cannot be read; its content is not to blame.

    Args:
        reason: one sentence; or what torch makes of it when it comes from a loader process, a traceback that ends in the sentence.
    """

    def __init__(self, reason: str) -> None:
        last = reason.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "), Ending.WAITING)


def patiently(
    action: Callable[[], T],
    path: Path,
    lasting: frozenset[int] = frozenset(),
    patience: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Do something with a file until it works.

    Args:
        lasting: error numbers that are raised at once.
        patience: seconds; None for `PATIENCE`.

    Raises:
        CannotRead: it has not worked for so many seconds.
        OSError: one with a lasting number.
    """
    started, pause, told = clock(), FIRST_PAUSE, False
    patience = PATIENCE if patience is None else patience
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno in lasting:
                raise
            seconds = clock() - started
            if seconds >= patience:
                raise CannotRead(f"{path}: cannot be read ({error.strerror or error}), for {seconds:.0f} s now") from None
            if seconds >= TELL_AFTER and not told:
                told = True
                print(f"warning: {path}: cannot be read ({error.strerror or error}); trying again", file=sys.stderr, flush=True)
        sleep(min(pause, max(0.0, patience - seconds)))
        pause = min(2 * pause, LONGEST_PAUSE)


def read_file(path: Path, lasting: frozenset[int] = frozenset(), patience: float | None = None) -> bytes:
    """All of a file; raises as `patiently`."""
    return patiently(lambda: _read(path), path, lasting, patience)


def open_file(path: Path) -> BinaryIO:
    """A file for reading. Every image, header and label file is opened here."""
    return path.open("rb")


def _read(path: Path) -> bytes:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = bytearray()
        while piece := file.read(max(size - len(data), 1 << 16)):
            data += piece
    if len(data) < size:
        # A network file system that has lost its server in the middle. Half a JPEG would be decoded, with a grey rest.
        raise OSError(errno.EIO, f"only {len(data)} of {size} bytes could be read", str(path))
    return bytes(data)
