"""The parts of a run, built around a configuration and a state."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from gai_yolo.checkpointing.compatibility import identity_of
from gai_yolo.checkpointing.digest import DivergenceAlarm
from gai_yolo.checkpointing.manager import CheckpointManager
from gai_yolo.checkpointing.memory_tier import MemoryTier, stand_in
from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.checkpointing.schedule import Schedule, bytes_to_come
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.checkpointing.tier import DiskTier, Tier
from gai_yolo.config import Config
from gai_yolo.data.dataset import EvaluationSet, SampleSet, TrainingSet
from gai_yolo.data.formats.reading import expand
from gai_yolo.data.images import ImageSource, check_decodable
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader, TrainingLoader
from gai_yolo.data.order import BatchPlan
from gai_yolo.data.rarity import class_weights, repeat_factors
from gai_yolo.data.sources import BUILT_IN
from gai_yolo.detector import YOLO12
from gai_yolo.detector.ema import EMA
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.detector.weights import Origin, fill, read_weights
from gai_yolo.distributed.world import World
from gai_yolo.errors import CheckpointError, ConfigError
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.goodput.record import Record
from gai_yolo.job.settlement import advice, launcher_advice
from gai_yolo.log import OF_NODE, told_if_refused
from gai_yolo.membership.consistency import must_agree
from gai_yolo.membership.environment import file_digest
from gai_yolo.membership.join import Membership
from gai_yolo.reporting.reporter import Reporter
from gai_yolo.reporting.run_pictures import RunPictures
from gai_yolo.reporting.tensorboard import TensorBoard
from gai_yolo.sections import DataConfig, LossConfig
from gai_yolo.store.node_memory import free_memory
from gai_yolo.store.run_record import RunRecord
from gai_yolo.store.store import Store
from gai_yolo.training.context import JobContext
from gai_yolo.training.freezing import freezing_of
from gai_yolo.training.loop import TrainingParts
from gai_yolo.training.multi_scale import InputSize
from gai_yolo.training.optimizer import OptimizerSchedule, make_optimizer, make_schedule
from gai_yolo.training.step import TrainingStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownRun:
    """What is known of a run beside its state; what is worked out here holds once the configuration is settled."""

    config: Config
    indexes: tuple[Index, Index]
    """Of the training set and the validation set."""
    membership: Membership
    records: Sequence[Record]
    """Of earlier starts."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says about its run."""
        return identity_of(self.config, self.indexes)

    @cached_property
    def plan(self) -> BatchPlan:
        """The shape of an epoch."""
        training, num_samples = self.config.training, len(self.indexes[0])
        assert training.micro_batch_size != "auto"
        seed = self.config.experiment.seed
        weights = repeat_factors(self.indexes[0], training.image_weights) if training.image_weights else None
        return BatchPlan(num_samples, training.batch_size, training.micro_batch_size, seed, training.max_batches_per_epoch, weights)

    @cached_property
    def schedule(self) -> OptimizerSchedule:
        """Of the whole run."""
        return make_schedule(self.config.training, len(self.indexes[0].categories), self.plan.steps_per_epoch)


def assemble(run: KnownRun, loaders: tuple[TrainingLoader, EvaluationLoader], state: TrainingState, context: JobContext) -> TrainingParts:
    """Build what the loop needs around a state."""
    config, world, memory = run.config, context.world, run.membership.memory
    training, loss = config.training, make_loss(config.loss, run.indexes[0], world.device)
    world.meet()  # DDP compares the models of all ranks
    step = TrainingStep(state, loss, run.schedule, world, training, freezing_of(config.model, state.model))
    tiers = [
        make_disk_tier(config, state, context) if world.is_first else None,
        make_memory_tier(config, state, context, memory.store) if memory is not None else None,
        make_stand_in(config, state, context, run.membership.record),
    ]
    return TrainingParts(
        training=training,
        evaluation_interval=config.evaluation.interval,
        input_size=InputSize(config.data.image_size, config.augment.multi_scale, config.experiment.seed),
        plan=run.plan,
        state=state,
        loader=loaders[0],
        step=step,
        alarm=DivergenceAlarm(world, config.elastic.check_interval),
        evaluate=Evaluator(loaders[1], run.indexes[1], loss, world, config.evaluation, training.amp, training.channels_last),
        saver=CheckpointManager(config, state, step.boundary, run.identity, [tier for tier in tiers if tier is not None]),
        reporter=make_reporter(run, loaders[0].dataset, state, context),
        context=context,
        records=run.records,
    )


def make_loss(config: LossConfig, index: Index, device: torch.device) -> DetectionLoss:
    """The loss on a training set. Raises `ConfigError` for weights of classes that it has not."""
    weights = class_weights(config.class_weights, index)
    return DetectionLoss(config.box, config.cls, config.dfl, None if weights is None else torch.tensor(weights, device=device))


def make_loaders(
    run: KnownRun, context: JobContext, found: LoadedCheckpoint | None, stack: contextlib.ExitStack
) -> tuple[TrainingLoader, EvaluationLoader]:
    """What brings the data, in processes that the stack ends; the training workers begin at once with what comes after the state that was
    found."""
    config, world, plan = run.config, context.world, run.plan
    workers, pin_memory = config.data.workers, world.device.type == "cuda"
    train_images, val_images = world.together(lambda: [make_images(config.data, index) for index in run.indexes])
    training_set = TrainingSet(train_images, config.augment, config.experiment.seed, config.training.epochs)
    train = TrainingLoader(training_set, plan, world.rank, world.world_size, workers, pin_memory)
    val = EvaluationLoader(EvaluationSet(val_images), config.evaluation.batch_size, world.rank, world.world_size, workers, pin_memory)
    stack.callback(train.close)
    stack.callback(val.close)
    step, epoch = (0, 0) if found is None else (found.manifest.position.step, found.manifest.position.epoch)
    done = step - epoch * plan.steps_per_epoch
    if epoch < config.training.epochs and done < plan.steps_per_epoch:
        train.start(epoch + 1, done)
    return train, val


def make_disk_tier(config: Config, state: TrainingState, context: JobContext) -> Tier:
    """What saves the state on the disk, on the rank that writes."""
    store, size = context.folder.store, state.expected_bytes()
    needed, free = bytes_to_come(config, state.epoch, size, store.listing().present), store.fs.free_bytes(store.run)
    if needed > free:
        logger.warning(
            f"{store.run}: the checkpoints to come need about {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free: make room, or keep "
            "fewer (training.checkpoint_interval, snapshots.keep_epochs, snapshots.keep)"
        )
    return DiskTier(store, config, state, context.spare_writer, context.watchdog.progress)


def make_memory_tier(config: Config, state: TrainingState, context: JobContext, memory: Store) -> Tier | None:
    """What keeps the state in this node's memory, if there is room for it."""
    interval, size = config.elastic.memory_interval_steps, state.expected_bytes()
    assert interval is not None
    held = sum(manifest.size for manifest in memory.listing().present)
    # The old one goes when the new one is complete.
    needed, free = 2 * size - held, free_memory(memory)
    if needed > free:
        logger.warning(
            f"{memory.run}: {needed / 1e6:.0f} MB are needed to keep the state in this node's memory, and {free / 1e6:.0f} MB are free: "
            "make it larger (in containers --shm-size, or a volume of medium Memory, and the memory limit, towards which both count), or "
            "set elastic.memory_interval_steps: null",
            extra=OF_NODE,
        )
        return None
    schedule = Schedule.of_memory(interval, config.snapshots, state.step, size)
    return MemoryTier(lambda: contextlib.nullcontext(memory), memory.run, schedule, size, context.watchdog.progress)


def make_stand_in(config: Config, state: TrainingState, context: JobContext, record: RunRecord) -> Tier | None:
    """What saves this node's state if the process dies that keeps it; on the others."""
    if config.elastic.memory_interval_steps is None or context.world.is_first_on_node:
        return None
    try:
        base = config.memory_folder
    except ConfigError:
        return None  # which the node's first process has told
    return stand_in(base, context.folder.path, record.run_id, state.expected_bytes()) if base.is_dir() else None


def make_state(run: KnownRun, context: JobContext, found: LoadedCheckpoint | None) -> TrainingState:
    """The state at the start, or as the checkpoint says."""
    config, world = run.config, context.world
    torch.manual_seed(config.experiment.seed)
    model = YOLO12(config.model.size, len(run.indexes[0].categories))
    freezing_of(config.model, model)  # what is wrong in the configuration is said before anything begins
    make_loss(config.loss, run.indexes[0], world.device)
    origin = begin_with(config.model.weights, model, world) if found is None else None
    memory_format = torch.channels_last if config.training.channels_last else torch.contiguous_format
    model = model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(world.device.type, init_scale=2.0**10, enabled=config.training.amp == "fp16")
    ema = EMA(model, config.training.ema_decay, config.training.ema_tau)
    state = TrainingState(model, ema, make_optimizer(model, run.schedule), scaler, origin=origin)
    if found is not None:
        try:
            state.apply(found.content)
        except CheckpointError as error:
            raise CheckpointError(f"{found.path}: {error}") from None
    return state


def begin_with(weights: Path | None, model: YOLO12, world: World) -> dict[str, Any] | None:
    """Give a network its first weights, the same on all nodes; returns where they come from."""
    path, origin = None if weights is None else expand(weights), None
    if path is not None:
        left_out, origin = world.together(lambda: fill_from(path, model))
        logger.info(f"weights from {weights}" + (f"; {len(left_out)} tensors of the class branch start anew" if left_out else ""))
        if origin.note:
            logger.info(origin.note)
    must_agree(world, {"content of model.weights": None if path is None else file_digest(path)})
    return None if origin is None else asdict(origin)


def fill_from(path: Path, model: YOLO12) -> tuple[list[str], Origin]:
    """Give a network the weights of a file; returns what is left out of them, and where they come from."""
    found = read_weights(path)
    return fill(model, found, path), found.origin or Origin(path.name, file_digest(path), None)


def check_images(config: DataConfig, indexes: tuple[Index, Index]) -> None:
    """Refuse splits whose images cannot be decoded. On rank 0 only: all nodes have the same."""
    if config.path != BUILT_IN:
        for index in indexes:
            check_decodable(index, config.image_size, config.max_bad_fraction)


def make_images(config: DataConfig, index: Index) -> ImageSource:
    """Decoded images of a split, cached as configured."""
    images = ImageSource(index.images, config.image_size, config.cache, config.cache_folder, index.lost)
    if images.note:
        logger.warning(images.note)
    return images


def make_reporter(run: KnownRun, training_set: SampleSet, state: TrainingState, context: JobContext) -> Reporter:
    """Everything that tells people about the run, set back to the state's position."""
    config, (train_index, val_index) = run.config, run.indexes
    resolved = yaml.safe_dump(config.dump(), sort_keys=False)
    if context.world.is_first:
        with told_if_refused(logger, context.folder.config):
            context.folder.store.publish_text(context.folder.config, resolved)
    step = state.step

    def open_tensorboard() -> TensorBoard:
        tensorboard = TensorBoard(context.folder.tensorboard, step)
        tensorboard.config_text(step + 1, resolved)
        return tensorboard

    opener = open_tensorboard if context.world.is_first and config.reporting.tensorboard else None
    draws = context.world.is_first and config.reporting.images > 0
    pictures = RunPictures(context.folder.pictures, training_set, run.plan, train_index) if draws else None
    return Reporter(context.folder, config.reporting, val_index, context.world.rank, context.console, opener, pictures)


def announce(run: KnownRun, context: JobContext) -> None:
    """What is about to be trained, on what."""
    config, world, schedule, training = run.config, context.world, run.schedule, run.config.training
    train_index, val_index = run.indexes
    processes = "1 process" if world.world_size == 1 else f"{world.world_size} processes"
    logger.info(f"YOLO12-{config.model.size}, {len(train_index.categories)} classes, in {context.folder.path}")
    logger.info(f"data: {train_index.source} ({len(train_index)} images), {val_index.source} ({len(val_index)} images)")
    logger.info(
        f"{processes} on {world.device.type}, {world.threads} threads each; batch {training.batch_size} in micro-batches of "
        f"{training.micro_batch_size}; {schedule.optimizer}, lr {schedule.lr:g}, {schedule.total_steps} steps"
    )
    for line in [*advice(training, run.plan, world), *launcher_advice(world, os.environ)]:
        logger.warning(line)
