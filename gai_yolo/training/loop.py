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
from gai_yolo.training.digest import DivergenceAlarm
from gai_yolo.training.snapshots import NoSnapshots
from gai_yolo.training.state import LOSSES, TrainingState
from gai_yolo.training.step import TrainingStep

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
    alarm: DivergenceAlarm
    evaluate: Callable[[YOLO12], Evaluation]
    snapshots: NoSnapshots
    """`Snapshots` on the rank that writes."""
    reporter: Reporter
    interrupt: Interrupt


def train(run: Run) -> None:
    """Train from where the state stands to the last epoch; each is evaluated, recorded and saved as configured."""
    for epoch in range(run.state.epoch + 1, run.config.training.epochs + 1):
        row = train_epoch(run, epoch)
        evaluate_epoch(run, epoch, row)
        run.state.end_epoch(row)
        run.alarm.compare(run.state)
        run.snapshots.after_epoch(run.state)
        run.reporter.record(run.state.history)
    run.snapshots.finish()


def train_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """The steps of an epoch that are not done yet; returns the row of metrics of all of them."""
    state, progress, steps = run.state, run.state.progress, run.plan.steps_per_epoch
    done = state.step - (epoch - 1) * steps
    state.model.train()
    run.reporter.start_epoch(epoch, steps, done)
    before, started = progress.seconds, time.monotonic()
    for number, batches in enumerate(run.loader.epoch(epoch, done), start=done):
        num_micro_batches, num_samples = run.plan.step_size(number)
        save = run.snapshots.is_due(state.step + 1)
        result = run.step(batches, num_micro_batches, num_samples, run.config.data.image_size, announce=save)
        progress.losses = {name: progress.losses[name] + result.losses[name] for name in LOSSES}
        progress.seconds = before + time.monotonic() - started
        if result.measured and state.step > 1:
            run.reporter.measured(state.step)
        run.reporter.step(number + 1, state.step, result.losses, result.learning_rate, num_samples)
        run.reporter.trained(epoch, state.step, batches)
        run.alarm.after_step(state, saving=result.announced)
        run.snapshots.after_step(state, save)
        run.interrupt.check()
    means = {name: value / steps for name, value in progress.losses.items()}
    samples = sum(run.plan.step_size(number)[1] for number in range(steps))
    run.reporter.end_epoch(state.step, means, progress.seconds, samples)
    return {
        "epoch": epoch,
        "step": state.step,
        "samples": state.samples,
        **dict(zip(TRAIN_COLUMNS, means.values(), strict=True)),
        "learning_rate": run.step.recipe.learning_rate(state.step - 1),
        "images_per_second": round(samples / progress.seconds, 3),
        "seconds": round(progress.seconds, 3),
    }


def evaluate_epoch(run: Run, epoch: int, row: dict[str, Any]) -> None:
    """Evaluate the EMA weights if due, and add the numbers (else None) to the epoch's row."""
    row.update(dict.fromkeys((*VAL_COLUMNS, *STAT_NAMES)))
    if epoch % run.config.evaluation.interval and epoch != run.config.training.epochs:
        return
    evaluation = run.evaluate(run.state.ema.model)
    row.update(zip(VAL_COLUMNS, (evaluation.losses[name] for name in LOSSES), strict=True))
    row.update({name: value if value >= 0 else None for name, value in evaluation.metrics.stats.items()})
    run.reporter.evaluated(epoch, run.state.step, evaluation)
    metric = evaluation.metrics.stats["mAP50-95"]
    run.state.best_metric = metric if run.state.best_metric is None else max(metric, run.state.best_metric)
