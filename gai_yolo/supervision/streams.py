"""Standard output and error that may go away: a terminal that hung up, a full disk under a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterable


class Forgiving:
    """A text stream on which nothing fails: what cannot be written is dropped, because nobody can be told and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:  # a file's name that is no text, or a terminal that knows few letters
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive_lost_streams() -> None:
    """Let this process's output fail without a trace, for the rest of its life. Otherwise a job whose ssh session drops would end with
    an error while it says that it saves its state, and Python's own last flush would change its exit code."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free one; else a file of this program would, and be written to
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  # for the rest of this process's life
        if not isinstance(stream, Forgiving):
            setattr(sys, name, cast(TextIO, Forgiving(stream)))
