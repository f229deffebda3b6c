"""One place for everything a run tells: terminal, TensorBoard, metrics file, pictures, ledger.

Every rank has a reporter and calls it in the same way; only rank 0's shows and writes anything, but for the ledger and
for warnings of what only that rank has seen.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gai_yolo.data.dataset import Batch
from gai_yolo.data.formats.reading import CannotRead
from gai_yolo.data.images import decode
from gai_yolo.data.index import Index
from gai_yolo.evaluation.coco_metrics import ImageDetections
from gai_yolo.evaluation.evaluator import Evaluation
from gai_yolo.goodput.report import REPORT_FILE, Report, as_json, scalars
from gai_yolo.log import OF_NODE, ONCE, told_if_refused
from gai_yolo.reporting.console import NullConsole
from gai_yolo.reporting.drawing import draw_comparison, write_image
from gai_yolo.reporting.run_pictures import RunPictures
from gai_yolo.reporting.tensorboard import TensorBoard
from gai_yolo.sections import ReportingConfig
from gai_yolo.store.atomic import publish_text
from gai_yolo.store.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Reporter:
    """Tells people about a run.

    Args:
        console: the terminal on rank 0, `NullConsole` elsewhere.
        open_tensorboard: on rank 0 if configured, else None. Called after the first step, because it loads much that no step needs.
        index: the validation split, for names and pictures.
        pictures: on rank 0 if there are to be any, else None.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: ReportingConfig,
        index: Index,
        rank: int,
        console: NullConsole,
        open_tensorboard: Callable[[], TensorBoard] | None,
        pictures: RunPictures | None,
    ) -> None:
        self.folder, self.config, self.index, self.rank = folder, config, index, rank
        self.console, self._open_tensorboard = console, open_tensorboard
        self.pictures = pictures
        self._measured, self._epoch = 0, 0
        self._history: Sequence[Mapping[str, Any]] = ()
        self._ledger = folder.ledger / f"rank_{rank}.jsonl" if config.ledger else None
        if config.ledger:
            with contextlib.suppress(OSError):  # told when it is written to
                folder.ledger.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def tensorboard(self) -> TensorBoard | None:
        """Opened when it is first needed."""
        return self._open_tensorboard() if self._open_tensorboard else None

    def begin(self, epoch: int) -> None:
        """Training is about to begin, or to go on, with an epoch."""
        if self.pictures:
            self.pictures.begin(epoch)

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """An epoch of `steps` steps begins, or goes on after `done` of them."""
        self._epoch = epoch
        self.console.start_epoch(epoch, steps, done)

    def step(self, step_in_epoch: int, step: int, losses: Mapping[str, float], learning_rate: float, samples: int) -> None:
        """A step over `samples` samples was made; `step` counts from the run's beginning, from 1."""
        self.console.step(step_in_epoch, losses, learning_rate, samples)
        if self.tensorboard:
            self.tensorboard.batch(step, losses, learning_rate)

    def bad_step(self, step_in_epoch: int, step: int) -> None:
        """A step's loss or gradient was not finite, and it was passed over."""
        logger.warning(f"step {step} (step {step_in_epoch} of the epoch): the loss or the gradient is not finite; it is passed over")
        if self.tensorboard:
            self.tensorboard.scalars(step, {"Bad_Steps": 1.0})

    def goodput(self, step: int | None, report: Report) -> None:
        """Where the time of the whole job went, up to now."""
        path = self.folder.path / REPORT_FILE
        with told_if_refused(logger, path):
            self.folder.store.publish_text(path, as_json(report))
        if self.tensorboard and step is not None:
            self.tensorboard.scalars(step, scalars(report))
        drawn = self.pictures.curves(self._history, report.interruptions, is_last=step is None) if self.pictures else None
        if self.tensorboard and step is None and drawn is not None:  # before the end TensorBoard's own are newer
            self.tensorboard.image(self._history[-1]["step"], "Pictures/curves", drawn)

    def measured(self, step: int) -> None:
        """Gradients were not what the exact sum expected, and were measured; told three times at most."""
        self._measured += 1
        if self._measured <= 3:
            last = "; not told again" if self._measured == 3 else ""
            logger.info(f"step {step}: the gradients jumped; measured before they were summed, which costs no bit but time{last}")

    def trained(self, epoch: int, step: int, batches: Sequence[Batch]) -> None:
        """What this rank is about to train on in a step."""
        for image_id in {i for batch in batches for i in batch.unreadable.tolist()}:
            what = f"rank {self.rank}: image {image_id} cannot be decoded; grey is trained on instead"
            logger.warning(what, extra={**OF_NODE, **ONCE})
        if self._ledger is not None:
            ids = [batch.image_ids.tolist() for batch in batches]
            try:
                with self._ledger.open("a") as file:
                    file.write(json.dumps({"epoch": epoch, "step": step, "micro_batches": ids}) + "\n")
            except OSError as error:
                what = f"rank {self.rank}: {self._ledger}: {error.strerror}; the ledger ends here, training goes on"
                logger.warning(what, extra=OF_NODE)
                self._ledger = None

    def end_epoch(self, step: int, losses: Mapping[str, float], seconds: float, samples: int) -> None:
        """An epoch's training is over; `losses` are means over its steps."""
        self.console.end_epoch(losses, seconds, samples)
        if self.tensorboard:
            self.tensorboard.epoch(step, losses)
            for name, picture in self.pictures.of_the_beginning() if self.pictures and self._epoch == 1 else ():
                self.tensorboard.image(step, f"Pictures/{name}", picture)

    def evaluated(self, epoch: int, step: int, evaluation: Evaluation, is_best: bool) -> None:
        """The weights after `step` steps were evaluated; `is_best` if none before were as good."""
        metrics = evaluation.metrics
        if evaluation.unreadable:
            (first,) = (record.path for record in self.index.images if record.image_id == evaluation.unreadable[0])
            logger.warning(
                f"{len(evaluation.unreadable)} of {len(self.index)} validation images cannot be decoded and are left out of the metrics "
                f"(first: {first})",
                extra=ONCE,
            )
        self.console.evaluation(epoch, metrics.stats, metrics.per_class, evaluation.losses["total"])
        if self.tensorboard:
            self.tensorboard.evaluation(step, evaluation.losses, metrics.stats, metrics.per_class)
        if self.rank == 0:
            with told_if_refused(logger, self.folder.predictions, "pictures cannot be written"):
                self._draw(step, evaluation.detections)
        for name, picture in self.pictures.best(epoch, evaluation).items() if self.pictures and is_best else ():
            if self.tensorboard:
                self.tensorboard.image(step, f"Pictures/{name}", picture)

    def record(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Bring the metrics file up to date: one row for each completed epoch."""
        self._history = history
        if self.rank == 0:
            write_metrics(self.folder, history)
        if self.tensorboard:
            self.tensorboard.flush()

    def close(self) -> None:
        """Write what is left; to be called whatever happened."""
        if "tensorboard" in vars(self) and self.tensorboard:
            self.tensorboard.close()

    def _draw(self, step: int, detections: Sequence[ImageDetections]) -> None:
        found = {one.image_id: one for one in detections}
        count = min(self.config.images, len(self.index))
        for position in np.linspace(0, len(self.index) - 1, count).round().astype(int).tolist():
            record = self.index.images[position]
            try:
                picture = decode(record, max(record.width, record.height), patience=0.0)
            except CannotRead:
                continue  # a picture for people, which training does not wait for
            if picture is None:
                continue
            one, names = found[record.image_id], self.index.class_names
            drawn = draw_comparison(picture, record.boxes, record.classes, one.boxes, one.scores, one.classes, names)
            name = f"{record.image_id}_{record.path.stem}".encode(errors="replace").decode()  # it need not be text
            write_image(self.folder.predictions / f"{name}.jpg", drawn)
            if self.tensorboard:
                self.tensorboard.image(step, f"Predictions/{name}", drawn)


def write_metrics(folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `training_metrics.json`, one row for each completed epoch. Every checkpoint holds all rows, so a disk that refuses is
    only told, and the next time makes up for it. Raises `RunFolderBusy`."""
    with told_if_refused(logger, folder.metrics):
        folder.store.publish_text(folder.metrics, json.dumps(history, indent=1) + "\n")


def rewind_ledger(folder: RunFolder, step: int) -> None:
    """Take out of the ledger what a killed run did after the `step` that is gone on from, a torn last line included."""
    for path in folder.ledger.glob("rank_*.jsonl"):
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, LookupError, TypeError):  # torn
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        publish_text(path, "".join(kept))
