"""What `gai-yolo predict` does: looks at everything, and says what could not be looked at."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gai_yolo
from gai_yolo.errors import INTERRUPTED, DataError, Refusal, printable
from gai_yolo.inference.pictures import Picture, read_picture
from gai_yolo.inference.prediction import Selection, batches, read_ahead
from gai_yolo.predict.detector import Detector
from gai_yolo.predict.output import DRAWN_FOLDER, Output
from gai_yolo.predict.result import Result
from gai_yolo.predict.sources import Item
from gai_yolo.predict.video import Frames, VideoFile
from gai_yolo.reporting.console import screen_for

INCOMPLETE = 1
"""Exit code: something could not be read, the rest was done."""
LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


@dataclass(frozen=True)
class Settings:
    """How is looked."""

    selection: Selection
    size: int
    batch_size: int


class Stop:
    """Whether somebody has pressed Ctrl-C: what is being done is finished first. A second one does not wait."""

    asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(_number: int, _frame: object) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Session:
    """One run of the command.

    Args:
        problems: what could not be read is added to them, one line each.
    """

    def __init__(self, detector: Detector, settings: Settings, output: Output, problems: list[str]) -> None:
        self._detector, self._settings, self._output, self.problems = detector, settings, output, problems
        self._screen = screen_for(sys.stdout)
        self._stop = Stop()
        self._told = self._started = time.monotonic()

    def run(self, items: list[Item], about: dict[str, Any]) -> int:
        """Look at everything; returns the exit code.

        Raises:
            Refusal: nothing could be read.
            OSError: the output cannot be written.
        """
        images = [item for item in items if not item.is_video and not item.is_camera]
        with self._stop.listening(), self._output:
            try:
                self._look_at_images(images)
                for item in items:
                    if (item.is_video or item.is_camera) and not self._stop.asked:
                        self._look_at_video(item)
            except KeyboardInterrupt:
                self._stop.asked = True
            finally:
                self._screen.end()
            if not self._output.rows and not self._stop.asked:
                raise Refusal(nothing(self.problems))
            failures = [printable(problem) for problem in self.problems]
            self._output.finish({**about, "complete": not self._stop.asked, "failures": failures})
        self._conclude()
        return INTERRUPTED if self._stop.asked else INCOMPLETE if self.problems else 0

    def _look_at_images(self, items: list[Item]) -> None:
        """Pictures that cannot be read become problems; the others are looked at in batches, in order."""
        self._screen.begin("images", len(items))
        before = len(self.problems)
        with contextlib.closing(read_ahead(_read_or_problem, items)) as read:
            readable = self._readable(items, read)
            for batch in batches(readable, self._settings.batch_size, lambda both: both[1].stored.size // 3):
                results = self._detector.results_of([picture for _, picture in batch], self._settings.selection, self._settings.size)
                for (item, _), result in zip(batch, results, strict=True):
                    self._output.add(item, result)
                self._progress("images", len(self._output.rows) + len(self.problems) - before, len(items))
                if self._stop.asked:
                    return

    def _readable(self, items: list[Item], read: Iterator[Picture | str]) -> Iterator[tuple[Item, Picture]]:
        for item, picture in zip(items, read, strict=True):
            if isinstance(picture, str):
                self.problems.append(picture)
            else:
                yield item, picture

    def _look_at_video(self, item: Item) -> None:
        name = printable(f"camera {item.path}" if item.is_camera else item.path.name, 40)
        try:
            with Frames(item) as frames:
                self._screen.begin(name, frames.announced)
                with contextlib.closing(_DrawnVideo(self._output, item, frames.rate)) as drawn:
                    self._look_at_frames(item, frames, drawn, name)
                if frames.complaint() and not self._stop.asked:
                    self.problems.append(frames.complaint())
        except DataError as error:
            self.problems.append(str(error))

    def _look_at_frames(self, item: Item, frames: Frames, drawn: _DrawnVideo, name: str) -> None:
        size = 1 if item.is_camera else self._settings.batch_size
        number = 0
        with contextlib.closing(frames.pictures(size)) as pictures:
            for batch in batches(pictures, size, lambda picture: picture.stored.size // 3):
                for result in self._detector.results_of(batch, self._settings.selection, self._settings.size):
                    number += 1
                    self._output.add(item, result, number)
                    drawn.add(result)
                self._progress(name, number, frames.announced)
                if self._stop.asked:
                    return

    def _progress(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        self._screen.update(done, f"{len(self._output.rows) / seconds:.1f} pictures/s")
        if not self._screen.has_bar and now - self._told >= LINE_EVERY:
            self._told = now
            self._screen.line(f"{name}: {done}{f' of {total}' if total else ''}")

    def _conclude(self) -> None:
        rows, counts = self._output.rows, self._output.counts()
        found = ", ".join(f"{count} {printable(name, 40)}" for name, count in counts.items())
        seconds = time.monotonic() - self._started
        pictures = f"{len(rows)} picture{'' if len(rows) == 1 else 's'}"
        self._screen.line(f"{pictures} in {seconds:.1f} s; found {found or 'nothing'}")
        self._screen.line(f"results: {printable(str(self._output.folder))}")
        if self.problems:
            print(f"not read ({len(self.problems)}):", file=sys.stderr)
        for problem in self.problems:
            print(f"  {printable(problem)}", file=sys.stderr)
        if self._stop.asked:
            print("interrupted; what was looked at until then is complete", file=sys.stderr)


class _DrawnVideo:
    """The video that shows what was found in another one, if pictures are wanted; begun with the first frame, whose size it has."""

    def __init__(self, output: Output, item: Item, rate: float) -> None:
        self._output, self._item, self._rate = output, item, rate
        self._file: VideoFile | None = None

    def add(self, result: Result) -> None:
        """Draw a frame. Raises `OSError`."""
        if not self._output.draws:
            return
        if self._file is None:
            height, width = result.image.shape[:2]
            self._file = VideoFile(self._output.place(DRAWN_FOLDER, self._item.output), self._rate, height, width)
        self._file.add(result.draw())

    def close(self) -> None:
        """What was drawn until now is the video. Raises `OSError`."""
        if self._file is not None:
            self._file.publish()


def described(settings: Settings, class_names: tuple[str, ...]) -> dict[str, Any]:
    """For prediction.json."""
    chosen = settings.selection.classes
    names = None if chosen is None else [class_names[number] for number in chosen]
    rest = {"size": settings.size, "batch_size": settings.batch_size, "version": gai_yolo.__version__}
    return {**asdict(settings.selection), "classes": names, **rest}


def _read_or_problem(item: Item) -> Picture | str:
    try:
        return read_picture(item.path)
    except DataError as error:
        return str(error)


def nothing(problems: list[str]) -> str:
    """The sentence for a command that has found nothing to look at."""
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"nothing could be read: {printable(problems[0]) if problems else 'there is no image'}{more}"
