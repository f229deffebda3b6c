"""Reading files of a data set over disks and networks that fail for a while.

What a file holds is the data set's business; that it cannot be read just now is not, and must not change what is trained on. So
an error of the disk or the network is waited out, and if it stays, the process ends to be started again. A file that may not be opened
can be either's business while the index is read, which is what `Doubt` is for.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from gai_yolo.errors import DataError, Departure, Ending, refused_by

T = TypeVar("T")

PATIENCE = 40.0
"""Seconds that an error is waited out; less than a step may take before it counts as hanging (`elastic.step_timeout_seconds`)."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between tries; doubled each time."""
TELL_AFTER = 1.0
"""Seconds after which somebody is told."""
LASTING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
"""What a data set itself is the cause of."""
DOUBTFUL = frozenset({errno.EACCES, errno.EPERM})
"""What a data set itself may be the cause of, and what a share says of every file while it is mounted or exported anew, or a ticket is
renewed. Everything else (EIO, ESTALE, ENXIO, ETIMEDOUT, EMFILE, ...) is the machines'."""
DOUBT_PATIENCE = 10.0
"""Seconds that a `Doubt` lasts."""


class CannotRead(Departure):
    """A file that is there, or was there when the index was read, cannot be read; its content is not to blame.

    Args:
        reason: one sentence; or what torch makes of it when it comes from a loader process, a traceback that ends in the sentence.
    """

    def __init__(self, reason: str) -> None:
        last = reason.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "), Ending.WAITING)


class Doubt:
    """Whom to blame for an error while an index is read: the data set, then it is raised, or the machines, then it is waited out.

    `DOUBTFUL` errors are the machines' for `DOUBT_PATIENCE` seconds and the data set's from then on. All files of one reading share these
    seconds, because a data set may have thousands that nobody may open. Threads may share a doubt.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left, self._waited_until = DOUBT_PATIENCE, 0.0

    def blames_data(self, error: OSError, now: float, pause: float) -> bool:
        """Whether another try is of no use. If not, `pause` seconds from `now` on count as waited, for all threads that wait then."""
        if error.errno not in DOUBTFUL:
            return error.errno in LASTING
        with self._lock:
            if self._left <= 0:
                return True
            until = max(self._waited_until, now + pause)
            self._left -= until - max(self._waited_until, now)
            self._waited_until = until
            return False

    def clear(self) -> None:
        """Waiting has helped, so the machines were to blame; their next error is waited out as long as the first."""
        with self._lock:
            self._left = DOUBT_PATIENCE


def patiently(
    action: Callable[[], T],
    path: Path,
    doubt: Doubt | None = None,
    patience: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Do something with a file until it works.

    Args:
        doubt: of the index that is being read; None for a file that could be read then, of which any error is the machines'.
        patience: seconds; None for `PATIENCE`.

    Raises:
        CannotRead: it has not worked for so many seconds.
        OSError: the data set is to blame.
    """
    started, pause, told = clock(), FIRST_PAUSE, False
    patience = PATIENCE if patience is None else patience
    while True:
        try:
            result = action()
        except OSError as error:
            now = clock()
            if doubt is not None and doubt.blames_data(error, now, pause):
                raise
            seconds = now - started
            if seconds >= patience:
                raise CannotRead(f"{path}: cannot be read ({error.strerror or error}), for {seconds:.0f} s now") from None
            if seconds >= TELL_AFTER and not told:
                told = True
                print(f"warning: {path}: cannot be read ({error.strerror or error}); trying again", file=sys.stderr, flush=True)
        else:
            if doubt is not None and pause > FIRST_PAUSE:
                doubt.clear()
            return result
        sleep(min(pause, max(0.0, patience - seconds)))
        pause = min(2 * pause, LONGEST_PAUSE)


def read_file(path: Path, doubt: Doubt | None = None, patience: float | None = None) -> bytes:
    """All of a file; raises as `patiently`."""
    return patiently(lambda: _read(path), path, doubt, patience)


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


def expand(path: Path) -> Path:
    """Replace a leading `~`.

    Raises:
        DataError: that user has no home folder (containers often run as a user without one).
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise DataError(f"{path}: there is no home folder for `~`; write the path in full.") from None


def is_text(value: object) -> bool:
    """Whether it is a string, not empty, that can be printed and be a file's name (JSON and YAML can spell half characters)."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_annotations(path: Path, what: str, doubt: Doubt) -> bytes:
    """All of a file that says what is in images. Without it the data set is another one (images without boxes, or without a class, which
    renumbers those behind it), so that it cannot be left out as an image can.

    Raises:
        DataError: it cannot be read; `what` says in the message what it is.
    """
    try:
        return read_file(path, doubt)
    except OSError as error:
        raise refused_by(error, DataError(f"{path}: cannot read the {what} ({error.strerror}); correct data.path or the file.")) from None


def read_text(path: Path, what: str, doubt: Doubt) -> str:
    """A small text file (UTF-8, with or without a byte order mark).

    Raises:
        DataError: as `read_annotations`, or it is no such text.
    """
    try:
        return read_annotations(path, what, doubt).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: the {what} is not UTF-8 text; save it as UTF-8.") from None
