"""Words to people, one sentence each: modules say them with `logging.getLogger(__name__)`, and a process shows them in its own way.

A module says `info` or `warning` and no more: whether there is a console, and whose, is for who starts the process to know. Without
`showing`, as in a program that uses this package, logging's own rules hold.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

OF_NODE = {"of_node": True}
"""`extra` of what this node alone may know: to be shown where another process has the console, too."""
ONCE = {"once": True}
"""`extra` of what is said once, however often it comes up."""
PACKAGE = logging.getLogger("gai_yolo")


@contextlib.contextmanager
def showing(show: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Show what this package says meanwhile: from any thread, what is said for the first time or not marked with `ONCE`."""
    handler = _Handler(show)
    level = PACKAGE.level
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)


@contextlib.contextmanager
def told_if_refused(
    logger: logging.Logger,
    path: Path,
    what: str = "cannot be written",
    then: str = "training goes on",
    extra: Mapping[str, bool] | None = None,
) -> Iterator[None]:
    """A disk that refuses what the block does is told, with what follows from it, and that is all.

    Args:
        path: what is written, whose name people know; of a folder the error names the file in it, if it knows one.
    """
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename and os.path.isdir(path) else path  # noqa: PTH112  # which never raises
        logger.warning(f"{where}: {what} ({error.strerror}); {then}", extra=extra)


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._show = show
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "once", False):
            text = record.getMessage()
            if text in self._said:
                return
            self._said.add(text)
        self._show(record)
