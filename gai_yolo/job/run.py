"""One start of the job, from its beginning to its exit code: the only place where the parts are put together."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gai_yolo.checkpointing import writer_process
from gai_yolo.checkpointing.completion import reason_to_end
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.checkpointing.writer_start import SpareWriter
from gai_yolo.config import Config, load_config
from gai_yolo.distributed.environment import check_environment, environment_local_rank, environment_rank
from gai_yolo.distributed.world import World, fix_arithmetic
from gai_yolo.errors import Departure, Ending, Stop
from gai_yolo.goodput.record import Phase
from gai_yolo.goodput.recorder import Recorder, process_started
from gai_yolo.job.attempts import train_to_the_end
from gai_yolo.job.build import KnownRun
from gai_yolo.job.ending import JobEnd
from gai_yolo.job.startup import Options, compare_nodes, open_run, read_all_records, read_data
from gai_yolo.log import showing
from gai_yolo.membership.join import Membership
from gai_yolo.reporting.console import Console
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.supervision import outcome
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notices
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.context import JobContext

logger = logging.getLogger(__name__)


def run_job(path: Path, overrides: Sequence[str], options: Options) -> int:
    """Train, evaluate and save as configured, going on from the newest complete checkpoint of the run; returns the exit code."""
    end = JobEnd(Recorder(process_started()))
    with showing(end.show), end.told():
        check_environment(os.environ)
        end.speaks = environment_local_rank() == 0
        outcome.clear()
        config = load_config(path, overrides)
        folder = RunFolder(config.run_folder)  # it may be refused, before anything runs that would have to be ended
        with contextlib.ExitStack() as stack:
            spare = SpareWriter(writer_process.main) if environment_rank() == 0 else None  # while there are no threads
            stack.enter_context(contextlib.closing(spare) if spare else contextlib.nullcontext())
            notices, watchdog = begin_to_watch(config, folder, end, stack)
            stack.enter_context(end.told())  # while it is watched, and before what follows is let go
            context = join_world(config, folder, end, (notices, watchdog, spare), stack)
            environment = compare_nodes(config, options, context)
            stack.enter_context(locked(context))
            if options.tensorboard and context.world.is_first:
                serve(folder)
            indexes = read_data(config, options, context)
            environment.check_data(context.world, indexes)
            membership = open_run(config, options, context)
            if membership.memory is not None:
                stack.callback(membership.memory.release)
            run = KnownRun(config, indexes, membership, read_all_records(context))
            state = train_to_the_end(run, options, environment, context)
            finish(state, config, membership, context)
            end.finished()
    return end.leave()


def begin_to_watch(config: Config, folder: RunFolder, end: JobEnd, stack: contextlib.ExitStack) -> tuple[Notices, Watchdog]:
    """Have notices, a watchdog and, on the first rank, a console. What is closed may hang, so the watchdog looks on until all but the
    notices, which it asks, are."""
    end.run_folder = folder.path
    if environment_rank() == 0:
        end.console = Console(config.training.epochs, config.reporting.log_interval)
    elastic = config.elastic
    cloud = CloudWatch(elastic.notices if end.speaks else "none", elastic.notices_endpoint)
    cloud.start()
    notices = Notices(cloud)
    stack.callback(notices.close)
    watchdog = Watchdog(notices, Limits.of(elastic), end.farewell)
    watchdog.start()
    stack.callback(watchdog.stop)
    stack.callback(end.close)
    return notices, watchdog


def join_world(
    config: Config,
    folder: RunFolder,
    end: JobEnd,
    helpers: tuple[Notices, Watchdog, SpareWriter | None],
    stack: contextlib.ExitStack,
) -> JobContext:
    """Meet the other processes, with whom there is long work from now on."""
    notices, watchdog, spare = helpers
    if config.training.exact:
        fix_arithmetic()
    for one in (end.recorder, watchdog):
        one.enter(Phase.RENDEZVOUS)
    world = stack.enter_context(among_others(config))
    context = JobContext(world, folder, end.console, notices, watchdog, end.recorder, spare)
    watchdog.others = world
    context.enter(Phase.LOAD)
    return context


@contextlib.contextmanager
def among_others(config: Config) -> Iterator[World]:
    """This process among the others, who learn of it at once if it ends on its own account."""
    world = World(config.training.device, config.training.threads, config.elastic.timeout_seconds)
    world.begin_long_work()
    with world.leaving_on_error():
        try:
            yield world
        except Stop:
            # A launcher kills the other processes when one has left, and rank 0 may have something to bring to the disk.
            world.wait_for_all()
            raise
    world.close()


@contextlib.contextmanager
def locked(context: JobContext) -> Iterator[None]:
    """The run folder is this job's meanwhile."""
    try:
        context.world.from_first(context.folder.lock)
        yield
    finally:
        context.folder.release()


def serve(folder: RunFolder) -> None:
    """Let TensorBoard show the runs."""
    from gai_yolo.reporting.serve import serve_tensorboard

    logger.info(f"TensorBoard: {serve_tensorboard(folder.path.parent)}")


def finish(state: TrainingState, config: Config, membership: Membership, context: JobContext) -> None:
    """Let go what is not needed any more, and say so. Whoever lets its memory go, or says that the job is done, must know that no other one
    starts again.

    Raises:
        Departure: another process has not come to the end.
    """
    if not context.world.wait_for_all():
        raise Departure("peer lost: at the end", Ending.PEER_LOST)
    if membership.memory is not None and is_on_disk(state):
        membership.memory.remove()
    best = "" if state.best_metric is None else f", best mAP50-95 {state.best_metric:.4f}"
    training, folder = config.training, context.folder
    why, more = "", "raise training.epochs to go on"
    if state.epoch < training.epochs:
        why, more = f" ({reason_to_end(training, state.history, state.best_since)})", "raise that to go on"
    logger.info(f"finished: {state.epoch} of {training.epochs} epochs{why}{best}; {more}, --fresh starts over")
    drawn = ", ".join(str(one) for one in (folder.pictures, folder.predictions) if config.reporting.images and one.is_dir())
    logger.info(f"checkpoints: {folder.checkpoints}{f'  pictures: {drawn}' if drawn else ''}  TensorBoard: {folder.tensorboard}")


def is_on_disk(state: TrainingState) -> bool:
    """Whether a finished state is an epoch's, which has been brought to the disk; not that of a run whose `training.epochs` was lowered to
    less than it has made, in the middle of the next one."""
    return state.step == (state.history[-1].get("step") if state.history else 0)
