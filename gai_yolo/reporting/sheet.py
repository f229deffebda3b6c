"""Tables that a command prints of somebody's files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from gai_yolo.reporting.terminal import harmless


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
        table.add_row(*(harmless(cell, style="yellow" if cell is kind else "") for cell in cells))
    return table
