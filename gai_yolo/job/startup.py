"""How a job begins: which processes, which folder, whose run, and the state it goes on from."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gai_yolo.checkpointing.recovery import LoadedCheckpoint, agree
from gai_yolo.config import Config
from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_indexes
from gai_yolo.distributed.environment import launch_id, was_restarted
from gai_yolo.errors import ConfigError, Refusal, refused_by
from gai_yolo.goodput.progress import judge_progress
from gai_yolo.goodput.record import Record, compact_records, keep_records, next_number, parse_records, plain, read_records
from gai_yolo.goodput.recorder import process_started
from gai_yolo.log import OF_NODE, told_if_refused
from gai_yolo.membership.decision import decide
from gai_yolo.membership.environment import Environment, processor_facts, read_record, shared_facts
from gai_yolo.membership.join import Membership, gather_claims, join
from gai_yolo.membership.lost_images import as_it_began
from gai_yolo.store.catalogue import START_PATIENCE, Catalogue
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.supervision.outcome import LAUNCHER_VARIABLE
from gai_yolo.training.context import JobContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    resume: bool = False
    """Warn if there is nothing to continue (continuing is the default anyway)."""
    fresh: bool = False
    """Move the old run folder aside and start over."""
    tensorboard: bool = False
    """Serve TensorBoard while training."""


def compare_nodes(config: Config, options: Options, context: JobContext) -> Environment:
    """Compare what all nodes must have in common, before anything that could differ is done. A collective.

    Raises:
        Refusal: on a node that differs; on all, if it cannot be told which one is wrong, or what they have in common makes no sense.
        Departure: on the other nodes.
    """
    is_new = options.fresh and not knows_of_start_over(context)  # what is known of the old run is no rule for the new one
    record = None if is_new else read_record(context.folder.environment)
    environment = Environment(shared_facts(config, context.world), processor_facts(context.world), record)
    environment.check(context.world, config.training.exact)
    if config.training.threads == "auto":
        # Bits depend on it, and a node with other cores would choose another number.
        context.world.set_threads(min(context.world.gather(context.world.threads)))
    if config.training.amp == "fp16" and context.world.device.type == "cpu":
        raise ConfigError("training.amp: fp16 needs a GPU; use bf16 or none on a CPU.")
    return environment


def open_run(config: Config, options: Options, context: JobContext) -> Membership:
    """Make the locked run folder ready, agree on whose run it is, and open this node's memory. A collective.

    Raises:
        Refusal: on all ranks, what the user must mend.
    """
    world = context.world
    fresh = options.fresh and not has_started_over(context)
    memory = open_memory(config, context) if world.is_first_on_node else None
    try:
        if not fresh:
            world.from_first(lambda: open_folder(context))
        claims = gather_claims(context, memory, fresh)
        # A random name, so that a run which was deleted or moved away is not mixed up with the next one of its name.
        name = world.gather(os.urandom(8).hex())[0]
        launch = world.gather(launch_id())[0] if options.fresh else None
        record, fates = decide(claims.all, fresh, config.training.exact, name, launch or "")
        moved = world.from_first(lambda: move_aside(context)) if fresh else None
        memory = join(context, memory, record, claims, fates, moved)
        if fresh:
            world.from_first(lambda: open_folder(context))
        if options.fresh:
            world.together(lambda: remember_start_over(context))
    except BaseException:
        if memory is not None:
            memory.release()
        raise
    return Membership(record, memory)


def open_memory(config: Config, context: JobContext) -> NodeMemory | None:
    """This node's memory, if there is such a thing and it is wanted."""
    if config.elastic.memory_interval_steps is None:
        return None
    try:
        folder = config.memory_folder
        if not folder.is_dir():
            return None  # not every system has such a folder, and nobody has asked for it
        memory = NodeMemory(folder, context.folder.path)
        memory.open()
    except Refusal as refusal:
        logger.warning(f"{refusal} No state is kept in this node's memory.", extra=OF_NODE)
        return None
    return memory


def has_started_over(context: JobContext) -> bool:
    """Whether this job has started the run over already. A collective.

    Workers that torchrun starts again, after a crash or a resize, see the same command line. Any node knows, because the first
    one may be new.
    """
    already = any(context.world.gather(context.world.together(lambda: knows_of_start_over(context))))
    if already:
        logger.info(f"--fresh: this job ({launch_id()}) has started over already; going on")
    return already


def knows_of_start_over(context: JobContext) -> bool:
    """Whether this node knows that this job has started the run over already."""
    launch = launch_id()
    return was_restarted() if launch is None else context.folder.started_over_by() == launch


def move_aside(context: JobContext) -> Path | None:
    """Move the old run folder away, for --fresh; returns where it is now. On rank 0 only."""
    moved = context.folder.move_aside()
    if moved is not None:
        logger.info(f"the old run is kept in {moved}")
    return moved


def open_folder(context: JobContext) -> None:
    """Make the locked run folder ready. On rank 0 only."""
    context.folder.make()
    try:
        context.folder.store.sweep()
    except OSError as error:
        raise cannot_be_made_ready(context, error) from None


def remember_start_over(context: JobContext) -> None:
    """Let each node's folder say which job has started the run over, after it has: one that was killed meanwhile starts over."""
    launch = launch_id()
    if launch is None or not context.world.is_first_on_node or context.folder.started_over_by() == launch:
        return
    try:
        context.folder.mark_started_over(launch)
    except OSError as error:
        raise cannot_be_made_ready(context, error) from None


def cannot_be_made_ready(context: JobContext, error: OSError) -> Refusal:
    """For the user, of a run folder whose disk refuses."""
    reason = f"{error.filename or context.folder.path}: {error.strerror}"
    return refused_by(error, Refusal(f"{context.folder.path}: cannot be made ready ({reason}); mend that and start again."))


def read_data(config: Config, options: Options, context: JobContext) -> tuple[Index, Index]:
    """Training set, as this run began with it, and validation set. A collective, because any of the nodes may refuse."""

    def read() -> tuple[Index, Index]:
        train_index, val_index = load_indexes(config.data)
        if not options.fresh or knows_of_start_over(context):  # else what the folder remembers is the old run's
            train_index = as_it_began(train_index, context.folder, config.data.max_bad_fraction)
        return train_index, val_index

    indexes = context.world.together(read)
    for index in indexes:
        for problem in index.problems:
            logger.warning(f"{index.source}: {problem.kind}: {problem.count}, {problem.action}; the first: {problem.example}")
    return indexes


def read_all_records(context: JobContext) -> list[Record]:
    """What all nodes know of earlier starts, the same on every rank, each record once. A collective."""
    world = context.world
    own = {record.id: record for record in read_records(context.folder.goodput)[0]} if world.is_first_on_node else {}
    best: dict[str, tuple[float, int]] = {}
    for rank, known in enumerate(world.gather({name: record.elapsed for name, record in own.items()})):
        for name, elapsed in known.items():
            best[name] = max(best.get(name, (elapsed, -rank)), (elapsed, -rank))
    # Nodes with a common folder have the same thousands of records, and those without it nearly so: each is sent by one of them.
    mine = [plain(record) for name, record in own.items() if best[name][1] == -world.rank]
    return parse_records(one for of_rank in world.gather(mine) for one in of_rank)


def open_record(context: JobContext, records: Sequence[Record]) -> None:
    """Begin to write this start's record, and keep those of earlier starts that other nodes have. A collective."""
    world, folder = context.world, context.folder.goodput
    start = world.gather(os.urandom(4).hex())[0]
    node, number = f"{socket.gethostname()}-{world.node}", next_number(records)
    if world.is_first_on_node:
        keep_records(folder, records)
        launcher = os.environ.get(LAUNCHER_VARIABLE)
        if number == 1 and launcher is not None:
            # A job begins with its launcher. Later this would be downtime, or beside the training of others.
            context.recorder.begin_at(process_started(launcher))
    world.gather(None)  # who reads and who writes here is through
    if world.is_first:
        with told_if_refused(logger, folder, "old records cannot be compacted"):
            compact_records(folder)
    world.gather(None)  # before a record is opened
    context.recorder.open(folder, number, start, node, world.rank, world.world_size, world.local_rank)


def check_progress(records: Sequence[Record], step: int) -> None:
    """Wait where earlier starts from this step came to nothing again and again; on all ranks alike.

    Raises:
        NoProgress: as `judge_progress`.
    """
    delay = judge_progress(records, step)
    if delay.reason:
        logger.warning(delay.reason)
        time.sleep(delay.seconds)  # a notice ends the process meanwhile: nothing is at stake yet


def find(options: Options, context: JobContext, memory: NodeMemory | None, exact: bool) -> LoadedCheckpoint | None:
    """The state to go on from, on every rank; `exact` is `training.exact`. A collective; raises as `agree`."""
    world = context.world
    tiers: dict[str, Catalogue] = {"disk": Catalogue(context.folder.path, patience=START_PATIENCE)}
    of_node = world.gather(memory.path if memory else None)[world.rank - world.local_rank]
    if of_node is not None:  # ranks of a node read what its first one keeps
        tiers = {"memory": memory.store if memory else Catalogue(of_node), **tiers}
    found, any_passed_over = agree(world, tiers, alike=exact)
    if found is None and any_passed_over:
        logger.warning(f"NO COMPLETE CHECKPOINT IS LEFT in {context.folder.path}: training starts at epoch 1")
    elif found is None and options.resume:
        logger.warning(f"--resume: no complete checkpoint in {context.folder.checkpoints}; starting at epoch 1")
    return found


def tell_if_far_ahead(context: JobContext, found: LoadedCheckpoint | None, steps_per_epoch: int) -> None:
    """Say so if the state that is gone on from is in memory only, and more than an epoch ahead of all disks: somebody may have taken newer
    ones away by hand, in order to go back. A collective."""
    world = context.world
    own = world.together(lambda: Catalogue(context.folder.path).listing().present if world.is_first_on_node else [])
    newest = max((position for position in world.gather(own[0].position if own else None) if position is not None), default=None)
    if found is None or found.manifest.position.step - (newest.step if newest else 0) <= steps_per_epoch:
        return
    on_disk = f"epoch {newest.epoch}, step {newest.step}" if newest else "none"
    logger.warning(
        f"{found.path} is in memory only, and more than an epoch ahead of the newest state on a disk ({on_disk}); if newer ones were taken "
        f"away to go back, use `gai-yolo snapshots rollback {context.folder.path} --to epoch:N`, which also outdates those in memory"
    )
