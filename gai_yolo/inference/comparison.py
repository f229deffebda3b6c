"""Whether an exported file says what the network says: the same pictures through both, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from gai_yolo.data.images import GREY
from gai_yolo.detector.boxes import STRIDES
from gai_yolo.detector.postprocess import Detections, select_detections
from gai_yolo.inference.formats import Layout, Run
from gai_yolo.inference.graph import Selection

BATCHES = (1, 2, 5)
"""That a file for any number of images is tried with."""
CANDIDATES = 200
"""Scores of an image that non-maximum suppression is tried with, about, whatever the file's own confidence lets through."""
UNEQUAL_DETECTIONS = 0.01
"""Part of the detections that may differ: programs round overlaps differently, and one may lie at the threshold to the last digit."""
SAME_SCORE, SAME_PIXEL = 1e-5, 1e-2
"""Two detections of one class that differ by less are one: the programs that compute them have computed with the same numbers."""


@dataclass(frozen=True)
class Distance:
    """How far outputs are apart, or may be."""

    boxes: float
    """Pixels of the input."""
    scores: float
    """Of values in 0..1."""


@dataclass(frozen=True)
class Tolerance:
    """How much an output may differ from PyTorch's in float32."""

    scores: float
    """The largest difference of a score."""
    of_highest: float
    """The same as a part of the batch's highest score, lest a network that sees nothing in the pictures agrees with everything."""
    boxes: float
    """The largest difference of a coordinate, as a part of the input's longer side."""

    def over(self, scores: NDArray[np.float32], longer_side: int) -> Distance:
        """The largest differences from these scores and their boxes."""
        return Distance(self.boxes * longer_side, min(self.scores, self.of_highest * float(scores.max())))


EXACT, HALF = Tolerance(1e-4, 1e-2, 1e-4), Tolerance(2e-2, 1e-1, 2e-2)
"""In float32 and in fp16, which holds three digits at each of some hundred layers."""
ROUNDINGS = 4
"""A network may carry the last digits of float32 further than `EXACT`: the larger ones do before they have learned much. What a file then
differs from PyTorch is measured by what PyTorch in float32 differs from float64: it may be so many times that, and never more than `HALF`.
Two computations that each are once that far from the truth are up to twice that far apart; the rest is for worse luck."""


@dataclass(frozen=True)
class Difference:
    """Of boxes and scores, before any selection."""

    batch: int
    height: int
    width: int
    boxes: float
    """The largest of a coordinate, in pixels of the input."""
    scores: float
    """The largest, of values in 0..1."""
    is_small: bool
    """Within the tolerance."""
    rounding: Distance | None = None
    """What PyTorch in float32 differs from float64 there; None where the tolerance was enough."""


@dataclass(frozen=True)
class SelectionDifference:
    """Of detections, between the file and `select_detections` on the same boxes and scores."""

    batch: int
    height: int
    width: int
    confidence: float
    """From which on scores counted: the file's own, or one at which there is enough to select from."""
    detections: int
    unequal: int
    """Detections of one of both that the other has not."""
    is_small: bool


def tried_shapes(layout: Layout, image_size: int) -> list[tuple[int, int, int]]:
    """Batch, height and width of what a file is tried with: where it takes any, squares as in training, and smaller oblongs."""
    coarsest = max(STRIDES)

    def part(of: float) -> int:
        return max(round(image_size * of / coarsest), 1) * coarsest

    batches = BATCHES if layout.batch is None else (layout.batch,)
    if layout.sides is not None:
        return [(batch, *layout.sides) for batch in batches]
    small = [(batch, *((part(0.5), part(0.75)) if number % 2 else (part(0.75), part(0.5)))) for number, batch in enumerate(batches)]
    return [*small, *((batch, image_size, image_size) for batch in batches[:2])]


def pictures(batch: int, height: int, width: int) -> NDArray[np.float32]:
    """Images `(B, 3, H, W)` in 0..1 in turns: shapes on a soft ground, noise, and soft noise; the same ones each time."""
    rng = np.random.default_rng((batch, height, width))
    made = []
    for number in range(batch):
        image = rng.random((height, width, 3), dtype=np.float32)
        if number % 3 == 0:
            image = np.full((height, width, 3), GREY / 255, np.float32)
            image += np.linspace(-0.2, 0.2, width, dtype=np.float32)[None, :, None]
            for _ in range(12):
                x, y = (int(rng.integers(side)) for side in (width, height))
                side, colour = int(rng.integers(8, max(height, width) // 3)), rng.random(3).tolist()
                if rng.random() < 0.5:
                    cv2.rectangle(image, (x, y), (x + side, y + int(side * rng.uniform(0.4, 1.6))), colour, -1)
                else:
                    cv2.circle(image, (x, y), side // 2 + 1, colour, -1)
        elif number % 3 == 2:
            image = cv2.GaussianBlur(image, (0, 0), 6).astype(np.float32) * 3 - 1
        made.append(image.clip(0, 1).transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(made), dtype=np.float32)


def differences(
    run: Run, truth: Run, shapes: Sequence[tuple[int, int, int]], tolerance: Tolerance, precise: Run | None = None
) -> Iterator[Difference]:
    """A file without selection against the network.

    Args:
        precise: the network in float64, which is asked where the tolerance is exceeded; see `ROUNDINGS`. None to leave it at that.
    """
    for shape in shapes:
        images = pictures(*shape)
        wanted, found = truth(images), run(images)
        if [one.shape for one in wanted] != [one.shape for one in found]:
            yield Difference(*shape, np.inf, np.inf, False)
            continue
        apart, limits, rounding = _apart(wanted, found), tolerance.over(wanted[1], max(shape[1:])), None
        if precise is not None and not _within(apart, limits):
            rounding = _apart(wanted, precise(images))
            most = HALF.over(wanted[1], max(shape[1:]))
            limits = Distance(
                max(limits.boxes, min(ROUNDINGS * rounding.boxes, most.boxes)),
                max(limits.scores, min(ROUNDINGS * rounding.scores, most.scores)),
            )
        yield Difference(*shape, apart.boxes, apart.scores, _within(apart, limits), rounding)


def _apart(wanted: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> Distance:
    return Distance(*(float(np.abs(one - other.astype(np.float32)).max()) for one, other in zip(wanted, found, strict=True)))


def _within(apart: Distance, limits: Distance) -> bool:
    # Written so that what is not a number is not small.
    return apart.boxes <= limits.boxes and apart.scores <= limits.scores


def confidence_for(run: Run, shapes: Sequence[tuple[int, int, int]]) -> float:
    """A confidence at which the tried pictures have some `CANDIDATES` boxes each to select from."""
    levels = []
    for shape in shapes:
        scores = np.sort(run(pictures(*shape))[1].reshape(shape[0], -1), axis=1)
        at = min(CANDIDATES, scores.shape[1] - 1)
        levels += scores[:, -at - 1].tolist()
    return float(np.float32(np.median(levels)))


def selection_differences(
    run: Run, without: Run, shapes: Sequence[tuple[int, int, int]], selection: Selection
) -> Iterator[SelectionDifference]:
    """A file with selection against the one without, whose outputs are selected from here."""
    for shape in shapes:
        images = pictures(*shape)
        wanted, found = selected(without(images), selection), detections_of(run(images))
        count = sum(len(one.scores) for one in wanted)
        unequal = sum(_without_partner(one, other) + _without_partner(other, one) for one, other in zip(wanted, found, strict=True))
        yield SelectionDifference(*shape, selection.confidence, count, unequal, unequal <= UNEQUAL_DETECTIONS * count)


def selected(outputs: Sequence[NDArray[Any]], selection: Selection) -> list[Detections]:
    """The detections of each image, out of boxes and scores."""
    boxes, scores = (torch.from_numpy(np.asarray(one, np.float32)) for one in outputs)
    return select_detections(boxes, scores, selection.confidence, selection.iou, selection.max_detections)


def detections_of(outputs: Sequence[NDArray[Any]]) -> list[Detections]:
    """The detections of each image, out of the outputs of a file with selection."""
    boxes, scores, classes, counts = (torch.from_numpy(np.ascontiguousarray(one)) for one in outputs)
    rows = zip(boxes, scores, classes, counts.tolist(), strict=True)
    return [Detections(box[:count], score[:count], label[:count]) for box, score, label, count in rows]


def _without_partner(these: Detections, others: Detections) -> int:
    same = these.classes[:, None] == others.classes[None]
    same &= (these.scores[:, None] - others.scores[None]).abs() <= SAME_SCORE
    same &= (these.boxes[:, None] - others.boxes[None]).abs().amax(dim=-1) <= SAME_PIXEL
    return int((~same.any(dim=1)).sum())
