"""Tables and texts for a terminal, a file or a pipe."""

from __future__ import annotations

import io
import os
from typing import TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from gai_yolo.errors import Refusal, escaped

PLAIN_WIDTH = 120
"""Columns of a report that goes to a file or a pipe."""


def rendered(view: RenderableType, stream: TextIO | None) -> str:
    """Tables as text for a stream: in its letters, with colours if it is a terminal."""
    is_terminal = stream is not None and stream.isatty()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A file's name need not be text, and a terminal may know few letters.
    sheet = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    width = None if is_terminal else PLAIN_WIDTH
    console = Console(file=sheet, force_terminal=is_terminal, highlight=False, markup=False, emoji=False, width=width)
    console.print(view)
    sheet.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in sheet.read().splitlines())


def harmless(text: str, style: str = "") -> Text:
    """A text from somebody's files, without what would steer the terminal."""
    return Text(escaped(text), style=style, overflow="fold")


def say(stream: TextIO | None, text: str, kept: str) -> None:
    """Write to somebody who may have gone (`| head`, `>&-`): what was found decides the exit code all the same.

    Args:
        kept: where what is said can be read as well, for the refusal.

    Raises:
        Refusal: the disk behind it is full.
    """
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python's own last flush fails as well, and changes the exit code
        if not isinstance(error, BrokenPipeError):
            raise Refusal(f"the output cannot be written ({error.strerror}); {kept}.") from None
