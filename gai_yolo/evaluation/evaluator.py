"""COCO evaluation of a model over all ranks: each image once, the same numbers whatever the world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gai_yolo.data.dataset import Batch
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.detector import YOLO12
from gai_yolo.detector.loss import DetectionLoss, normalised
from gai_yolo.detector.network import autocast, to_input
from gai_yolo.detector.postprocess import Detections, select_detections, to_file_pixels
from gai_yolo.distributed.world import World
from gai_yolo.evaluation.coco_metrics import CocoMetrics, ImageDetections, measure
from gai_yolo.evaluation.curves import Curves
from gai_yolo.sections import EvaluationConfig


@dataclass(frozen=True)
class Evaluation:
    """The result over the whole split."""

    losses: dict[str, float]
    """total, box, cls, dfl."""
    metrics: CocoMetrics
    detections: list[ImageDetections]
    """Of every image on rank 0, empty on the others."""
    unreadable: list[int]
    """Ids of images that could not be decoded, sorted; nothing could be found in them, so the metrics leave them out."""
    curves: Curves | None
    """On rank 0, None on the others."""
    index: Index
    """Of the images that the metrics count."""


@dataclass(eq=False)
class Evaluator:
    """Evaluates models on one split."""

    loader: EvaluationLoader
    """This rank's batches."""
    index: Index
    loss: DetectionLoss
    world: World
    config: EvaluationConfig
    amp: str
    channels_last: bool
    """Number and memory formats, as in training."""

    def __post_init__(self) -> None:
        self._positions = {image_id: position for position, image_id in enumerate(self.index.images.image_ids.tolist())}

    @torch.inference_mode()
    def __call__(self, model: YOLO12, watched: Callable[[Iterable[Batch]], Iterable[Batch]] = iter) -> Evaluation:
        """Evaluate a model in eval mode; to be called on all ranks, with equal weights.

        Args:
            watched: hands on the batches, and sees when each is done.
        """
        sums: dict[int, list[float]] = {}
        detections: list[ImageDetections] = []
        unreadable: set[int] = set()
        for number, batch in zip(self.loader.numbers, watched(self.loader), strict=True):
            batch_sums, found = self._evaluate(model, batch.to(self.world.device))
            sums[number] = batch_sums.tolist()
            detections += found
            unreadable.update(batch.unreadable.tolist())
        parts = self.world.gather((sums, detections, unreadable))
        # Added up in the order of batches, so that the rounding is the same for every world size.
        all_sums = {number: row for part, _, _ in parts for number, row in part.items()}
        total = torch.tensor([all_sums[number] for number in sorted(all_sums)], dtype=torch.float64).sum(dim=0)
        all_detections = [found for _, part, _ in parts for found in part]
        left_out = {image_id for _, _, part in parts for image_id in part}
        index = replace(self.index, images=self.index.images.without(left_out), recorded=None) if left_out else self.index
        curves: list[Curves] = []

        def scored() -> CocoMetrics:
            metrics, of_classes = measure(index, all_detections)
            curves.append(of_classes)  # stays here: the numbers are sent to all ranks
            return metrics

        metrics = self.world.from_first(scored)
        mine = all_detections if self.world.is_first else []
        return Evaluation(normalised(total), metrics, mine, sorted(left_out), next(iter(curves), None), index)

    def _evaluate(self, model: YOLO12, batch: Batch) -> tuple[Tensor, list[ImageDetections]]:
        height, width = batch.images.shape[-2:]
        with autocast(self.world.device, self.amp):
            raw = model.raw(to_input(batch.images, self.channels_last))
        sums = self.loss(raw, height, width, batch.box_image, batch.classes, batch.boxes).detached()
        boxes, probabilities = model.head.decode(raw, height, width)
        found = select_detections(boxes, probabilities, self.config.confidence, self.config.iou, self.config.max_detections)
        rows = zip(batch.image_ids.tolist(), batch.letterbox, found, strict=True)
        return sums, [self._in_file_pixels(image_id, geometry, one) for image_id, geometry, one in rows]

    def _in_file_pixels(self, image_id: int, geometry: Tensor, found: Detections) -> ImageDetections:
        record = self.index.images[self._positions[image_id]]
        boxes = to_file_pixels(found.boxes, geometry, record.width, record.height)
        return ImageDetections(image_id, boxes.cpu().numpy(), found.scores.cpu().numpy(), found.classes.cpu().numpy())
