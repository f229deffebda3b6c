"""What a conversion says of itself: `conversion.json`, of which the tables are made, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data.index import Problem
from gai_yolo.data_convert.part import Part
from gai_yolo.reporting.sheet import table_of, what_is_wrong
from gai_yolo.reporting.terminal import harmless

SUMMARY_VERSION = 1
"""Of the document; raised when a key is removed or gets another meaning, not when one is added."""
MOST_CLASSES_SHOWN = 40
"""Of the table; all of them are in the document."""


@dataclass(frozen=True)
class Change:
    """Something that was wrong, or is otherwise than it was."""

    split: Split | None
    """None for all."""
    kind: str
    count: int
    action: str
    example: str


@dataclass(frozen=True)
class WrittenSplit:
    """Numbers of what was written."""

    images: int
    fraction: float
    """Of all images that were written."""
    background_images: int
    """Without any box."""
    boxes: int
    """Without crowd regions."""
    crowds: int


@dataclass(frozen=True)
class WrittenClass:
    """A class of the new data set."""

    id: int
    name: str
    boxes: dict[Split, int]
    """Without crowd regions."""


@dataclass(frozen=True)
class Summary:
    """Everything that a conversion says."""

    version: int
    source: str
    source_format: str
    output: str
    format: str
    images: str
    """How they were brought there: copy, link, hardlink, none."""
    splits: dict[Split, WrittenSplit]
    classes: list[WrittenClass]
    """In the order of the network's outputs."""
    wrong: list[Change]
    """What the reader has mended or left out, as `gai-yolo data check` tells it."""
    changed: list[Change]
    """What was there and is not in the new data set, or not as it was."""
    seed: int | None = None
    """Of a partition."""


def changes(split: Split | None, problems: Problems | Iterable[Problem]) -> Iterator[Change]:
    """As they are shown."""
    found = problems.freeze() if isinstance(problems, Problems) else problems
    return (Change(split, one.kind, one.count, one.action, one.example) for one in found)


def merged(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Those of several splits together."""
    found = Problems()
    for one in problems:
        found.add_many(one.kind, one.count, one.example, one.action)
    return found.freeze()


def written_splits(parts: Sequence[Part]) -> dict[Split, WrittenSplit]:
    """After they were written."""
    total = sum(len(part.names) for part in parts)
    return {
        part.split: WrittenSplit(
            len(part.names), round(len(part.names) / total, 4), part.background_images, part.boxes.total(), part.crowds
        )
        for part in parts
    }


def written_classes(parts: Sequence[Part], form: str) -> list[WrittenClass]:
    """As the new data set's readers know them."""
    categories = parts[0].index.categories
    if form != "voc":
        ids = [one.id if form == "coco" else number for number, one in enumerate(categories, start=1)]
        counts = [{part.split: part.boxes[position] for part in parts} for position in range(len(categories))]
        return [WrittenClass(key, one.name, count) for key, one, count in zip(ids, categories, counts, strict=True)]
    by_name = {part.split: Counter[str]() for part in parts}
    for part in parts:
        for position, count in part.boxes.items():
            by_name[part.split][categories[position].name] += count
    names = sorted({name for count in by_name.values() for name in count})
    return [
        WrittenClass(number, name, {split: count[name] for split, count in by_name.items()}) for number, name in enumerate(names, start=1)
    ]


def as_json(summary: Summary) -> str:
    """The document, in ASCII."""
    return json.dumps(asdict(summary), indent=1) + "\n"


def view(summary: Summary) -> RenderableType:
    """Tables."""
    parts: list[RenderableType] = [
        harmless(f"{summary.output} ({summary.format}), from {summary.source} ({summary.source_format})", "bold")
    ]
    parts.append(_of_splits(summary))
    parts.append(_of_classes(summary))
    root = Path(summary.source)
    root = root.parent if root.is_file() else root
    for title, rows in (("what is wrong", summary.wrong), ("what is otherwise", summary.changed)):
        shown = ((row.split or "all", row.count, row.kind, row.action, row.example.replace(f"{root}/", "")) for row in rows)
        if rows:
            parts.append(what_is_wrong(shown, title))
    where = (
        "Labels only; put the images where they are named." if summary.images == "none" else f"To train on it: data.path={summary.output}"
    )
    return Group(*parts, harmless(where, "green"))


def _of_splits(summary: Summary) -> RenderableType:
    table = table_of("", *summary.splits)
    splits = summary.splits.values()
    rows = {
        "images": [f"{one.images} ({100 * one.fraction:.4g} %)" for one in splits],
        "  without a box": [str(one.background_images) for one in splits],
        "boxes": [str(one.boxes) for one in splits],
        "crowd regions": [str(one.crowds) for one in splits],
    }
    for title, cells in rows.items():
        table.add_row(title, *cells)
    return table


def _of_classes(summary: Summary) -> RenderableType:
    table = table_of("class", *(f"{split} boxes" for split in summary.splits))
    for one in summary.classes[:MOST_CLASSES_SHOWN]:
        table.add_row(harmless(one.name), *(str(count) for count in one.boxes.values()))
    if len(summary.classes) > MOST_CLASSES_SHOWN:
        table.add_row(Text(f"... {len(summary.classes) - MOST_CLASSES_SHOWN} more in conversion.json", style="dim"))
    return table
