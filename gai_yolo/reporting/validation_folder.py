"""The folder that a validation leaves: validation.json and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gai_yolo.data.formats.reading import CannotRead
from gai_yolo.data.images import decode
from gai_yolo.evaluation.coco_metrics import distinct_names
from gai_yolo.evaluation.confusion import ImageResult
from gai_yolo.inference.validate import ValidationReport
from gai_yolo.reporting.drawing import draw_comparison, write_image
from gai_yolo.reporting.quality import confidence_picture, confusion_picture, precision_recall_picture
from gai_yolo.reporting.run_pictures import CONFIDENCE, CONFUSION, PRECISION_RECALL
from gai_yolo.reporting.validation_document import IMAGES_EACH_WAY, as_json
from gai_yolo.store.atomic import publish_text

VALIDATION_DOCUMENT = "validation.json"
WORST_IMAGES, BEST_IMAGES = "worst", "best"
LONGEST_STEM = 80
"""Letters of an image's name in that of its picture."""


def keep_validation(folder: Path, report: ValidationReport) -> list[Path]:
    """Draw and write everything; what an earlier validation has left there is replaced.

    Returns:
        What was written, the document first.

    Raises:
        OSError: the disk refuses.
    """
    names, curves, confusion = distinct_names(report.index), report.curves, report.confusion
    subject = f"{report.model.path.stem} on {report.question.split}"
    pictures = {
        PRECISION_RECALL: precision_recall_picture(subject, curves, names),
        CONFIDENCE: confidence_picture(subject, curves, names, report.best),
        CONFUSION: confusion_picture(subject, confusion, names),
    }
    document = folder / VALIDATION_DOCUMENT
    if document.exists():
        _clear(folder, pictures)
    publish_text(document, as_json(report))  # before the pictures: what is beside a document is never of other numbers
    for name, picture in pictures.items():
        write_image(folder / name, picture)
    examples = [*_draw_examples(folder / WORST_IMAGES, report, confusion.worst(IMAGES_EACH_WAY))]
    examples += _draw_examples(folder / BEST_IMAGES, report, confusion.best(IMAGES_EACH_WAY))
    return [document, *(folder / name for name in pictures), *examples]


def _clear(folder: Path, pictures: Iterable[str]) -> None:
    """Remove the pictures of an earlier validation."""
    examples = (old for name in (WORST_IMAGES, BEST_IMAGES) for old in (folder / name).glob("[0-9][0-9]_*.jpg"))
    for old in (*(folder / name for name in pictures), *examples):
        old.unlink(missing_ok=True)


def _draw_examples(folder: Path, report: ValidationReport, results: Sequence[ImageResult]) -> list[Path]:
    """Draw truth beside detections; names begin with the place in the list."""
    if results:
        folder.mkdir(exist_ok=True)
    found, index = {one.image_id: one for one in report.evaluation.detections}, report.evaluation.index
    written = []
    for number, result in enumerate(results, start=1):
        record, one = index.images[result.position], found[result.image_id]
        try:
            picture = decode(record, max(record.width, record.height), patience=0.0)
        except CannotRead:
            continue  # it could be read before, and is only to be looked at
        if picture is None:
            continue
        drawn = draw_comparison(
            picture,
            record.boxes,
            record.classes,
            one.boxes,
            one.scores,
            one.classes,
            index.class_names,
            report.confusion.confidence,
        )
        stem = re.sub(r"[^\w.-]", "_", record.path.stem.encode(errors="replace").decode())[:LONGEST_STEM]
        path = folder / f"{number:02d}_{result.image_id}_{stem}.jpg"
        write_image(path, drawn)
        written.append(path)
    return written
