"""A check's report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gai_yolo.data.formats.check import Split
from gai_yolo.data_check.report import ClassCount, ClassReport, Report, SplitReport, Spread, without_root
from gai_yolo.reporting.sheet import table_of, what_is_wrong
from gai_yolo.reporting.terminal import harmless

MOST_CLASSES = 40
"""Rows of the table of classes; of more, the most frequent and the rarest are shown."""
RAREST = 15


def view(report: Report) -> RenderableType:
    """All of a report: tables, then the verdict."""
    parts: list[RenderableType] = [harmless(f"data set {report.path}", style="bold")]
    if report.classes:
        parts += [_of_splits(report), _of_classes(report)]
    if any(split.problems for split in report.splits.values()):
        parts.append(_of_problems(report))
    parts += [harmless(path, style="dim") for path in report.pictures]
    parts += [harmless(f"refused: {sentence}", style="bold red") for sentence in report.refusals]
    if report.trainable:
        parts.append(Text("A training would take this data set.", style="green"))
    return Group(*parts)


def shortened(classes: Sequence[ClassReport]) -> list[ClassReport | int]:
    """The most frequent classes, how many are left out, and the rarest; the most frequent in training first."""
    ordered = sorted(classes, key=lambda one: (-num_boxes(one.train), -num_boxes(one.val)))
    if len(ordered) <= MOST_CLASSES:
        return [*ordered]
    return [*ordered[: MOST_CLASSES - RAREST], len(ordered) - MOST_CLASSES, *ordered[-RAREST:]]


def num_boxes(count: ClassCount | None) -> int:
    """Boxes of a class in a split that may not have it."""
    return 0 if count is None else count.boxes


def _of_splits(report: Report) -> Table:
    table = table_of("", *report.splits)
    columns = [dict(_rows_of(report, name, split)) for name, split in report.splits.items()]
    for title in max(columns, key=len):
        table.add_row(Text(title), *(Text(column.get(title, "-")) for column in columns))
    return table


def _rows_of(report: Report, name: Split, split: SplitReport) -> Iterator[tuple[str, str]]:
    """Title and value of each row; only that there are none of a split that could not be read."""
    if split.source is None:
        yield "images", "refused"
        return
    here = [one.train if name == "train" else one.val for one in report.classes]
    present, all_classes = sum(num_boxes(count) > 0 for count in here), sum(count is not None for count in here)
    yield "images", str(split.images)
    yield "  without a box", str(split.background_images)
    left = " (all: --images all)" if split.decoded < split.images else ""
    yield "  of which decoded", f"{split.decoded}{left}"
    yield "  cannot be decoded", str(split.undecodable)
    yield "boxes", str(split.boxes)
    for size, title in (("small", "  small (below 32 x 32 px)"), ("medium", "  medium"), ("large", "  large (from 96 x 96 px)")):
        yield title, str(split.box_sizes[size])
    yield "crowd regions", str(split.crowds)
    yield "classes with boxes", f"{present} of {all_classes}"
    yield "boxes per image", _range(split.boxes_per_image)
    yield "box width, px", _range(split.box_width)
    yield "box height, px", _range(split.box_height)
    yield "image width, px", _range(split.image_width)
    yield "image height, px", _range(split.image_height)
    yield "problems", str(sum(problem.count for problem in split.problems))


def _range(spread: Spread | None) -> str:
    """`640`, or `3 .. 12 .. 40`: smallest, median, largest."""
    if spread is None:
        return "-"
    if spread.min == spread.max:
        return f"{spread.min:.7g}"
    return " .. ".join(f"{value:.0f}" if value >= 1000 else f"{value:.4g}" for value in (spread.min, spread.median, spread.max))


def _of_classes(report: Report) -> Table:
    table = table_of("class", *(f"{split} {what}" for split in report.splits for what in ("boxes", "images")))
    for one in shortened(report.classes):
        if isinstance(one, int):
            table.add_row(Text(f"... {one} more in report.json", style="dim"))
            continue
        numbers = [x for count in (one.train, one.val) for x in (("-", "-") if count is None else (count.boxes, count.images))]
        table.add_row(harmless(one.name), *(Text(str(number), style="yellow" if number == 0 else "") for number in numbers))
    return table


def _of_problems(report: Report) -> Table:
    return what_is_wrong(
        (name, problem.count, problem.kind, problem.action, without_root(problem.example, report.root))
        for name, split in report.splits.items()
        for problem in split.problems
    )
