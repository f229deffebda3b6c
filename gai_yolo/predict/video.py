"""Frames out of videos and cameras, and drawn frames into a video."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from gai_yolo.errors import DataError
from gai_yolo.inference.pictures import MOST_PICTURE_PIXELS, Picture
from gai_yolo.inference.prediction import read_ahead
from gai_yolo.predict.sources import Item

USUAL_RATE, HIGHEST_RATE = 25.0, 1000.0
"""Frames a second of what does not say it, and the most that is believed."""
CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))
"""What OpenCV's wheels can write (H.264 they cannot), the first that works on this machine."""
MISSING_SHARE = 0.1
"""A video that gives so much less frames than it announces is told. Some formats only estimate how many they have."""


class Frames:
    """The frames of a video or a camera, used as a context manager.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, item: Item) -> None:
        self._item = item
        try:
            source = int(str(item.path)) if item.is_camera else str(item.path.resolve())
            self._capture = cv2.VideoCapture(source, cv2.CAP_ANY if item.is_camera else _decoder())
            opened = self._capture.isOpened()
        except (cv2.error, UnicodeError, TypeError, ValueError):
            opened = False
        if not opened:
            what = "there is no such camera, or another program has it" if item.is_camera else "is no video that OpenCV can decode"
            raise DataError(f"{item.path}: {what}.")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= HIGHEST_RATE else USUAL_RATE
        """A second."""
        announced = 0.0 if item.is_camera else self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(announced) if 0 < announced < 2**31 else 0
        """Frames there are, as far as the file says; else 0."""
        self.read = 0
        """Frames that were decoded."""

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._capture.release()

    def pictures(self, ahead: int) -> Generator[Picture]:
        """The frames in order, decoded by a thread that is up to `ahead` frames in front.

        Raises:
            DataError: a frame is too large.
        """
        frames = self._decoded()
        with contextlib.closing(read_ahead(lambda _: next(frames, None), itertools.count(), 1, ahead)) as read:
            for picture in read:
                if picture is None:
                    return
                yield picture

    def complaint(self) -> str:
        """What is wrong with a video that was read to its end; empty if nothing is."""
        if not self.read:
            return f"{self._item.path}: no frame of it can be decoded."
        if self.read < (1 - MISSING_SHARE) * self.announced:
            return f"{self._item.path}: ends after {self.read} of {self.announced} frames; the rest is damaged or missing."
        return ""

    def _decoded(self) -> Iterator[Picture]:
        width, height = (self._capture.get(what) for what in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > MOST_PICTURE_PIXELS:
            raise DataError(f"{self._item.path}: frames of {width:.0f} x {height:.0f} pixels; at most {MOST_PICTURE_PIXELS} are read.")
        while True:
            try:
                is_there, frame = self._capture.read()
            except cv2.error:
                return
            if not is_there or frame is None or frame.size == 0:
                return
            self.read += 1
            code = cv2.COLOR_GRAY2RGB if frame.ndim == 2 else cv2.COLOR_BGR2RGB
            yield Picture(np.asarray(cv2.cvtColor(frame, code), np.uint8), path=None if self._item.is_camera else self._item.path)


def _decoder() -> int:
    """FFmpeg, where this OpenCV has it; the others, which are asked after it, know less, and talk about what they do not know."""
    return cv2.CAP_FFMPEG if cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG) else cv2.CAP_ANY


class VideoFile:
    """A video that is written under a temporary name and gets its own by `publish`: a reader never sees half of one.

    Args:
        path: without suffix, in a folder that is there.
        rate: frames a second.
        height, width: of the frames. Of an odd one OpenCV leaves the last row or column out.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, rate: float, height: int, width: int) -> None:
        self._size = (width, height)
        for codec, suffix in CODECS:
            # A short name in ASCII, because OpenCV takes no other on some machines.
            self._temporary = path.with_name(f".video-{os.getpid()}-{os.urandom(4).hex()}.tmp{suffix}")
            self.path = path.with_name(path.name + suffix)
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*codec), rate, self._size)
            if self._writer.isOpened():
                return
            self.discard()
        raise OSError(errno.EINVAL, f"OpenCV cannot write a video of {width} x {height} pixels", str(path))

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Write a frame, (H, W, 3) RGB; one of another size than the first is brought to that."""
        image = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        self._writer.write(image if image.shape[1::-1] == self._size else cv2.resize(image, self._size))

    def publish(self) -> Path:
        """Finish it and give it its name, which it returns.

        Raises:
            OSError: it cannot be given that, or cannot be read again: OpenCV does not tell of a full disk.
        """
        self._writer.release()
        written = cv2.VideoCapture(str(self._temporary))
        is_whole = written.isOpened() and written.read()[0]
        written.release()
        if not is_whole:
            self.discard()
            raise OSError(errno.EIO, "the video could not be written; is the disk full?", str(self.path))
        self._temporary.replace(self.path)
        return self.path

    def discard(self) -> None:
        """Leave nothing."""
        self._writer.release()
        self._temporary.unlink(missing_ok=True)
