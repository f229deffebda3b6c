"""What a check says in numbers: `report.json`, of which the tables are made, too."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.formats.check import Split
from gai_yolo.data.formats.reading import expand
from gai_yolo.data.index import Category, Index
from gai_yolo.data_check.inspection import Findings, SplitFindings
from gai_yolo.sections import DataConfig

REPORT_VERSION = 1
"""Of the document; raised when a key is removed or gets another meaning, not when one is added."""
SMALL, LARGE = 32.0**2, 96.0**2
"""Pixels^2 of the original image: COCO's borders between small, medium and large objects."""
MOST_SIZES = 20
"""Image sizes that are listed."""


@dataclass(frozen=True)
class Spread:
    """Of a number over all boxes or images."""

    min: float
    median: float
    mean: float
    max: float


@dataclass(frozen=True)
class ProblemRow:
    """As `Problem`."""

    kind: str
    count: int
    action: str
    example: str


@dataclass(frozen=True)
class ImageSize:
    """How many images are so large, in pixels."""

    width: int
    height: int
    images: int


@dataclass(frozen=True)
class SplitReport:
    """A split; the numbers are 0 and the spreads None where there is nothing to count."""

    source: str | None
    """Where it was read from; None if it could not be."""
    refusal: str | None
    """Why training would refuse it."""
    images: int
    """That are trained or evaluated on; skipped ones are among the problems."""
    background_images: int
    """Images without any box."""
    boxes: int
    """Without crowd regions."""
    crowds: int
    """Crowd regions."""
    decoded: int
    """Images whose decoding was tried."""
    undecodable: int
    box_sizes: dict[str, int]
    """`small`, `medium`, `large`, as COCO's metrics count them: by annotated area, in pixels of the original image."""
    box_width: Spread | None
    """Pixels of the original image, as all lengths here."""
    box_height: Spread | None
    box_aspect: Spread | None
    """Width / height."""
    boxes_per_image: Spread | None
    image_width: Spread | None
    image_height: Spread | None
    image_sizes: list[ImageSize]
    """The most frequent ones."""
    num_image_sizes: int
    problems: list[ProblemRow]


@dataclass(frozen=True)
class ClassCount:
    """A class in a split."""

    boxes: int
    """Without crowd regions."""
    images: int
    """With at least one of its boxes."""


@dataclass(frozen=True)
class ClassReport:
    """A class; None for a split that does not have it, or could not be read."""

    id: int
    name: str
    train: ClassCount | None
    val: ClassCount | None


@dataclass(frozen=True)
class Report:
    """Everything that a check says."""

    version: int
    path: str
    """`data.path`."""
    root: str
    """The data set's folder."""
    trainable: bool
    """Whether training would take the data set."""
    refusals: list[str]
    """Each reason for which it would not."""
    splits: dict[Split, SplitReport]
    classes: list[ClassReport]
    """In the order of the network's outputs."""
    pictures: list[str]
    """Files that were drawn."""


def make_report(config: DataConfig, findings: Findings) -> Report:
    """Count what was found; nothing is drawn yet."""
    splits = {split: _split_report(found) for split, found in findings.splits.items()}
    counts = {split: _class_counts(found.index) for split, found in findings.splits.items()}
    categories = dict.fromkeys(category for of_split in counts.values() for category in of_split)
    classes = [ClassReport(one.id, one.name, counts["train"].get(one), counts["val"].get(one)) for one in categories]
    is_trainable, refusals = not findings.refusals, findings.refusals
    return Report(REPORT_VERSION, str(config.path), str(root_of(config)), is_trainable, refusals, splits, classes, pictures=[])


def root_of(config: DataConfig) -> Path:
    """The data set's folder: that of a YOLO data.yaml, where one is given; whether it is there is not asked."""
    path = expand(config.path)
    return path.parent if path.is_file() else path


def without_root(text: str, root: Path | str) -> str:
    """A text with its file names relative to the data set's folder."""
    return text.replace(f"{root}/", "")


def as_json(report: Report) -> str:
    """The document, in ASCII."""
    return json.dumps(asdict(report), indent=1) + "\n"


def box_array(index: Index) -> NDArray[np.float32]:
    """(N, 4) xyxy of all boxes of a split that are no crowd regions."""
    return np.concatenate([image.boxes[~image.crowd] for image in index.images])


def _split_report(found: SplitFindings) -> SplitReport:
    index = found.index
    images = [] if index is None else list(index.images)
    none = np.zeros(0, dtype=np.float32)
    boxes = none.reshape(-1, 4) if index is None else box_array(index)
    areas = np.concatenate([image.areas[~image.crowd] for image in images]) if images else none
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    sizes = Counter((image.width, image.height) for image in images)
    small, large = int((areas < SMALL).sum()), int((areas >= LARGE).sum())
    return SplitReport(
        source=None if index is None else index.source,
        refusal=found.refusal,
        images=len(images),
        background_images=sum(len(image.boxes) == 0 for image in images),
        boxes=len(boxes),
        crowds=sum(int(image.crowd.sum()) for image in images),
        decoded=found.num_decoded,
        undecodable=found.num_undecodable,
        box_sizes={"small": small, "medium": len(areas) - small - large, "large": large},
        box_width=_spread(width),
        box_height=_spread(height),
        box_aspect=_spread(width / height),
        boxes_per_image=_spread(np.array([int((~image.crowd).sum()) for image in images])),
        image_width=_spread(np.array([image.width for image in images])),
        image_height=_spread(np.array([image.height for image in images])),
        image_sizes=[ImageSize(*size, count) for size, count in sizes.most_common(MOST_SIZES)],
        num_image_sizes=len(sizes),
        problems=[ProblemRow(p.kind, p.count, p.action, p.example) for p in found.problems],
    )


def _spread(values: NDArray[np.generic]) -> Spread | None:
    if not len(values):
        return None
    exact = values.astype(np.float64)
    return Spread(*(round(float(value), 3) for value in (exact.min(), np.median(exact), exact.mean(), exact.max())))


def _class_counts(index: Index | None) -> dict[Category, ClassCount]:
    if index is None:
        return {}
    boxes = np.zeros(len(index.categories), dtype=np.int64)
    images = np.zeros_like(boxes)
    for image in index.images:
        positions, counts = np.unique(image.classes[~image.crowd], return_counts=True)
        boxes[positions] += counts
        images[positions] += 1
    return {one: ClassCount(*both) for one, *both in zip(index.categories, boxes.tolist(), images.tolist(), strict=True)}
