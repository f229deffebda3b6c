"""The only place where the parts are put together."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from gai_yolo.config import Config
from gai_yolo.data.check import expand
from gai_yolo.data.dataset import EvaluationSet, TrainingSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader, TrainingLoader
from gai_yolo.data.order import Plan
from gai_yolo.data.sources import load_indexes
from gai_yolo.detector import YOLO12
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.detector.weights import load_weights
from gai_yolo.elastic.notices import Interrupt
from gai_yolo.elastic.process import World, fix_arithmetic, launch_id, was_restarted
from gai_yolo.errors import CheckpointError, ConfigError, Refusal, Stop
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.reporting.console import Console, Silent
from gai_yolo.reporting.reporter import Reporter, rewind_ledger, write_metrics
from gai_yolo.reporting.serve import serve_tensorboard
from gai_yolo.reporting.tensorboard import TensorBoard
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.training.continuation import advice, check_continuation, finished_line, identity_of, settle
from gai_yolo.training.digest import DivergenceAlarm
from gai_yolo.training.ema import EMA
from gai_yolo.training.loop import Run, train
from gai_yolo.training.optim import Recipe, make_optimizer, make_recipe
from gai_yolo.training.snapshots import Found, NoSnapshots, Snapshots, bytes_to_come, newest
from gai_yolo.training.state import TrainingState
from gai_yolo.training.step import TrainingStep

CLOSING_PATIENCE = 10.0
"""Seconds that an interrupted job waits for a checkpoint that is on its way to the disk; Ctrl-C again ends the wait."""


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    resume: bool = False
    """Warn if there is nothing to continue (continuing is the default anyway)."""
    fresh: bool = False
    """Move the old run folder aside and start over."""
    tensorboard: bool = False
    """Serve TensorBoard while training."""


@dataclass(frozen=True)
class Site:
    """Where a job runs: its processes, its folder, its terminal."""

    world: World
    folder: RunFolder
    console: Silent
    """`Console` on rank 0."""
    interrupt: Interrupt


def run_job(config: Config, options: Options) -> None:
    """Train, evaluate and save as configured, going on from the newest complete checkpoint of the run folder.

    Raises:
        Refusal: something the user must mend; raised alike on all ranks.
    """
    if config.training.exact:
        fix_arithmetic()
    world = World(config.training.device, config.training.threads)
    console = Console(config.training.epochs, config.reporting.log_interval) if world.is_first else Silent()
    site = Site(world, RunFolder(config.run_folder), console, Interrupt())
    try:
        run_at(site, config, options)
    except Stop:
        # A launcher kills the other processes when one has left, and rank 0 may have something to bring to the disk.
        world.wait_for_all()
        raise
    world.close()


def run_at(site: Site, config: Config, options: Options) -> None:
    """The same at a place that is left in order, whatever happens."""
    try:
        site.world.from_first(site.folder.lock)
        if options.tensorboard and site.world.is_first:
            site.console.info(f"TensorBoard: {serve_tensorboard(site.folder.path.parent)}")
        run_in(config, options, site)
    except KeyboardInterrupt:
        site.console.warning(f"interrupted; the same command goes on from the newest complete state in {site.folder.path}")
        raise
    finally:
        site.console.close()
        site.folder.release()
        site.interrupt.close()


def open_folder(options: Options, site: Site) -> None:
    """Make the locked run folder ready. On rank 0 only."""
    launch = launch_id()
    # Workers that torchrun starts again, after a crash or a resize, see the same command line; their run is not to be
    # started over a second time.
    if options.fresh and (was_restarted() or (launch is not None and site.folder.started_over_by() == launch)):
        site.console.info(f"--fresh: this job ({launch}) has started over already; going on")
    elif options.fresh:
        moved = site.folder.move_aside()
        if moved is not None:
            site.console.info(f"the old run is kept in {moved}")
    site.folder.make()
    try:
        if options.fresh and launch is not None:
            site.folder.mark_started_over(launch)
        site.folder.store.sweep()
    except OSError as error:
        reason = f"{error.filename or site.folder.path}: {error.strerror}"
        raise Refusal(f"{site.folder.path}: cannot be made ready ({reason}); mend that and start again.") from None


def find(options: Options, site: Site) -> Found | None:
    """The checkpoint to go on from. On rank 0 only."""
    passed_over = []

    def tell(text: str) -> None:
        passed_over.append(text)
        site.console.warning(text)

    found = newest(site.folder.store, tell)
    if found is None and passed_over:
        site.console.warning(f"NO COMPLETE CHECKPOINT IS LEFT in {site.folder.path}: training starts at epoch 1")
    elif found is None and options.resume:
        site.console.warning(f"--resume: no complete checkpoint in {site.folder.checkpoints}; starting at epoch 1")
    return found


def run_in(config: Config, options: Options, site: Site) -> None:
    """Train in a locked run folder; nothing in it is touched before the configuration and the data are known to be good."""
    if config.training.amp == "fp16" and site.world.device.type == "cpu":
        raise ConfigError("training.amp: fp16 needs a GPU; use bf16 or none on a CPU.")
    indexes = site.world.together(lambda: load_indexes(config.data))
    for index in indexes:
        tell_about(index, site.console)
    site.world.from_first(lambda: open_folder(options, site))
    found = site.world.from_first(lambda: find(options, site))
    config = settle(config, found, site.world, len(indexes[0]))
    assert config.training.threads != "auto"
    site.world.set_threads(config.training.threads)
    identity = identity_of(config, indexes[0])
    if found is not None:
        for note in check_continuation(found, identity):
            site.console.info(note)

    plan = make_plan(config, len(indexes[0]))
    recipe = make_recipe(config.training, len(indexes[0].categories), plan.steps_per_epoch)
    state = make_state(config, recipe, len(indexes[0].categories), site, found)
    site.world.from_first(lambda: bring_up_to_date(site, state))
    if state.epoch < config.training.epochs:
        announce(config, indexes, recipe, site)
        run = assemble(config, indexes, recipe, state, site, identity)
        try:
            train(run)
        except Stop as stop:
            if site.world.is_first:
                print(f"error: {stop}", file=sys.stderr, flush=True)
            stop.told = True
            raise
        finally:
            run.snapshots.close(CLOSING_PATIENCE)
            run.reporter.close()
        if run.snapshots.summary:
            site.console.info(run.snapshots.summary)
    site.console.info(finished_line(state, config.training.epochs))
    folder = site.folder
    site.console.info(f"checkpoints: {folder.checkpoints}  pictures: {folder.predictions}  TensorBoard: {folder.tensorboard}")


def assemble(
    config: Config, indexes: tuple[Index, Index], recipe: Recipe, state: TrainingState, site: Site, identity: dict[str, Any]
) -> Run:
    """Build what the loop needs around a state."""
    world, training = site.world, config.training
    plan = make_plan(config, len(indexes[0]))
    loss = DetectionLoss(config.loss.box, config.loss.cls, config.loss.dfl)
    workers, pin_memory = config.data.workers, world.device.type == "cuda"
    train_images, val_images = world.together(lambda: [make_images(config, index, site.console) for index in indexes])
    training_set = TrainingSet(train_images, config.augment, config.experiment.seed, training.epochs)
    val_loader = EvaluationLoader(
        EvaluationSet(val_images), config.evaluation.batch_size, world.rank, world.world_size, workers, pin_memory
    )
    return Run(
        config=config,
        plan=plan,
        state=state,
        loader=TrainingLoader(training_set, plan, world.rank, world.world_size, workers, pin_memory),
        step=TrainingStep(state, loss, recipe, world, training),
        alarm=DivergenceAlarm(world, config.elastic.check_interval),
        evaluate=Evaluator(val_loader, indexes[1], loss, world, config.evaluation, training.amp, training.channels_last),
        snapshots=make_snapshots(config, identity, state, site),
        reporter=make_reporter(config, indexes[1], state, site),
        interrupt=site.interrupt,
    )


def make_snapshots(config: Config, identity: dict[str, Any], state: TrainingState, site: Site) -> NoSnapshots:
    """What saves the state, on the rank that writes."""
    if not site.world.is_first:
        return NoSnapshots()
    store = site.folder.store
    needed, free = bytes_to_come(config, state, store.listing().present), store.fs.free_bytes(store.run)
    if needed > free:
        site.console.warning(
            f"{store.run}: the checkpoints to come need about {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free: make room, or keep "
            "fewer (training.checkpoint_interval, snapshots.keep_epochs, snapshots.keep)"
        )
    return Snapshots(store, config, identity, state, pinned=site.world.device.type == "cuda", tell=site.console.warning)


def bring_up_to_date(site: Site, state: TrainingState) -> None:
    """Make metrics, ledger and `best.pt` tell of the state that is gone on from, whatever a killed run wrote after it. On
    rank 0 only."""
    folder, tell = site.folder, site.console.warning
    write_metrics(folder, state.history, tell)
    try:
        rewind_ledger(folder, state.step)
        folder.store.link_best()
    except OSError as error:
        tell(f"{error.filename or folder.path}: cannot be brought up to date ({error.strerror}); training goes on")


def make_plan(config: Config, num_samples: int) -> Plan:
    """The shape of an epoch under a settled configuration."""
    training = config.training
    assert training.micro_batch_size != "auto"
    return Plan(num_samples, training.batch_size, training.micro_batch_size, config.experiment.seed, training.max_batches_per_epoch)


def make_state(config: Config, recipe: Recipe, num_classes: int, site: Site, found: Found | None) -> TrainingState:
    """The state at the start, or as the checkpoint says."""
    torch.manual_seed(config.experiment.seed)
    model = YOLO12(config.model.size, num_classes)
    weights = config.model.weights
    if weights is not None and found is None:
        left_out = site.world.together(lambda: load_weights(model, expand(weights)))
        site.console.info(f"weights from {weights}" + (f"; {len(left_out)} tensors of the class branch start anew" if left_out else ""))
    memory_format = torch.channels_last if config.training.channels_last else torch.contiguous_format
    model = model.to(site.world.device, memory_format=memory_format)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(site.world.device.type, init_scale=2.0**10, enabled=config.training.amp == "fp16")
    ema = EMA(model, config.training.ema_decay, config.training.ema_tau)
    state = TrainingState(model, ema, make_optimizer(model, recipe), scaler)
    if found is not None:
        try:
            state.apply(found.content)
        except CheckpointError as error:
            raise CheckpointError(f"{found.path}: {error}") from None
    return state


def make_images(config: Config, index: Index, console: Silent) -> ImageSource:
    """Decoded images of a split, cached as configured."""
    images = ImageSource(index.images, config.data.image_size, config.data.cache, config.data.cache_folder)
    if images.note:
        console.warning(images.note)
    return images


def make_reporter(config: Config, val_index: Index, state: TrainingState, site: Site) -> Reporter:
    """Everything that tells people about the run, set back to the state's position."""
    resolved = yaml.safe_dump(config.dump(), sort_keys=False)
    tensorboard = None
    if site.world.is_first:
        try:
            site.folder.store.publish_text(site.folder.config, resolved)
        except OSError as error:
            site.console.warning(f"{site.folder.config}: cannot be written ({error.strerror}); training goes on")
        if config.reporting.tensorboard:
            tensorboard = TensorBoard(site.folder.tensorboard, state.step, site.console.warning)
            tensorboard.config_text(state.step + 1, resolved)
    return Reporter(site.folder, config.reporting, val_index, site.world.rank, site.console, tensorboard)


def tell_about(index: Index, console: Silent) -> None:
    """One line for each kind of problem that was found when the data set was read."""
    for problem in index.problems:
        console.warning(f"{index.source}: {problem.kind}: {problem.count}, {problem.action}; the first: {problem.example}")


def announce(config: Config, indexes: tuple[Index, Index], recipe: Recipe, site: Site) -> None:
    """What is about to be trained, on what."""
    world, training = site.world, config.training
    train_index, val_index = indexes
    processes = "1 process" if world.world_size == 1 else f"{world.world_size} processes"
    site.console.info(f"YOLO12-{config.model.size}, {len(train_index.categories)} classes, in {site.folder.path}")
    site.console.info(f"data: {train_index.source} ({len(train_index)} images), {val_index.source} ({len(val_index)} images)")
    site.console.info(
        f"{processes} on {world.device.type}, {world.threads} threads each; batch {training.batch_size} in micro-batches of "
        f"{training.micro_batch_size}; {recipe.optimizer}, lr {recipe.lr:g}, {recipe.total_steps} steps"
    )
    for line in advice(config, make_plan(config, len(train_index)), world):
        site.console.warning(line)
