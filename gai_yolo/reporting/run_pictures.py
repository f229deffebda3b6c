"""Pictures of a run, for people: in the run folder, on rank 0, outside of the steps.

What shows the beginning is drawn once; what is there is taken to be right, because a run cannot go on with other data. Nothing is learned
from a picture, so whatever goes wrong while one is drawn is told, and that is all. What draws is imported when it is needed: a restart,
which draws nothing at first, does not wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from gai_yolo.data.dataset import SampleSet
from gai_yolo.data.index import Index
from gai_yolo.data.order import BatchPlan
from gai_yolo.evaluation.evaluator import Evaluation
from gai_yolo.goodput.report import Interruption
from gai_yolo.log import ONCE
from gai_yolo.reporting.drawing import Image, write_image

LABELS_PICTURE, CURVES_PICTURE = "labels.png", "curves.png"
BATCHES_DRAWN = ("train_batch_1.jpg", "train_batch_2.jpg")
PRECISION_RECALL, CONFIDENCE, CONFUSION = "precision_recall.png", "confidence.png", "confusion_matrix.png"
CURVES_INTERVAL = 60.0
"""Seconds between two drawings of the curves, so that runs of short epochs do not draw more than they train."""

logger = logging.getLogger(__name__)


class RunPictures:
    """Draws into one folder.

    Args:
        training: samples by `Key`, as the network is going to see them.
        index: of the training set.
    """

    def __init__(self, folder: Path, training: SampleSet, plan: BatchPlan, index: Index) -> None:
        self.folder, self.training, self.plan, self.index = folder, training, plan, index
        self._drawn_at = time.monotonic()

    def begin(self, epoch: int) -> None:
        """Draw what is to be learned, and the first batches of an epoch (from 1), unless they are there."""
        with self._for_people(LABELS_PICTURE) as path:
            if not path.exists():
                from gai_yolo.reporting.training_charts import labels_picture

                self._write(path, labels_picture(self.index, self.training.images.image_size))
        for number, name in enumerate(BATCHES_DRAWN[: self.plan.steps_per_epoch]):
            with self._for_people(name) as path:
                if not path.exists():
                    self._write(path, self._batch(epoch, number))

    def of_the_beginning(self) -> Iterator[tuple[str, Image]]:
        """Name and RGB picture of what `begin` has drawn."""
        for name in (LABELS_PICTURE, *BATCHES_DRAWN):
            data = cv2.imread(str(self.folder / name)) if (self.folder / name).exists() else None
            if data is not None:
                yield Path(name).stem, np.asarray(cv2.cvtColor(data, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    def best(self, epoch: int, evaluation: Evaluation) -> dict[str, Image]:
        """Draw how good the best epoch so far is; returns the pictures by name."""
        from gai_yolo.evaluation.confusion import confusion_of
        from gai_yolo.evaluation.curves import best_point
        from gai_yolo.reporting.quality import confidence_picture, confusion_picture, precision_recall_picture

        drawn: dict[str, Image] = {}
        curves, names, subject = evaluation.curves, evaluation.index.class_names, f"epoch {epoch}"
        assert curves is not None, "to be called on rank 0"
        draw: dict[str, Callable[[], Image]] = {
            PRECISION_RECALL: lambda: precision_recall_picture(subject, curves, names),
            CONFIDENCE: lambda: confidence_picture(subject, curves, names, best_point(curves)),
            CONFUSION: lambda: confusion_picture(subject, confusion_of(evaluation.index, evaluation.detections), names),
        }
        for name, picture in draw.items():
            with self._for_people(name) as path:
                drawn[path.stem] = picture()
                self._write(path, drawn[path.stem])
        return drawn

    def curves(self, history: Sequence[Mapping[str, Any]], interruptions: Sequence[Interruption], is_last: bool) -> Image | None:
        """Draw how training went, if it is the last time or some time has passed since; returns the picture."""
        if not history or not (is_last or time.monotonic() - self._drawn_at >= CURVES_INTERVAL):
            return None
        self._drawn_at = time.monotonic()
        with self._for_people(CURVES_PICTURE) as path:
            from gai_yolo.reporting.training_charts import curves_picture

            picture = curves_picture(history, interruptions)
            self._write(path, picture)
            return picture
        return None

    def _batch(self, epoch: int, step: int) -> Image:
        """The first samples of a step (0-based in the epoch)."""
        from gai_yolo.reporting.batch_sheet import MOST_SHOWN, batch_picture

        keys = [key for batch in self.plan.micro_batches(self.plan.order(epoch), step) for key in batch]
        samples = [self.training[key].sample for key in keys[:MOST_SHOWN]]
        title = f"epoch {epoch}, step {step + 1}: {len(samples)} of {len(keys)} samples, as the network sees them"
        return batch_picture(title, samples, self.index.class_names)

    def _write(self, path: Path, picture: Image) -> None:
        self.folder.mkdir(exist_ok=True)
        write_image(path, picture)

    @contextlib.contextmanager
    def _for_people(self, name: str) -> Iterator[Path]:
        """Around the drawing of a picture, with its path."""
        path = self.folder / name
        try:
            yield path
        except Exception as error:  # of whatever kind: it is a picture
            said = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            logger.warning(f"{path}: the picture cannot be drawn ({said}); training goes on", extra=ONCE)
