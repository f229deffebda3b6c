"""Training, as an outline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gai_yolo.checkpointing.digest import DivergenceAlarm
from gai_yolo.checkpointing.manager import CheckpointManager
from gai_yolo.checkpointing.state import LOSSES, TrainingState
from gai_yolo.config import Config
from gai_yolo.data.loader import TrainingLoader
from gai_yolo.data.order import BatchPlan
from gai_yolo.errors import Departure, Ending
from gai_yolo.evaluation.coco_metrics import STAT_NAMES
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.goodput.record import Phase
from gai_yolo.goodput.report import report
from gai_yolo.reporting.reporter import Reporter
from gai_yolo.training.context import JobContext
from gai_yolo.training.step import StepRequests, StepResult, TrainingStep

TRAIN_COLUMNS = ("train_loss", "train_box", "train_cls", "train_dfl")
VAL_COLUMNS = ("val_loss", "val_box", "val_cls", "val_dfl")
"""Names of `LOSSES` in the metrics rows."""


@dataclass(frozen=True)
class Run:
    """The parts that the job has put together."""

    config: Config
    plan: BatchPlan
    state: TrainingState
    loader: TrainingLoader
    step: TrainingStep
    alarm: DivergenceAlarm
    evaluate: Evaluator
    saver: CheckpointManager
    reporter: Reporter
    context: JobContext
    accounts: Sequence[Mapping[str, Any]]
    """Records of earlier starts."""


def train(run: Run) -> None:
    """Train from where the state stands to the last epoch; each is evaluated, recorded and saved as configured.

    Raises:
        Departure: a process has to leave; the state after the last step is saved.
        Stop: training cannot go on.
    """
    run.saver.catch_up()
    for epoch in range(run.state.epoch + 1, run.config.training.epochs + 1):
        run.context.world.end_long_work()
        row = train_epoch(run, epoch)
        run.context.world.begin_long_work()
        run.context.enter(Phase.EVALUATION)
        evaluate_epoch(run, epoch, row)
        run.state.end_epoch(row)
        run.context.enter(Phase.SNAPSHOT)
        run.alarm.compare(run.state)
        run.saver.after_epoch()
        run.context.enter(Phase.REPORTING)
        run.reporter.record(run.state.history)
        tell_goodput(run, run.state.step)
    run.context.enter(Phase.CLOSING)
    # The other processes must not leave before: a launcher takes their end for the job's.
    run.context.world.from_first(run.saver.finish)
    run.context.recorder.ended(Ending.FINISHED)
    tell_goodput(run, None)


def train_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """The steps of an epoch that are not done yet; returns the row of metrics of all of them."""
    state, steps, enter = run.state, run.plan.steps_per_epoch, run.context.enter
    done = state.step - (epoch - 1) * steps
    state.model.train()
    run.reporter.start_epoch(epoch, steps, done)
    before, started = state.progress.seconds, time.monotonic()
    micro_batches = run.loader.epoch(epoch, done)
    for number in range(done, steps):
        enter(Phase.DATA)
        batches = next(micro_batches)
        # Beforehand: if the step is completed and this process is not there any more, nobody else knows what it has trained on.
        run.reporter.trained(epoch, state.step + 1, batches)
        enter(Phase.STEP)
        num_micro_batches, num_samples = run.plan.step_size(number)
        result = run.step(batches, num_micro_batches, num_samples, run.config.data.image_size, requests(run))
        state.progress.seconds = before + time.monotonic() - started
        run.context.step_done(state.step, epoch)
        enter(Phase.REPORTING)
        report_step(run, number + 1, result, num_samples)
        enter(Phase.SNAPSHOT)
        run.alarm.after_step(state, saving=result.requests.save)
        run.saver.after_step(agreed=result.requests.save)
        if result.requests.leave:
            leave(run)
    good = max(1, steps - state.progress.bad_steps)
    means = {name: value / good for name, value in state.progress.losses.items()}
    samples = sum(run.plan.step_size(number)[1] for number in range(steps))
    run.reporter.end_epoch(state.step, means, state.progress.seconds, samples)
    return {
        "epoch": epoch,
        "step": state.step,
        "samples": state.samples,
        **dict(zip(TRAIN_COLUMNS, means.values(), strict=True)),
        "learning_rate": run.step.schedule.learning_rate(state.step - 1),
        "images_per_second": round(samples / state.progress.seconds, 3),
        "seconds": round(state.progress.seconds, 3),
    }


def report_step(run: Run, step_in_epoch: int, result: StepResult, num_samples: int) -> None:
    """Tell of a step."""
    if result.losses is None:
        run.reporter.bad_step(step_in_epoch, run.state.step)
    else:
        run.reporter.step(step_in_epoch, run.state.step, result.losses, result.learning_rate, num_samples)
    if result.measured and run.state.step > 1:
        run.reporter.measured(run.state.step)


def requests(run: Run) -> StepRequests:
    """What this rank wants all to do after the next step."""
    advice = run.context.notices.take_advice()
    if advice is not None:
        run.context.tell(f"{advice}: the state is saved, and training goes on")
    return StepRequests(run.saver.is_due(run.state.step + 1, at_once=advice is not None), run.context.notices.pending() is not None)


def leave(run: Run) -> None:
    """End after this step, which all ranks have agreed on: those of the nodes under notice for good, the others to be started
    again without them.

    Raises:
        Departure: unless the notice was withdrawn meanwhile.
    """
    world = run.context.world
    run.alarm.compare(run.state)
    world.begin_long_work()  # one rank's disk may be slow
    failures, notice = run.saver.save_now(), run.context.notices.pending()
    found = [one for one in world.gather((world.node, notice) if notice else None) if one]
    world.end_long_work()
    if not found:
        return
    # The account of the time is brought up to date by the next start: what is left of the grace is for the state.
    causes = {node: told.cause for node, told in found}
    step = f"after step {run.state.step}" + "".join(f"; {failure}" for failure in failures)
    if world.node in causes:
        told = notice or next(told for node, told in found if node == world.node)
        # Whichever process of the node has got it: the agent is ended by the first one.
        launcher_knows = all(told.launcher_knows for node, told in found if node == world.node)
        raise Departure(f"{told.cause}: left {step}", told.ending, launcher_knows)
    nodes = ", ".join(f"node {node} ({cause})" for node, cause in sorted(causes.items()))
    raise Departure(f"peer left: {nodes}, {step}", Ending.PEER_LEFT)


def tell_goodput(run: Run, step: int | None) -> None:
    """Bring the account of where the time went up to date, in TensorBoard at a step if one is given."""
    if run.context.world.is_first:
        run.reporter.goodput(step, report([*run.accounts, run.context.recorder.record()], time.time()))


def evaluate_epoch(run: Run, epoch: int, row: dict[str, Any]) -> None:
    """Evaluate the EMA weights if due, and add the numbers (else None) to the epoch's row."""
    row.update(dict.fromkeys((*VAL_COLUMNS, *STAT_NAMES)))
    if epoch % run.config.evaluation.interval and epoch != run.config.training.epochs:
        return
    evaluation = run.evaluate(run.state.ema.model, run.context.watchdog.counted)
    row.update(zip(VAL_COLUMNS, (evaluation.losses[name] for name in LOSSES), strict=True))
    row.update({name: value if value >= 0 else None for name, value in evaluation.metrics.stats.items()})
    run.reporter.evaluated(epoch, run.state.step, evaluation)
