"""COCO's average precision of a network in any format, on a data set's validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gai_yolo.config import Config
from gai_yolo.data.dataset import Batch, EvaluationSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.data.sources import load_index
from gai_yolo.detector.network import to_input
from gai_yolo.detector.postprocess import Detections, to_file_pixels
from gai_yolo.errors import DataError, ExportError
from gai_yolo.evaluation.coco_metrics import ImageDetections, coco_metrics
from gai_yolo.inference.formats import Layout, Run
from gai_yolo.inference.trained import TrainedModel
from gai_yolo.inference.validate import check_classes
from gai_yolo.sections import SplitConfig

AT_A_TIME = 8
"""Images, where a file takes any number."""
Watched = Callable[[Iterable[Batch]], Iterable[Batch]]


@dataclass(frozen=True)
class Examined:
    """What a network's formats are measured with."""

    index: Index
    """Of the validation split."""
    images: ImageSource
    batch: int
    """Images at a time."""
    fills: bool
    """Whether a last, smaller batch has to be filled up."""


def examined(model: TrainedModel, path: Path, layout: Layout) -> Examined:
    """The validation images of a data set as files of a layout take them.

    Args:
        path: as `data.path`.

    Raises:
        DataError: as `load_index`, or its classes are not those of the network.
        ExportError: the layout's input is no square.
    """
    height, width = layout.sides or (model.image_size, model.image_size)
    if height != width:
        raise ExportError(f"--data: images are measured as in training, in squares, and the input is {height} x {width}; leave --data out.")
    known = (model.config or Config()).data
    elsewhere = {"train": SplitConfig(), "val": SplitConfig(), "format": "auto"} if path != known.path else {}
    index = load_index(known.model_copy(update={"path": path, "image_size": height, **elsewhere}), "val")
    check_classes(model, index)
    images = ImageSource(index.images, height, "none", known.cache_folder, index.lost)
    return Examined(index, images, layout.batch or AT_A_TIME, layout.batch is not None)


def average_precision(
    run: Run, detect: Callable[[Sequence[NDArray[Any]]], list[Detections]], on: Examined, watched: Watched = iter
) -> dict[str, float]:
    """COCO's twelve numbers.

    Args:
        detect: makes detections of what `run` returns.
        watched: hands on the batches, and sees when each is done.

    Raises:
        DataError: none of the images can be decoded.
        CannotRead: the disk or the network fails.
    """
    loader = EvaluationLoader(EvaluationSet(on.images), on.batch, 0, 1, 0, False)
    place = {image_id: position for position, image_id in enumerate(on.index.images.image_ids.tolist())}
    found: list[ImageDetections] = []
    unreadable: set[int] = set()
    for batch in watched(loader):
        images = to_input(batch.images, channels_last=False).numpy()
        count = len(images)
        if on.fills and count < on.batch:
            images = np.concatenate((images, np.zeros((on.batch - count, *images.shape[1:]), np.float32)))
        for image_id, geometry, one in zip(batch.image_ids.tolist(), batch.letterbox, detect(run(images))[:count], strict=True):
            record = on.index.images[place[image_id]]
            boxes = to_file_pixels(one.boxes, geometry, record.width, record.height).numpy()
            found.append(ImageDetections(image_id, boxes, one.scores.numpy(), one.classes.numpy()))
        unreadable.update(batch.unreadable.tolist())
    if len(unreadable) == len(on.index):
        raise DataError(f"{on.index.source}: none of the images can be decoded.")
    index = replace(on.index, images=on.index.images.without(unreadable), recorded=None) if unreadable else on.index
    return coco_metrics(index, found).stats
