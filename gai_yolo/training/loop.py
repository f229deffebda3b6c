"""Training, as an outline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gai_yolo.config import Config
from gai_yolo.data.loader import TrainingLoader
from gai_yolo.data.order import Plan
from gai_yolo.detector import YOLO12
from gai_yolo.elastic.notices import Interrupt
from gai_yolo.evaluation.coco_metrics import STAT_NAMES
from gai_yolo.evaluation.evaluator import Evaluation
from gai_yolo.reporting.reporter import Reporter
from gai_yolo.training.snapshots import Snapshots
from gai_yolo.training.state import TrainingState
from gai_yolo.training.step import TrainingStep

LOSSES = ("total", "box", "cls", "dfl")
TRAIN_COLUMNS = ("train_loss", "train_box", "train_cls", "train_dfl")
VAL_COLUMNS = ("val_loss", "val_box", "val_cls", "val_dfl")
"""Names of `LOSSES` in the metrics rows."""


@dataclass(frozen=True)
class Run:
    """The parts that the job has put together."""

    config: Config
    plan: Plan
    state: TrainingState
    loader: TrainingLoader
    step: TrainingStep
    evaluate: Callable[[YOLO12], Evaluation]
    snapshots: Snapshots | None
    """None on ranks that do not write."""
    reporter: Reporter
    interrupt: Interrupt


def train(run: Run) -> None:
    """Train from the state's epoch to the last one; after each epoch the state is evaluated, recorded and saved as configured."""
    for epoch in range(run.state.epoch + 1, run.config.training.epochs + 1):
        row = train_epoch(run, epoch)
        improved = evaluate_epoch(run, epoch, row)
        run.state.epoch = epoch
        run.state.history.append(row)
        save(run, improved)


def train_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """All steps of an epoch; returns its row of metrics."""
    run.state.model.train()
    run.reporter.start_epoch(epoch, run.plan.steps_per_epoch)
    started, samples_before = time.monotonic(), run.state.samples
    sums = dict.fromkeys(LOSSES, 0.0)
    learning_rate = 0.0
    for number, batches in enumerate(run.loader.epoch(epoch)):
        num_micro_batches, num_samples = run.plan.step_size(number)
        result = run.step(batches, num_micro_batches, num_samples, run.config.data.image_size)
        sums = {name: sums[name] + result.losses[name] for name in LOSSES}
        learning_rate = result.learning_rate
        run.reporter.step(number + 1, run.state.step, result.losses, result.learning_rate, num_samples)
        run.reporter.trained(epoch, run.state.step, batches)
        run.interrupt.check()
    means = {name: value / run.plan.steps_per_epoch for name, value in sums.items()}
    seconds, samples = time.monotonic() - started, run.state.samples - samples_before
    run.reporter.end_epoch(run.state.step, means, seconds, samples)
    return {
        "epoch": epoch,
        "step": run.state.step,
        "samples": run.state.samples,
        **dict(zip(TRAIN_COLUMNS, means.values(), strict=True)),
        "learning_rate": learning_rate,
        "images_per_second": round(samples / seconds, 3),
        "seconds": round(seconds, 3),
    }


def evaluate_epoch(run: Run, epoch: int, row: dict[str, Any]) -> bool:
    """Evaluate the EMA weights if due, and add the numbers (else None) to the epoch's row; returns whether they are the best so far."""
    row.update(dict.fromkeys((*VAL_COLUMNS, *STAT_NAMES)))
    if epoch % run.config.evaluation.interval and epoch != run.config.training.epochs:
        return False
    evaluation = run.evaluate(run.state.ema.model)
    row.update(zip(VAL_COLUMNS, (evaluation.losses[name] for name in LOSSES), strict=True))
    row.update({name: value if value >= 0 else None for name, value in evaluation.metrics.stats.items()})
    run.reporter.evaluated(epoch, run.state.step, evaluation)
    metric = evaluation.metrics.stats["mAP50-95"]
    improved = run.state.best_metric is None or metric > run.state.best_metric
    if improved:
        run.state.best_metric = metric
    return improved


def save(run: Run, improved: bool) -> None:
    """Write the checkpoints that are due, then the metrics; all tell the state after an epoch.

    The best one comes first: a run killed in between trains the epoch again and writes the same files.
    """
    if run.snapshots is not None:
        captured = run.state.capture()
        if improved:
            run.snapshots.save_best(captured)
        run.snapshots.save_epoch(captured)
    run.reporter.record(run.state.history)
