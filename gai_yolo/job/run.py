"""The only place where the parts are put together."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from gai_yolo.checkpointing.compatibility import check_continuation, identity_of, judges_anew
from gai_yolo.checkpointing.disk_tier import LoadedCheckpoint
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.config import Config
from gai_yolo.data.formats.reading import CannotRead
from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_indexes
from gai_yolo.distributed.environment import check_environment, environment_local_rank, environment_rank
from gai_yolo.distributed.world import World, fix_arithmetic, is_lost_peer, lost_peer_line
from gai_yolo.errors import ConfigError, DataError, Departure, Ending, Refusal, Stop
from gai_yolo.goodput.record import Phase, high_water
from gai_yolo.goodput.recorder import Recorder, process_started
from gai_yolo.job.build import announce, assemble, check_images, make_loaders, make_plan, make_state
from gai_yolo.job.settlement import settle
from gai_yolo.job.startup import (
    Options,
    check_progress,
    compare_nodes,
    find,
    knows_of_start_over,
    open_record,
    open_run,
    read_accounts,
    tell_if_far_ahead,
)
from gai_yolo.log import showing
from gai_yolo.membership.environment import Environment
from gai_yolo.membership.join import Membership, remember
from gai_yolo.membership.lost_images import as_it_began, remember_training_set
from gai_yolo.reporting.console import Console, NullConsole
from gai_yolo.reporting.reporter import rewind_ledger, write_metrics
from gai_yolo.sections import ElasticConfig
from gai_yolo.store.best import BestCopy
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.supervision import outcome
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notice, Notices
from gai_yolo.supervision.watchdog import FIRST_STEP_FACTOR, Watchdog
from gai_yolo.training.context import JobContext
from gai_yolo.training.loop import Run, train
from gai_yolo.training.optimizer import make_schedule
from gai_yolo.training.step import WentBad

CLOSING_PATIENCE = 10.0
"""Seconds that a job which stops waits for a checkpoint that is on its way to the disk."""
LEAVING_PATIENCE = 0.0
"""The same for one that leaves, and has saved its state without the writer; what that one was handed it finishes by itself."""
MOST_RETURNS = 2
"""How often a run goes back to its last good state before it stops."""


def run_job(config: Config, options: Options) -> None:
    """Train, evaluate and save as configured, going on from the newest complete checkpoint of the run.

    Raises:
        Refusal: something the user must mend; raised alike on all ranks.
        Departure: this process ends before the training does.
    """
    try:
        check_environment(os.environ)
    except ConfigError as refusal:
        print(f"error: {refusal}", file=sys.stderr, flush=True)  # nobody knows who is the first, and speaks for all
        refusal.told = True
        raise
    outcome.clear()
    folder = RunFolder(config.run_folder)  # it may be refused, before anything runs that would have to be ended
    recorder = Recorder(process_started())
    console = NullConsole()
    if environment_rank() == 0:
        console = Console(config.training.epochs, config.reporting.log_interval)
    cloud = CloudWatch(config.elastic.notices if environment_local_rank() == 0 else "none", config.elastic.notices_endpoint)
    cloud.start()
    notices = Notices(cloud)

    def farewell(ending: Ending, reason: str, launcher_knows: bool) -> None:
        recorder.ended(ending, reason)
        outcome.report(ending, reason)
        if not launcher_knows:
            outcome.end_agent()
        print(f"warning: {socket.gethostname()}: {reason}", file=sys.stderr, flush=True)
        console.close()  # last, because the training thread may hold the terminal's lock

    elastic = config.elastic
    watchdog = Watchdog(notices, elastic.grace_seconds, elastic.step_timeout_seconds, farewell, idle_timeout=idle_patience(elastic))
    watchdog.start()

    def enter(phase: Phase) -> None:
        recorder.enter(phase)
        watchdog.enter(phase)

    def show(record: logging.LogRecord) -> None:
        if environment_rank() == 0:
            (console.info if record.levelno < logging.WARNING else console.warning)(record.getMessage())
        elif getattr(record, "of_node", False):
            print(f"warning: {socket.gethostname()}: {record.getMessage()}", flush=True)

    try:
        with showing(show), end_told(config, recorder, console):
            run_with(config, options, lambda world: JobContext(world, folder, console, notices, watchdog, recorder), enter)
    finally:
        recorder.close()
        console.close()
        notices.close()
        watchdog.stop()  # last, because what is closed may hang


@contextlib.contextmanager
def end_told(config: Config, recorder: Recorder, console: NullConsole) -> Iterator[None]:
    """Whatever ends the block goes on, once the accounts, the launcher and the person in front know of it."""
    try:
        yield
    except Departure as departure:
        recorder.ended(departure.ending, departure.reason)
        words = f"{departure.reason}; the same command goes on from the newest complete state in {config.run_folder}"
        console.warning(words)
        if environment_rank() != 0 and environment_local_rank() == 0 and not outcome.has_launcher():
            print(f"warning: {socket.gethostname()}: {words}", file=sys.stderr, flush=True)  # who looks at this node sees no other's words
        outcome.report(departure.ending, departure.reason)
        raise
    except KeyboardInterrupt:
        recorder.ended(Ending.INTERRUPTED, "Ctrl-C")
        console.warning(f"interrupted; the same command goes on from the newest complete state in {config.run_folder}")
        raise
    except Refusal as refusal:
        recorder.ended(refusal.ending, f"{refusal.ending}: {refusal}")
        raise
    except Exception as error:
        # A bug, which stays loud; whoever looks at the accounts is to know of it too.
        said = str(error).strip().splitlines()
        words = f"failed: {type(error).__name__}{': ' + said[0].rstrip('.') if said else ''}"
        recorder.ended(Ending.FAILED, words)
        outcome.report(Ending.FAILED, words)
        raise


def idle_patience(config: ElasticConfig) -> float:
    """Seconds that a process may be in one wait outside of steps. Not less where steps may take long: then disks may be slow, too."""
    return max(config.timeout_seconds, FIRST_STEP_FACTOR * config.step_timeout_seconds)


def run_with(config: Config, options: Options, site_of: Callable[[World], JobContext], enter: Callable[[Phase], None]) -> None:
    """The same, watched."""
    if config.training.exact:
        fix_arithmetic()
    enter(Phase.RENDEZVOUS)
    try:
        world = World(config.training.device, config.training.threads, config.elastic.timeout_seconds)
        world.begin_long_work()
        enter(Phase.LOAD)
        with world.leaving_on_error():
            context = site_of(world)
            context.watchdog.others = world
            run_at(config, options, context)
        world.close()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise lost_peer(error, []) from None


def run_at(config: Config, options: Options, context: JobContext) -> None:
    """The same, in a folder that is locked meanwhile."""
    try:
        environment = compare_nodes(config, options, context)
        context.world.from_first(context.folder.lock)
        if options.tensorboard and context.world.is_first:
            from gai_yolo.reporting.serve import serve_tensorboard

            context.console.info(f"TensorBoard: {serve_tensorboard(context.folder.path.parent)}")
        run_in(config, options, context, environment)
    except Stop:
        # A launcher kills the other processes when one has left, and rank 0 may have something to bring to the disk.
        context.world.wait_for_all()
        raise
    finally:
        context.folder.release()


def lost_peer(error: RuntimeError, failures: list[str], notice: Notice | None = None) -> Departure:
    """What to raise when another process, or a loader, does not answer any more.

    Args:
        notice: that had come before: the others may have had it too, and have gone first.
    """
    line = "; ".join([lost_peer_line(error), *failures])
    if notice is None:
        return Departure(line, Ending.PEER_LOST)
    return Departure(f"{notice.cause}: left, {line}", notice.ending, notice.launcher_knows)


def run_in(config: Config, options: Options, context: JobContext, environment: Environment) -> None:
    """Train in a locked run folder; nothing in it is touched before the configuration and the data are known to be good, and the same
    on all nodes."""
    if config.training.amp == "fp16" and context.world.device.type == "cpu":
        raise ConfigError("training.amp: fp16 needs a GPU; use bf16 or none on a CPU.")
    indexes = context.world.together(lambda: read_data(config, options, context))
    environment.check_data(context.world, indexes)
    for index in indexes:
        tell_about(index, context.console)
    run = open_run(config, options, context)
    memory = run.memory
    try:
        state = train_to_the_end(config, options, indexes, context, run, environment)
        # Whoever lets its memory go, or says that the job is done, must know that no other one starts again.
        if not context.world.wait_for_all():
            raise Departure("peer lost: at the end", Ending.PEER_LOST)
        if memory is not None and is_on_disk(state):
            memory.remove()
    finally:
        if memory is not None:
            memory.release()
    context.console.info(finished_line(state, config.training.epochs))
    folder = context.folder
    context.console.info(f"checkpoints: {folder.checkpoints}  pictures: {folder.predictions}  TensorBoard: {folder.tensorboard}")
    context.recorder.ended(Ending.FINISHED)
    outcome.report(Ending.FINISHED, Ending.FINISHED)


def read_data(config: Config, options: Options, context: JobContext) -> tuple[Index, Index]:
    """Training set, as this run began with it, and validation set."""
    train_index, val_index = load_indexes(config.data)
    if not options.fresh or knows_of_start_over(context):  # else what the folder remembers is the old run's
        train_index = as_it_began(train_index, context.folder, config.data.max_bad_fraction)
    return train_index, val_index


def train_to_the_end(
    config: Config, options: Options, indexes: tuple[Index, Index], context: JobContext, run: Membership, environment: Environment
) -> TrainingState:
    """Train from the newest complete state, going back to it when steps go bad, `MOST_RETURNS` times."""
    accounts = read_accounts(context)
    for returns in range(MOST_RETURNS + 1):
        try:
            with contextlib.ExitStack() as closing:
                return go_on(config, options, indexes, context, run, environment, accounts, closing, first=returns == 0)
        except WentBad as bad:
            if returns == MOST_RETURNS:
                raise Stop(
                    f"{bad}, and so after going back {MOST_RETURNS} times; the checkpoints are untouched: lower training.lr, set "
                    "training.amp: none, or look at the data of these steps (reporting.ledger), and start again."
                ) from None
            context.console.warning(f"{bad}: going back to the last good state")
            context.world.begin_long_work()
            context.enter(Phase.LOAD)
    raise AssertionError("not reached")


def go_on(
    config: Config,
    options: Options,
    indexes: tuple[Index, Index],
    context: JobContext,
    run: Membership,
    environment: Environment,
    accounts: list[dict[str, Any]],
    closing: contextlib.ExitStack,
    first: bool,
) -> TrainingState:
    """Train from the newest complete state to the end; returns the last one. `first` unless it is gone back to.

    Args:
        closing: ends what must not outlive this, the loaders' processes.
    """
    found = find(options, context, run.memory, config.training.exact)
    settlement = settle(config, found, context.world, len(indexes[0]), run.record.settled)
    config = settlement.config
    for note in settlement.notes:
        context.console.warning(note)
    assert config.training.threads != "auto"
    context.world.set_threads(config.training.threads)
    identity = identity_of(config, indexes)
    if found is not None:
        for note in check_continuation(found, identity):
            context.console.info(note)
    if first:
        open_record(context, accounts)
    check_progress(context, accounts, 0 if found is None else found.manifest.position.step)
    if first:
        run = remember(context, run, found, identity, settlement.values)
        environment.keep(context)  # not before it is known that the run may go on so: it decides which nodes are right
        remember_training_set(indexes[0], context)

    plan = make_plan(config, len(indexes[0]))
    tell_if_far_ahead(context, found, plan.steps_per_epoch)
    schedule = make_schedule(config.training, len(indexes[0].categories), plan.steps_per_epoch)
    make = partial(make_state, config, schedule, len(indexes[0].categories), context, found)
    state = None
    if found is None:  # what can be refused is refused before any process begins to work
        state = make()
        context.world.from_first(lambda: check_images(config, indexes))
    loaders = make_loaders(config, indexes, plan, context, found, closing)
    state = state or make()  # while the loaders work
    if found is not None and judges_anew(found, identity):
        state.best_metric, state.best_since = None, state.step
    context.world.from_first(lambda: bring_up_to_date(context, state))
    source = "nothing" if found is None else found.tier
    context.recorder.started_from(state.step, state.epoch + 1, source, high_water(accounts), schedule.total_steps, config.training.epochs)
    if state.epoch < config.training.epochs or context.world.from_first(lambda: not is_result(found)):
        announce(config, indexes, schedule, context)
        train_watched(assemble(config, indexes, loaders, schedule, state, context, identity, run, accounts))
    else:
        context.world.from_first(lambda: renew_best(context, state.best_since))
    return state


def is_on_disk(state: TrainingState) -> bool:
    """Whether a finished state is an epoch's, which has been brought to the disk; not that of a run whose `training.epochs` was lowered to
    less than it has made, in the middle of the next one."""
    return state.step == (state.history[-1].get("step") if state.history else 0)


def is_result(found: LoadedCheckpoint | None) -> bool:
    """Whether a finished state is where people look for it, and not in a node's memory or a snapshot only. On rank 0."""
    return found is not None and found.tier == "disk" and found.manifest.kind == "epoch"


def train_watched(run: Run) -> None:
    """Train, and leave everything in order, however it ends."""
    context, patience = run.context, CLOSING_PATIENCE
    context.watchdog.rescue = run.saver.save_now
    context.notices.defer(True)
    try:
        with context.world.leaving_on_error():
            train(run)
    except WentBad:
        raise
    except Stop as stop:
        if context.world.is_first:
            print(f"error: {stop}", file=sys.stderr, flush=True)
        stop.told = True
        raise
    except DataError:  # no room for the loaders' processes
        patience = LEAVING_PATIENCE
        run.saver.save_now()
        raise
    except CannotRead as error:
        patience = LEAVING_PATIENCE
        raise Departure("; ".join([error.reason, *run.saver.save_now()]), Ending.WAITING) from None
    except Departure:
        patience = LEAVING_PATIENCE
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        patience = LEAVING_PATIENCE
        notice = context.notices.pending()  # asked before the state is saved: meanwhile an agent ends those that a dead one has left
        raise lost_peer(error, run.saver.save_now(), notice) from None
    finally:
        context.notices.defer(False)
        context.watchdog.rescue = None
        context.enter(Phase.CLOSING)
        run.saver.close(patience)
        run.reporter.close()
    context.console.info(run.saver.summary)


def bring_up_to_date(context: JobContext, state: TrainingState) -> None:
    """Make metrics and ledger tell of the state that is gone on from, whatever a killed run wrote after it. On
    rank 0 only."""
    folder, tell = context.folder, context.console.warning
    write_metrics(folder, state.history, tell)
    try:
        rewind_ledger(folder, state.step)
    except OSError as error:
        tell(f"{error.filename or folder.path}: cannot be brought up to date ({error.strerror}); training goes on")


def renew_best(context: JobContext, since: int) -> None:
    """Let `best.pt` be that of a finished run, which a start that was killed may have left undone. On rank 0 only; while there is
    something to train the writer does it."""
    try:
        notes = BestCopy(context.folder.store, since).renew()
    except OSError as error:
        notes = [f"best.pt cannot be renewed ({error.strerror})"]
    for note in notes:
        context.console.warning(note)


def tell_about(index: Index, console: NullConsole) -> None:
    """One line for each kind of problem that was found when the data set was read."""
    for problem in index.problems:
        console.warning(f"{index.source}: {problem.kind}: {problem.count}, {problem.action}; the first: {problem.example}")


def finished_line(state: TrainingState, epochs: int) -> str:
    """What a finished run says."""
    best = "" if state.best_metric is None else f", best mAP50-95 {state.best_metric:.4f}"
    return f"finished: {state.epoch} of {epochs} epochs{best}; raise training.epochs to go on, --fresh starts over"
