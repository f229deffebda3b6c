"""Tables that a command prints of somebody's files, and the printing."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gai_yolo.errors import Refusal

PLAIN_WIDTH = 120
"""Columns of a report that goes to a file or a pipe."""


def rendered(view: RenderableType, stream: TextIO | None) -> str:
    """A view as text for a stream: in its letters, with colours if it is a terminal."""
    is_terminal = stream is not None and stream.isatty()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A file's name need not be text, and a terminal may know few letters.
    sheet = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    width = None if is_terminal else PLAIN_WIDTH
    console = Console(file=sheet, force_terminal=is_terminal, highlight=False, markup=False, emoji=False, width=width)
    console.print(view)
    sheet.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in sheet.read().splitlines())


def table_of(*titles: str, left: Sequence[str] = ()) -> Table:
    """An empty table; the first column and those of `left` are texts, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place == 0 or title in left else "right", overflow="fold")
    return table


def what_is_wrong(rows: Iterable[tuple[str, int, str, str, str]], title: str = "what is wrong") -> Table:
    """Rows of split, count, what is wrong (or `title`), what is done, and the first example."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "count", title, "what is done", "first example"):
        table.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
    for split, count, kind, action, example in rows:
        cells = (split, str(count), kind, action, example)
        table.add_row(*(printable(cell, style="yellow" if cell is kind else "") for cell in cells))
    return table


def printable(text: str, style: str = "") -> Text:
    """A text from somebody's files, without what would steer the terminal."""
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return Text(shown, style=style, overflow="fold")


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
