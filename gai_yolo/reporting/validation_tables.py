"""A validation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gai_yolo.evaluation.coco_metrics import distinct_names
from gai_yolo.evaluation.curves import CURVE_IOU
from gai_yolo.inference.validate import ValidationReport
from gai_yolo.reporting.console import METRICS
from gai_yolo.reporting.terminal import harmless
from gai_yolo.reporting.validation_document import classes, image_row

MOST_CLASS_ROWS, LOWEST_ROWS = 40, 20
"""Classes that the table shows; of more, those with the highest AP and those with the lowest."""
MOST_MIX_UPS, MOST_IMAGES = 5, 5
LONGEST_CLASS_NAME = 60
"""Letters of a name in a sentence."""


def view(report: ValidationReport) -> RenderableType:
    """All of it but the curves."""
    parts: list[RenderableType] = [*_head(report), _of_metrics(report), _of_classes(report), *_of_mix_ups(report)]
    if report.confusion.worst(1):
        parts.append(_of_images(report))
    parts += [harmless(f"note: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _head(report: ValidationReport) -> Iterator[Text]:
    model, config, position = report.model, report.config, report.model.position
    where = f" (epoch {position['epoch']}, step {position['step']})" if {"epoch", "step"} <= position.keys() else ""
    yield harmless(f"{model.path}{where}: YOLO12-{model.network.size}", style="bold")
    counts = f"{len(report.evaluation.index)} images, {int(report.curves.positives.sum())} boxes"
    yield harmless(
        f"{report.question.split} of {config.data.path}: {counts}; "
        f"images of {config.data.image_size} pixels, {report.device}, amp {config.training.amp}"
    )


def _of_metrics(report: ValidationReport) -> Table:
    table = _table("COCO", "value")
    for name, value in report.evaluation.metrics.stats.items():
        table.add_row(METRICS[name], _number(value if value >= 0 else None))
    for name, value in report.evaluation.losses.items():
        table.add_row(f"loss, {name}", f"{value:.4f}")
    return table


def _of_classes(report: ValidationReport) -> Table:
    table = _table("class", "boxes", "images", "AP 0.50:0.95", "AP 0.50", "best F1", "at confidence")
    rows: list[dict[str, Any] | int] = [*classes(report)]
    if len(rows) > MOST_CLASS_ROWS:
        ordered = sorted(classes(report), key=lambda row: -1 if row["AP50-95"] is None else row["AP50-95"], reverse=True)
        highest = MOST_CLASS_ROWS - LOWEST_ROWS
        rows = [*ordered[:highest], len(ordered) - MOST_CLASS_ROWS, *ordered[-LOWEST_ROWS:]]
    for row in rows:
        if isinstance(row, int):
            table.add_row(Text(f"... {row} more in validation.json", style="dim"))
            continue
        confidence = "-" if row["best_f1_confidence"] is None else f"{row['best_f1_confidence']:.3f}"
        numbers = [_number(row[name]) for name in ("AP50-95", "AP50", "best_f1")]
        table.add_row(harmless(row["name"]), str(row["boxes"]), str(row["images"]), *numbers, confidence)
    return table


def _of_mix_ups(report: ValidationReport) -> Iterator[Text]:
    best, confusion = report.best, report.confusion
    if best is not None:
        yield Text(
            f"highest mean F1 {best.f1:.4f} at confidence {best.confidence:.3f}: precision {best.precision:.4f}, recall {best.recall:.4f} "
            f"(IoU {CURVE_IOU:.2f}, means over classes)"
        )
    matrix = confusion.matrix
    own, background = np.trace(matrix), len(matrix) - 1
    mixed = matrix[:background, :background].copy()
    np.fill_diagonal(mixed, 0)
    counts = f"{own} boxes found, {mixed.sum()} taken for another class, {matrix[:, background].sum()} missed; "
    yield Text(
        f"from confidence {confusion.confidence:g}, at IoU {confusion.iou:g}: {counts}{matrix[background].sum()} detections of nothing"
    )
    names = distinct_names(report.index)
    places = np.argsort(-mixed, axis=None, kind="stable")[:MOST_MIX_UPS]
    told = [(names[place // background], names[place % background], mixed.flat[place]) for place in places.tolist() if mixed.flat[place]]
    if told:
        words = ", ".join(f"{one[:LONGEST_CLASS_NAME]} for {other[:LONGEST_CLASS_NAME]} {count}" for one, other, count in told)
        yield harmless(f"most often taken for another: {words}")


def _of_images(report: ValidationReport) -> Table:
    table = _table("worst images, by their F1", "F1", "right", "mixed up", "missed", "invented")
    for one in report.confusion.worst(MOST_IMAGES):
        row = image_row(report, one)
        table.add_row(harmless(row["file"]), _number(one.score), *(str(row[name]) for name in ("right", "mixed_up", "missed", "invented")))
    return table


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
