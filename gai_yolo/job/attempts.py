"""Training from the newest complete state to the last epoch, going back when steps go bad; whatever happens, the state is safe."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

from gai_yolo.checkpointing.compatibility import check_continuation, judges_anew
from gai_yolo.checkpointing.completion import reason_to_end
from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.data.formats.reading import CannotRead
from gai_yolo.distributed.world import is_lost_peer
from gai_yolo.errors import DataError, Departure, Ending, Stop
from gai_yolo.goodput.record import Phase, high_water
from gai_yolo.job.build import KnownRun, announce, assemble, check_images, make_loaders, make_state
from gai_yolo.job.ending import lost_peer
from gai_yolo.job.settlement import settle
from gai_yolo.job.startup import Options, check_progress, find, open_record, tell_if_far_ahead
from gai_yolo.log import told_if_refused
from gai_yolo.membership.environment import Environment
from gai_yolo.membership.join import remember
from gai_yolo.membership.lost_images import remember_training_set
from gai_yolo.reporting.reporter import rewind_ledger, write_metrics
from gai_yolo.store.best import BestCopy
from gai_yolo.training.context import JobContext
from gai_yolo.training.loop import TrainingParts, train
from gai_yolo.training.step import WentBad

CLOSING_PATIENCE = 10.0
"""Seconds that a job which stops waits for a checkpoint that is on its way to the disk."""
LEAVING_PATIENCE = 0.0
"""The same for one that leaves, and has saved its state without the writer; what that one was handed it finishes by itself."""
MOST_RETURNS = 2
"""How often a run goes back to its last good state before it stops."""

logger = logging.getLogger(__name__)


def train_to_the_end(run: KnownRun, options: Options, environment: Environment, context: JobContext) -> TrainingState:
    """Train from the newest complete state, going back to it when steps go bad, `MOST_RETURNS` times; returns the last one.

    Nothing in the run folder is touched before the configuration and the data are known to be good, and the same on all nodes.
    """
    for returns in range(MOST_RETURNS + 1):
        try:
            found = find(options, context, run.membership.memory, run.config.training.exact)
            with contextlib.ExitStack() as stack:
                return train_from(found, settled(run, found, context), environment if returns == 0 else None, context, stack)
        except WentBad as bad:
            if returns == MOST_RETURNS:
                raise Stop(
                    f"{bad}, and so after going back {MOST_RETURNS} times; the checkpoints are untouched: lower training.lr, set "
                    "training.amp: none, or look at the data of these steps (reporting.ledger), and start again."
                ) from None
            logger.warning(f"{bad}: going back to the last good state")
            context.world.begin_long_work()
            context.enter(Phase.LOAD)
    raise AssertionError("not reached")


def train_from(
    found: LoadedCheckpoint | None, run: KnownRun, environment: Environment | None, context: JobContext, stack: contextlib.ExitStack
) -> TrainingState:
    """Train from a state to the end; returns the last one.

    Args:
        environment: to be remembered, unless the run is gone back.
        stack: ends what must not outlive this, the loaders' processes.
    """
    world, training = context.world, run.config.training
    begin(found, run, environment, context)
    tell_if_far_ahead(context, found, run.plan.steps_per_epoch)
    state = None
    if found is None:  # what can be refused is refused before any process begins to work
        state = make_state(run, context, found)
        world.from_first(lambda: check_images(run.config.data, run.indexes))
    loaders = make_loaders(run, context, found, stack)
    state = state or make_state(run, context, found)  # while the loaders work
    if found is not None and judges_anew(found, run.identity):
        state.best_metric, state.best_since = None, state.step
    world.from_first(lambda: bring_up_to_date(context, state))
    source = "nothing" if found is None else found.tier
    is_complete = world.from_first(lambda: bool(reason_to_end(training, state.history, state.best_since)))
    epoch = state.epoch if is_complete else state.epoch + 1
    context.recorder.started_from(state.step, epoch, source, high_water(run.records), run.schedule.total_steps, training.epochs)
    if not is_complete or world.from_first(lambda: not is_result(found)):
        announce(run, context)
        parts = assemble(run, loaders, state, context)
        with kept_safe(parts):
            train(parts)
        logger.info(parts.saver.summary)
    else:
        world.from_first(lambda: renew_best(context, state.best_since))
    return state


def settled(run: KnownRun, found: LoadedCheckpoint | None, context: JobContext) -> KnownRun:
    """The run with what holds for its whole life, as the state says that it goes on from."""
    settlement = settle(run.config, found, context.world, len(run.indexes[0]), run.membership.record.settled)
    for note in settlement.notes:
        logger.warning(note)
    threads = settlement.config.training.threads
    assert threads != "auto"
    context.world.set_threads(threads)
    record = replace(run.membership.record, settled=settlement.values)
    return replace(run, config=settlement.config, membership=replace(run.membership, record=record))


def begin(found: LoadedCheckpoint | None, run: KnownRun, environment: Environment | None, context: JobContext) -> None:
    """See that the run may go on so, and whether there is hope in it; then let every node remember what it goes on with."""
    if found is not None:
        for note in check_continuation(found, run.identity):
            logger.info(note)
    if environment is not None:
        open_record(context, run.records)
    check_progress(run.records, 0 if found is None else found.manifest.position.step)
    if environment is not None:
        remember(context, run.membership, found, run.identity)
        environment.keep(context)  # not before it is known that the run may go on so: it decides which nodes are right
        remember_training_set(run.indexes[0], context)


def is_result(found: LoadedCheckpoint | None) -> bool:
    """Whether a finished state is where people look for it, and not in a node's memory or a snapshot only. On rank 0."""
    return found is not None and found.tier == "disk" and found.manifest.kind == "epoch"


@contextlib.contextmanager
def kept_safe(parts: TrainingParts) -> Iterator[None]:
    """While training is under way, and when it ends, however that is: the state of the last step is saved where it would be lost, what is
    on its way to the disk is waited for where there is time, and everything is closed."""
    context, saver, patience = parts.context, parts.saver, CLOSING_PATIENCE
    context.watchdog.rescue = saver.save_now
    context.notices.defer(True)
    try:
        with context.world.leaving_on_error():
            yield
    except (Departure, DataError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_lost_peer(error):
            raise
        patience = LEAVING_PATIENCE
        notice = context.notices.pending()  # asked before the state is saved: meanwhile an agent ends those that a dead one has left
        # Who departs by agreement has saved it. There may be no room for the loaders' processes, or no disk to read from.
        has_saved = isinstance(error, Departure) and not isinstance(error, CannotRead)
        failures = [] if has_saved else saver.save_now()
        if isinstance(error, CannotRead):
            raise Departure("; ".join([error.reason, *failures]), Ending.WAITING) from None
        if isinstance(error, RuntimeError):
            raise lost_peer(error, failures, notice) from None
        raise
    finally:
        context.notices.defer(False)
        context.watchdog.rescue = None
        context.enter(Phase.CLOSING)
        saver.close(patience)
        parts.reporter.close()


def bring_up_to_date(context: JobContext, state: TrainingState) -> None:
    """Make metrics and ledger tell of the state that is gone on from, whatever a killed run wrote after it. On rank 0 only."""
    folder = context.folder
    write_metrics(folder, state.history)
    with told_if_refused(logger, folder.path, "cannot be brought up to date"):
        rewind_ledger(folder, state.step)


def renew_best(context: JobContext, since: int) -> None:
    """Let `best.pt` be that of a finished run, which a start that was killed may have left undone. On rank 0 only; while there is
    something to train the writer does it."""
    try:
        notes = BestCopy(context.folder.store, since).renew()
    except OSError as error:
        notes = [f"best.pt cannot be renewed ({error.strerror})"]
    for note in notes:
        logger.warning(note)
