"""Training, as an outline."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gai_yolo.checkpointing.completion import is_budget_spent, reason_to_end
from gai_yolo.checkpointing.digest import DivergenceAlarm
from gai_yolo.checkpointing.manager import CheckpointManager
from gai_yolo.checkpointing.state import LOSSES, TrainingState
from gai_yolo.data.loader import TrainingLoader
from gai_yolo.data.order import BatchPlan
from gai_yolo.errors import Departure, Ending
from gai_yolo.evaluation.coco_metrics import STAT_NAMES
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.goodput.record import Phase, Record
from gai_yolo.goodput.report import report
from gai_yolo.log import OF_NODE
from gai_yolo.reporting.reporter import Reporter
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.context import JobContext
from gai_yolo.training.multi_scale import InputSize
from gai_yolo.training.step import StepRequests, StepResult, TrainingStep

TRAIN_COLUMNS = ("train_loss", "train_box", "train_cls", "train_dfl")
VAL_COLUMNS = ("val_loss", "val_box", "val_cls", "val_dfl")
"""Names of `LOSSES` in the metrics rows."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingParts:
    """The parts that the job has put together."""

    training: TrainingConfig
    evaluation_interval: int
    """Epochs."""
    input_size: InputSize
    plan: BatchPlan
    state: TrainingState
    loader: TrainingLoader
    step: TrainingStep
    alarm: DivergenceAlarm
    evaluate: Evaluator
    saver: CheckpointManager
    reporter: Reporter
    context: JobContext
    records: Sequence[Record]
    """Of earlier starts."""


def train(parts: TrainingParts) -> None:
    """Train from where the state stands until the run is complete; each epoch is evaluated, recorded and saved as configured.

    Raises:
        Departure: a process has to leave; the state after the last step is saved.
        Stop: training cannot go on.
    """
    parts.saver.catch_up()
    parts.reporter.begin(min(parts.state.epoch + 1, parts.training.epochs))
    while not is_complete(parts):
        epoch = parts.state.epoch + 1
        parts.context.world.end_long_work()
        row = train_epoch(parts, epoch)
        parts.context.world.begin_long_work()
        parts.context.enter(Phase.EVALUATION)
        evaluate_epoch(parts, epoch, row)
        parts.state.end_epoch(row)
        parts.context.enter(Phase.SNAPSHOT)
        parts.alarm.compare(parts.state)
        parts.saver.after_epoch()
        parts.context.enter(Phase.REPORTING)
        parts.reporter.record(parts.state.history)
        tell_goodput(parts, parts.state.step)
    parts.context.enter(Phase.CLOSING)
    # The other processes must not leave before: a launcher takes their end for the job's.
    parts.context.world.from_first(parts.saver.finish)
    parts.context.recorder.ended(Ending.FINISHED)
    tell_goodput(parts, None)


def is_complete(parts: TrainingParts) -> bool:
    """Whether there is nothing more to train. A collective: what depends on times the first rank decides."""
    state = parts.state
    return parts.context.world.from_first(lambda: bool(reason_to_end(parts.training, state.history, state.best_since)))


def train_epoch(parts: TrainingParts, epoch: int) -> dict[str, Any]:
    """The steps of an epoch that are not done yet; returns the row of metrics of all of them."""
    state, steps, enter = parts.state, parts.plan.steps_per_epoch, parts.context.enter
    done = state.step - (epoch - 1) * steps
    parts.step.begin_epoch(epoch)
    parts.reporter.start_epoch(epoch, steps, done)
    before, started = state.progress.seconds, time.monotonic()
    micro_batches = parts.loader.epoch(epoch, done)
    for number in range(done, steps):
        enter(Phase.DATA)
        batches = next(micro_batches)
        # Beforehand: if the step is completed and this process is not there any more, nobody else knows what it has trained on.
        parts.reporter.trained(epoch, state.step + 1, batches)
        enter(Phase.STEP)
        num_micro_batches, num_samples = parts.plan.step_size(number)
        result = parts.step(batches, num_micro_batches, num_samples, parts.input_size.at(state.step), requests(parts))
        state.progress.seconds = before + time.monotonic() - started
        parts.context.step_done(state.step, epoch)
        enter(Phase.REPORTING)
        report_step(parts, number + 1, result, num_samples)
        enter(Phase.SNAPSHOT)
        parts.alarm.after_step(state, saving=result.requests.save)
        parts.saver.after_step(agreed=result.requests.save)
        if result.requests.leave:
            leave(parts)
    good = max(1, steps - state.progress.bad_steps)
    means = {name: value / good for name, value in state.progress.losses.items()}
    samples = sum(parts.plan.step_size(number)[1] for number in range(steps))
    parts.reporter.end_epoch(state.step, means, state.progress.seconds, samples)
    return {
        "epoch": epoch,
        "step": state.step,
        "samples": state.samples,
        **dict(zip(TRAIN_COLUMNS, means.values(), strict=True)),
        "learning_rate": parts.step.schedule.learning_rate(state.step - 1),
        "images_per_second": round(samples / state.progress.seconds, 3),
        "seconds": round(state.progress.seconds, 3),
    }


def report_step(parts: TrainingParts, step_in_epoch: int, result: StepResult, num_samples: int) -> None:
    """Tell of a step."""
    if result.losses is None:
        parts.reporter.bad_step(step_in_epoch, parts.state.step)
    else:
        parts.reporter.step(step_in_epoch, parts.state.step, result.losses, result.learning_rate, num_samples)
    if result.measured and parts.state.step > 1:
        parts.reporter.measured(parts.state.step)


def requests(parts: TrainingParts) -> StepRequests:
    """What this rank wants all to do after the next step."""
    advice = parts.context.notices.take_advice()
    if advice is not None:
        logger.warning(f"{advice}: the state is saved, and training goes on", extra=OF_NODE)
    return StepRequests(parts.saver.is_due(parts.state.step + 1, at_once=advice is not None), parts.context.notices.pending() is not None)


def leave(parts: TrainingParts) -> None:
    """End after this step, which all ranks have agreed on: those of the nodes under notice for good, the others to be started
    again without them.

    Raises:
        Departure: unless the notice was withdrawn meanwhile.
    """
    world = parts.context.world
    parts.alarm.compare(parts.state)
    world.begin_long_work()  # one rank's disk may be slow
    failures, notice = parts.saver.save_now(), parts.context.notices.pending()
    found = [one for one in world.gather((world.node, notice) if notice else None) if one]
    world.end_long_work()
    if not found:
        return
    # The account of the time is brought up to date by the next start: what is left of the grace is for the state.
    causes = {node: told.cause for node, told in found}
    step = f"after step {parts.state.step}" + "".join(f"; {failure}" for failure in failures)
    if world.node in causes:
        told = notice or next(told for node, told in found if node == world.node)
        # Whichever process of the node has got it: the agent is ended by the first one.
        launcher_knows = all(told.launcher_knows for node, told in found if node == world.node)
        raise Departure(f"{told.cause}: left {step}", told.ending, launcher_knows)
    nodes = ", ".join(f"node {node} ({cause})" for node, cause in sorted(causes.items()))
    raise Departure(f"peer left: {nodes}, {step}", Ending.PEER_LEFT)


def tell_goodput(parts: TrainingParts, step: int | None) -> None:
    """Bring the account of where the time went up to date, in TensorBoard at a step if one is given."""
    if parts.context.world.is_first:
        parts.reporter.goodput(step, report([*parts.records, parts.context.recorder.record()], time.time()))


def evaluate_epoch(parts: TrainingParts, epoch: int, row: dict[str, Any]) -> None:
    """Evaluate the EMA weights if due, and add the numbers (else None) to the epoch's row."""
    training, rows = parts.training, [*parts.state.history, row]
    is_last = epoch == training.epochs or parts.context.world.from_first(lambda: is_budget_spent(training, rows))
    row.update(dict.fromkeys((*VAL_COLUMNS, *STAT_NAMES, "evaluation_seconds")))
    if epoch % parts.evaluation_interval and not is_last:
        return
    started = time.monotonic()
    evaluation = parts.evaluate(parts.state.ema.model, parts.context.watchdog.counted)
    row.update(zip(VAL_COLUMNS, (evaluation.losses[name] for name in LOSSES), strict=True))
    row.update({name: value if value >= 0 else None for name, value in evaluation.metrics.stats.items()})
    row["evaluation_seconds"] = round(time.monotonic() - started, 3)
    metric, best = row["mAP50-95"], parts.state.best_metric
    parts.reporter.evaluated(epoch, parts.state.step, evaluation, metric is not None and (best is None or metric > best))
