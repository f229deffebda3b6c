"""The real job, with a fault that strikes its last rank alone. GAI_YOLO_ENDING is `WAY:LOG`; whenever the fault strikes, a line is added to
LOG with the time, in seconds of the monotonic clock.

- `nan`: the gradients of the second step, and of all later ones, are no numbers.
- `memory`, `key_error_step`: the second step raises `torch.OutOfMemoryError`, `KeyError`.
- `key_error_loader`: so does loading any sample of the second epoch, in whichever process that happens.
- `key_error_evaluation`: so does the evaluation's first batch.
Whatever else WAY is strikes from outside.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from elastic_train import main
from gai_yolo.data.dataset import Item, TrainingSet
from gai_yolo.data.order import Key
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.goodput import progress
from gai_yolo.job import build as assembly
from gai_yolo.supervision.outcome import leave
from gai_yolo.supervision.streams import forgive_lost_streams
from gai_yolo.training.step import StepResult, TrainingStep

WAY, _, LOG = os.environ["GAI_YOLO_ENDING"].partition(":")
IS_MINE = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
STEP = 2


def strike(error: Exception) -> NoReturn:
    """Leave a line, and raise."""
    note()
    raise error


def note() -> None:
    """Leave a line."""
    with Path(LOG).open("a") as log:
        log.write(f"{time.monotonic()}\n")


class FaultyStep(TrainingStep):
    """A step that goes wrong."""

    def __call__(self, *arguments: Any, **options: Any) -> StepResult:
        number = self.state.step + 1
        if IS_MINE and number == STEP and WAY == "memory":
            strike(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
        if IS_MINE and number == STEP and WAY == "key_error_step":
            strike(KeyError("boxes"))
        handle = None
        if IS_MINE and number >= STEP and WAY == "nan":
            note()
            handle = self.parameters[7].register_hook(_spoiled)
        try:
            return super().__call__(*arguments, **options)
        finally:
            if handle is not None:
                handle.remove()


def _spoiled(gradient: Tensor) -> Tensor:
    return gradient * float("nan")


class FaultyTrainingSet(TrainingSet):
    """Samples that cannot be had."""

    def __getitem__(self, key: Key) -> Item:
        if IS_MINE and key.epoch == 2 and WAY == "key_error_loader":
            strike(KeyError("boxes"))
        return super().__getitem__(key)


class FaultyEvaluator(Evaluator):
    """Batches that cannot be evaluated."""

    def _evaluate(self, *arguments: Any) -> Any:
        if IS_MINE and WAY == "key_error_evaluation":
            strike(KeyError("boxes"))
        return super()._evaluate(*arguments)


if __name__ == "__main__":
    vars(assembly).update(TrainingStep=FaultyStep, TrainingSet=FaultyTrainingSet, Evaluator=FaultyEvaluator)
    vars(progress)["LEAST_SECONDS"] = 1.0  # tests have less time
    forgive_lost_streams()
    leave(main())
