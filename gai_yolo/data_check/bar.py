"""How far the decoding is, on standard error if that is a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar that is gone when the work is done; a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, title: str, total: int) -> None:
        """Start from nothing."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(title, total=total)

    def advance(self) -> None:
        """One more is done."""
        self._progress.advance(self._progress.task_ids[0])
