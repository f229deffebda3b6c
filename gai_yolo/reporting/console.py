"""What people see on the terminal of the first rank.

On a terminal a bar for each epoch, elsewhere (log files, `kubectl logs`) plain lines with the time. Reporting never ends a
training: what cannot be written to the stream (a full disk under a log file, a terminal that hung up) is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

# rich is imported where it is used: a job that restarts without a terminal does not need it.
if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

LOSS_PARTS = ("box", "cls", "dfl")
METRICS = {
    "mAP50-95": "AP  IoU 0.50:0.95  all sizes",
    "mAP50": "AP  IoU 0.50       all sizes",
    "mAP75": "AP  IoU 0.75       all sizes",
    "mAP_small": "AP  IoU 0.50:0.95  small",
    "mAP_medium": "AP  IoU 0.50:0.95  medium",
    "mAP_large": "AP  IoU 0.50:0.95  large",
    "AR_1": "AR  IoU 0.50:0.95  all sizes    1 detection",
    "AR_10": "AR  IoU 0.50:0.95  all sizes   10 detections",
    "AR_100": "AR  IoU 0.50:0.95  all sizes  100 detections",
    "AR_small": "AR  IoU 0.50:0.95  small      100 detections",
    "AR_medium": "AR  IoU 0.50:0.95  medium     100 detections",
    "AR_large": "AR  IoU 0.50:0.95  large      100 detections",
}
"""COCO's numbers in plain words; AP is average precision, AR average recall, small < 32^2 <= medium < 96^2 <= large (pixels)."""


class NullConsole:
    """What the other ranks show: nothing of the run; of what is said errors, and what their node alone may know."""

    def show(self, record: logging.LogRecord) -> None:
        """Show what a module says; errors, which end a process, as they are, on standard error. From any thread."""
        if record.levelno >= logging.ERROR:
            self.close()
            print(record.getMessage(), file=sys.stderr, flush=True)
        elif getattr(record, "of_node", False):
            print(f"warning: {socket.gethostname()}: {record.getMessage()}", flush=True)

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None: ...

    def step(self, step_in_epoch: int, losses: Mapping[str, float], learning_rate: float, images: int) -> None: ...

    def end_epoch(self, losses: Mapping[str, float], seconds: float, images: int) -> None: ...

    def evaluation(self, epoch: int, stats: Mapping[str, float], per_class: Mapping[str, tuple[float, float]], loss: float) -> None: ...

    def close(self) -> None: ...


class Console(NullConsole):
    """Shows a run to people. `show` may be called from any thread, the rest from the training thread only."""

    def __init__(
        self, total_epochs: int, log_interval: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to `stream` (standard output if None), a plain line every `log_interval` steps if it is no terminal."""
        self.log_interval = log_interval
        self._epoch, self._steps = 0, 0
        self._pace = Pace(total_epochs, clock)
        # Taken now and kept: pycocotools' chatter is silenced by redirecting sys.stdout, which must not swallow messages.
        out = sys.stdout if stream is None else stream
        self._screen = screen_for(out)

    def show(self, record: logging.LogRecord) -> None:
        """Show what a module says; never mixed up with the bar."""
        if record.levelno >= logging.ERROR:
            super().show(record)
        elif record.levelno >= logging.WARNING:
            self._screen.line(f"warning: {record.getMessage()}", "bold yellow")
        else:
            self._screen.line(record.getMessage())

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """Begin epoch `epoch` (from 1) of `steps` optimizer steps, of which `done` were made before an interruption."""
        self._epoch, self._steps = epoch, steps
        self._pace.start_epoch(epoch, steps)
        self._screen.begin(f"epoch {epoch}/{self._pace.total_epochs}", steps)
        self._screen.update(done, "")

    def step(self, step_in_epoch: int, losses: Mapping[str, float], learning_rate: float, images: int) -> None:
        """Show optimizer step `step_in_epoch` (from 1), with its losses (total, box, cls, dfl) over `images` images."""
        self._pace.step(step_in_epoch, images)
        speed, left = f"{self._pace.images_per_second:.0f} images/s", f"ETA {_time(self._pace.eta)}"
        status = f"{_losses(losses)}  {speed}  {left}  lr {learning_rate:.3g}"
        self._screen.update(step_in_epoch, status)
        if not self._screen.has_bar and step_in_epoch % self.log_interval == 0:
            self._screen.line(f"{self._name}  step {step_in_epoch}/{self._steps}  {status}")

    def end_epoch(self, losses: Mapping[str, float], seconds: float, images: int) -> None:
        """Replace the bar by one line: the epoch's mean losses, its duration and its `images`."""
        self._screen.end()
        speed = images / seconds if seconds > 0 else 0.0
        self._screen.line(f"{self._name} done  {_losses(losses)}  {speed:.0f} images/s  took {_time(seconds)}  ETA {_time(self._pace.eta)}")

    def evaluation(self, epoch: int, stats: Mapping[str, float], per_class: Mapping[str, tuple[float, float]], loss: float) -> None:
        """Show COCO's numbers and the average precision of each class; -1 (nothing to find) becomes `-`."""
        self._screen.line(f"evaluation after epoch {epoch}/{self._pace.total_epochs}  loss {loss:.4g}", "bold")
        self._screen.table(["COCO", "value"], [[METRICS.get(name, name), _value(value)] for name, value in stats.items()])
        rows = [[name, _value(ap), _value(ap50)] for name, (ap, ap50) in per_class.items()]
        self._screen.table(["class", "AP 0.50:0.95", "AP 0.50"], rows)

    def close(self) -> None:
        """Take the bar away and give the terminal's cursor back; to be called whatever happened. May be called twice."""
        self._screen.end()

    @property
    def _name(self) -> str:
        return f"epoch {self._epoch}/{self._pace.total_epochs}"


class Pace:
    """Speed and time left, from the step times of this process (a resumed run may sit on another machine)."""

    def __init__(self, total_epochs: int, clock: Callable[[], float]) -> None:
        self.total_epochs, self._clock = total_epochs, clock
        self._last = 0.0
        self._steps_left = self._from_here = 0
        self._num_steps = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=100)

    def start_epoch(self, epoch: int, steps: int) -> None:
        """The time between epochs (evaluation, saving) belongs to no step."""
        self._steps_left = self._from_here = (1 + max(0, self.total_epochs - epoch)) * steps
        self._last = self._clock()

    def step(self, step_in_epoch: int, images: int) -> None:
        """Count a step that has just ended."""
        now = self._clock()
        # The first step of a process pays for warming up (workers, memory, kernels) and says nothing about the others.
        if self._num_steps == 1:
            self._recent.clear()
        self._recent.append((now - self._last, images))
        self._num_steps += 1
        self._last = now
        self._steps_left = self._from_here - step_in_epoch

    @property
    def images_per_second(self) -> float:
        """Over the last 100 steps; 0 before the first."""
        seconds = sum(duration for duration, _ in self._recent)
        return sum(images for _, images in self._recent) / seconds if seconds > 0 else 0.0

    @property
    def eta(self) -> float:
        """Seconds of training left in the whole run, without evaluations; 0 before the first step."""
        return self._steps_left * sum(duration for duration, _ in self._recent) / len(self._recent) if self._recent else 0.0


class Plain:
    """Timestamped lines on any stream."""

    has_bar = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def line(self, text: str, _style: str = "") -> None:
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(_cells(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = []
        for row in [header, *rows]:
            padding = [" " * (width - _cells(text)) for text, width in zip(row, widths, strict=True)]
            numbers = [space + text for space, text in zip(padding[1:], row[1:], strict=True)]
            lines.append("  ".join(["   ", row[0] + padding[0], *numbers]) + "\n")
        self._write("".join(lines))

    def begin(self, title: str, steps: int) -> None: ...

    def update(self, completed: int, status: str) -> None: ...

    def end(self) -> None: ...

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        safe = text.encode(encoding, "replace").decode(encoding)
        with self._lock, contextlib.suppress(OSError):  # nobody can be told on a broken stream, and training goes on
            self._stream.write(safe)
            self._stream.flush()


class Bar:
    """A progress bar for each epoch on a terminal, with everything else printed above it."""

    has_bar = True

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole

        self._console = RichConsole(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None

    def line(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._print(Text(f"{time.strftime('%H:%M:%S')}  ", style="dim").append(text, style=style or "not dim"))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for place, title in enumerate(header):
            table.add_column(Text(title), justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text, because a class name may hold rich's `[markup]`
        self._print(table)

    def begin(self, title: str, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.end()
        name = TextColumn("{task.description}", style="bold", markup=False)
        status = TextColumn("{task.fields[status]}", markup=False)
        columns = (name, BarColumn(bar_width=16), MofNCompleteColumn(), status)
        # Transient: when the epoch ends the bar makes room for its summary line.
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._progress.add_task(title, total=steps, status="")
        try:
            self._progress.start()
        except OSError:
            self._progress = None

    def update(self, completed: int, status: str) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=completed, status=status)

    def end(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            with contextlib.suppress(OSError):  # as in Plain: the terminal is gone, the training is not
                progress.stop()

    def _print(self, what: RenderableType) -> None:
        with contextlib.suppress(OSError):
            self._console.print(what, soft_wrap=True)


def screen_for(stream: TextIO) -> Plain | Bar:
    """What suits a stream."""
    return Bar(stream) if _draws_bars(stream) else Plain(stream)


def _draws_bars(stream: TextIO) -> bool:
    """A terminal that can move its cursor and show the bar's characters."""
    encoding = (stream.encoding or "").lower().replace("-", "")
    return stream.isatty() and os.environ.get("TERM") != "dumb" and encoding == "utf8"


def _cells(text: str) -> int:
    """Columns a text takes on a screen: letters of East Asian scripts are two wide."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _losses(losses: Mapping[str, float]) -> str:
    parts = " ".join(f"{name} {losses[name]:.3g}" for name in LOSS_PARTS if name in losses)
    return f"loss {losses['total']:.4g} ({parts})"


def _value(value: float) -> str:
    return "-" if value < 0 else f"{value:.4f}"


def _time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
