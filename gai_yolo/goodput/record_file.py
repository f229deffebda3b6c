"""A record on the disk, kept up to date by a thread of its own: a disk that hangs holds up neither training nor its watchdog."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from gai_yolo.goodput.record import Record, pack, plain
from gai_yolo.log import OF_NODE, ONCE, told_if_refused

BEAT = 1.0
"""Seconds between two entries when nobody asks for one."""
GOES_ON = "the account of the time may miss this start, training goes on"

logger = logging.getLogger(__name__)


class RecordFile:
    """Writes what `content` returns, once a second and whenever it is asked to. Nothing here raises because of a disk: its refusal is
    told once, and every second it is given another chance.

    Not guaranteed: there is no fsync, so a power cut may tear the file, and a reader on another host of a network file system may
    see an entry half a minute late.
    """

    def __init__(self, path: Path, content: Callable[[], Record]) -> None:
        self._path, self._content = path, content
        self._turn = threading.Condition()
        self._asked = self._written = 0
        self._closing = False
        self._descriptor: int | None = None
        self._size = 0
        threading.Thread(target=self._work, name="goodput", daemon=True).start()

    def update(self, patience: float) -> bool:
        """Ask for an entry and wait for it for at most `patience` seconds; returns whether it was tried within that time."""
        with self._turn:
            self._asked += 1
            mine = self._asked
            self._turn.notify_all()
            return self._turn.wait_for(lambda: self._written >= mine, patience)

    def close(self, patience: float) -> None:
        """Make the last entry."""
        with self._turn:
            self._closing = True
        self.update(patience)

    def _work(self) -> None:
        last = False
        while not last:
            with self._turn:
                self._turn.wait_for(lambda: self._asked > self._written, BEAT)
                asked, last = self._asked, self._closing
            with told_if_refused(logger, self._path, then=GOES_ON, extra={**OF_NODE, **ONCE}):
                self._write()
                if last and self._descriptor is not None:
                    os.close(self._descriptor)
            with self._turn:
                self._written = asked
                self._turn.notify_all()

    def _write(self) -> None:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        data = pack(plain(self._content())).ljust(self._size)
        if os.pwrite(self._descriptor, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size = len(data)
