"""The only place where the parts are put together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from gai_yolo.config import Config, changed_keys, value_at
from gai_yolo.data.dataset import EvaluationSet, TrainingSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader, TrainingLoader
from gai_yolo.data.order import Plan
from gai_yolo.data.sources import load_indexes
from gai_yolo.detector import YOLO12
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.detector.weights import load_weights
from gai_yolo.elastic.process import World, restarted_by_agent
from gai_yolo.errors import CheckpointError
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.reporting.console import Console, Silent
from gai_yolo.reporting.reporter import Reporter
from gai_yolo.reporting.serve import serve_tensorboard
from gai_yolo.reporting.tensorboard import TensorBoard
from gai_yolo.store.atomic import publish_text
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.training.ema import EMA
from gai_yolo.training.loop import Run, train
from gai_yolo.training.optim import Recipe, make_optimizer, make_recipe
from gai_yolo.training.snapshots import Found, Snapshots, newest
from gai_yolo.training.state import TrainingState
from gai_yolo.training.step import TrainingStep


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    resume: bool = False
    """Warn if there is nothing to continue (continuing is the default anyway)."""
    fresh: bool = False
    """Move the old run folder aside and start over."""
    tensorboard: bool = False
    """Serve TensorBoard while training."""


def run_job(config: Config, options: Options) -> None:
    """Train, evaluate and save as configured, going on from the newest complete checkpoint of the run folder.

    Raises:
        Refusal: something the user must mend; raised alike on all ranks.
    """
    world = World(config.training.device, config.training.threads)
    folder = RunFolder(config.run_folder)
    console = Console(config.training.epochs, config.reporting.log_interval) if world.is_first else Silent()
    try:
        world.from_first(lambda: _open(folder, options, console))
        if options.tensorboard and world.is_first:
            console.info(f"TensorBoard: {serve_tensorboard(config.experiment.folder.expanduser())}")
        _train(config, options, world, folder, console)
    except KeyboardInterrupt:
        console.warning(f"interrupted; the same command goes on from the newest checkpoint in {folder.checkpoints}")
        raise
    finally:
        console.close()
        folder.release()
    world.close()


def _open(folder: RunFolder, options: Options, console: Silent) -> None:
    folder.lock()
    # A worker that torchrun has restarted sees the same command line, but its run is not to be started over again.
    if options.fresh and not restarted_by_agent():
        moved = folder.move_aside()
        if moved is not None:
            console.info(f"the old run is kept in {moved}")
    folder.make()


def _train(config: Config, options: Options, world: World, folder: RunFolder, console: Silent) -> None:
    indexes = world.together(lambda: load_indexes(config.data))
    for index in indexes:
        tell_about(index, console)
    found = world.from_first(lambda: newest(folder.checkpoints, console.warning))
    if found is None and options.resume:
        console.warning(f"--resume: no complete checkpoint in {folder.checkpoints}; starting at epoch 1")
    config = settle(config, found, world.world_size)
    identity = {"config": config.dump(), "class_names": indexes[0].class_names, "data_digest": indexes[0].digest()}
    if found is not None:
        for note in check_continuation(found, identity):
            console.info(note)
    if world.is_first:
        publish_text(folder.config, yaml.safe_dump(config.dump(), sort_keys=False))

    plan = make_plan(config, len(indexes[0]))
    recipe = make_recipe(config.training, len(indexes[0].categories), plan.steps_per_epoch)
    state = make_state(config, recipe, len(indexes[0].categories), world, console, found)
    if state.epoch >= config.training.epochs:
        console.info(finished_line(state, config))
        return
    _announce(config, indexes, recipe, world, console, state)
    _run(config, indexes, plan, recipe, state, world, folder, console, identity)


def _run(
    config: Config,
    indexes: tuple[Index, Index],
    plan: Plan,
    recipe: Recipe,
    state: TrainingState,
    world: World,
    folder: RunFolder,
    console: Silent,
    identity: dict[str, Any],
) -> None:
    training, validation = (_images(config, index, console) for index in indexes)
    workers, pin = config.data.workers, world.device.type == "cuda"
    loss = DetectionLoss(config.loss.box, config.loss.cls, config.loss.dfl)
    training_set = TrainingSet(training, config.augment, config.experiment.seed, config.training.epochs)
    evaluation_loader = EvaluationLoader(
        EvaluationSet(validation), config.evaluation.batch_size, world.rank, world.world_size, workers, pin
    )
    tensorboard = TensorBoard(folder.tensorboard, state.step) if world.is_first and config.reporting.tensorboard else None
    reporter = Reporter(folder, config.reporting, indexes[1], world.rank, console, tensorboard)
    if tensorboard:
        tensorboard.config_text(state.step + 1, yaml.safe_dump(config.dump(), sort_keys=False))
    run = Run(
        config=config,
        plan=plan,
        state=state,
        loader=TrainingLoader(training_set, plan, world.rank, world.world_size, workers, pin),
        step=TrainingStep(state, loss, recipe, world, config.training),
        evaluate=Evaluator(
            evaluation_loader, indexes[1], loss, world, config.evaluation, config.training.amp, config.training.channels_last
        ),
        snapshots=Snapshots(folder.checkpoints, config.training.checkpoint_interval, config.training.epochs, identity)
        if world.is_first
        else None,
        reporter=reporter,
    )
    try:
        train(run)
    finally:
        if tensorboard:
            tensorboard.close()
    console.info(finished_line(state, config))
    console.info(f"checkpoints: {folder.checkpoints}  pictures: {folder.predictions}  TensorBoard: {folder.tensorboard}")


def settle(config: Config, found: Found | None, world_size: int) -> Config:
    """Fix what the first start decides for the whole life of a run: the micro-batch size."""
    if config.training.micro_batch_size != "auto":
        return config
    recorded = value_at(found.content.get("config", {}), "training.micro_batch_size") if found else None
    size = recorded or -(-config.training.batch_size // world_size)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": size})})


def check_continuation(found: Found, identity: dict[str, Any]) -> list[str]:
    """Whether a run may go on from a checkpoint under this configuration and data.

    Args:
        identity: `config`, `class_names` and `data_digest` of this start.

    Returns:
        Lines that tell where it goes on and which harmless settings have changed.

    Raises:
        CheckpointError: going on would be wrong; names the keys.
    """
    old, new = found.content.get("config", {}), identity["config"]
    wrong, harmless = changed_keys(old, new)
    reasons = [f"{key} is {value_at(new, key)!r}, was {value_at(old, key)!r}" for key in wrong]
    if found.content.get("class_names") != identity["class_names"]:
        was, now = found.content.get("class_names") or [], identity["class_names"]
        reasons.append(f"data.path has {len(now)} classes ({', '.join(now[:5])}), was {len(was)} ({', '.join(was[:5])})")
    elif found.content.get("data_digest") != identity["data_digest"]:
        reasons.append(f"data.path {value_at(new, 'data.path')} holds other training images or boxes than before")
    if reasons:
        raise CheckpointError(
            f"{found.path}: cannot go on from it: {'; '.join(reasons)}. Set this back, choose another experiment.name, "
            "or start over with --fresh (the old run is kept)."
        )
    notes = [f"going on from {found.path} (epoch {found.content['epoch']}, step {found.content['step']})"]
    notes += [f"changed since: {key} is {value_at(new, key)!r}, was {value_at(old, key)!r}" for key in harmless]
    return notes


def make_plan(config: Config, num_samples: int) -> Plan:
    """The shape of an epoch under a settled configuration."""
    training = config.training
    assert training.micro_batch_size != "auto"
    return Plan(num_samples, training.batch_size, training.micro_batch_size, config.experiment.seed, training.max_batches_per_epoch)


def make_state(config: Config, recipe: Recipe, num_classes: int, world: World, console: Silent, found: Found | None) -> TrainingState:
    """The state at the start, or as the checkpoint says."""
    torch.manual_seed(config.experiment.seed)
    model = YOLO12(config.model.size, num_classes)
    weights = config.model.weights
    if weights is not None and found is None:
        left_out = world.together(lambda: load_weights(model, weights))
        console.info(f"weights from {weights}" + (f"; {len(left_out)} tensors of the class branch start anew" if left_out else ""))
    memory_format = torch.channels_last if config.training.channels_last else torch.contiguous_format
    model = model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
    fp16 = config.training.amp == "fp16"
    scaler = torch.amp.GradScaler(world.device.type, init_scale=2.0**10, enabled=fp16)
    ema = EMA(model, config.training.ema_decay, config.training.ema_tau)
    state = TrainingState(model, ema, make_optimizer(model, recipe), scaler)
    if found is not None:
        try:
            state.apply(found.content)
        except CheckpointError as error:
            raise CheckpointError(f"{found.path}: {error}") from None
    return state


def tell_about(index: Index, console: Silent) -> None:
    """One line for each kind of problem that was found when the data set was read."""
    for problem in index.problems:
        console.warning(f"{index.source}: {problem.kind}: {problem.count}, {problem.action}; the first: {problem.example}")


def finished_line(state: TrainingState, config: Config) -> str:
    """What a finished run says."""
    best = "" if state.best_metric is None else f", best mAP50-95 {state.best_metric:.4f}"
    epochs = config.training.epochs
    return f"finished: {state.epoch} of {epochs} epochs{best}; raise training.epochs to go on, --fresh starts over"


def _images(config: Config, index: Index, console: Silent) -> ImageSource:
    images = ImageSource(index.images, config.data.image_size, config.data.cache, config.data.cache_folder)
    if images.note:
        console.warning(images.note)
    return images


def _announce(config: Config, indexes: tuple[Index, Index], recipe: Recipe, world: World, console: Silent, state: TrainingState) -> None:
    parameters = sum(p.numel() for p in state.model.parameters())
    train_index, val_index = indexes
    console.info(f"YOLO12-{config.model.size}, {parameters:,} parameters, {len(train_index.categories)} classes")
    console.info(f"data: {train_index.source} ({len(train_index)} images), {val_index.source} ({len(val_index)} images)")
    console.info(
        f"{world.world_size} process{'es' if world.world_size > 1 else ''} on {world.device.type}, {world.threads} threads each; "
        f"batch {config.training.batch_size} in micro-batches of {config.training.micro_batch_size}; "
        f"{recipe.optimizer}, lr {recipe.lr:g}, {recipe.total_steps} steps"
    )
    console.info(f"run folder: {config.run_folder}, {time.strftime('%Y-%m-%d %H:%M')}")
