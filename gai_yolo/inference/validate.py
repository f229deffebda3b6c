"""A trained network on a split of a data set: COCO's numbers as training has them, to the last digit, and what they hide."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from gai_yolo.config import Config
from gai_yolo.data.dataset import Batch, EvaluationSet
from gai_yolo.data.formats.check import Split
from gai_yolo.data.formats.reading import expand
from gai_yolo.data.images import ImageSource, check_decodable
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.data.sources import BUILT_IN, described, load_index, read_any
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.world import World, fix_arithmetic
from gai_yolo.errors import ConfigError, DataError
from gai_yolo.evaluation.confusion import CONFUSION_CONFIDENCE, CONFUSION_IOU, Confusion, confusion_of
from gai_yolo.evaluation.curves import Curves, OperatingPoint, best_point
from gai_yolo.evaluation.evaluator import Evaluation, Evaluator
from gai_yolo.inference.trained import TrainedModel
from gai_yolo.sections import DataConfig

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Question:
    """What is asked about a network."""

    split: Split = "val"
    batch_size: int | None = None
    """Images of one forward pass; None: as in training. The last digits depend on it."""
    device: Device | None = None
    """None: the GPU where there is one and training was not told to do without."""
    confidence: float = CONFUSION_CONFIDENCE
    """From which on detections count in the confusion matrix and in the scores of images."""
    iou: float = CONFUSION_IOU
    """Overlap from which on they match there."""


@dataclass(frozen=True, eq=False)
class ValidationReport:
    """How good a network is on a split."""

    model: TrainedModel
    config: Config
    """What it was evaluated under: as in training where that is known."""
    question: Question
    device: str
    """`cpu` or `cuda`."""
    index: Index
    """The whole split."""
    evaluation: Evaluation
    curves: Curves
    confusion: Confusion
    best: OperatingPoint | None
    """None where there is no box to be found."""
    notes: list[str]
    """What somebody should know who reads the numbers; one sentence each."""


def validate(
    model: TrainedModel,
    data: DataConfig | None = None,
    question: Question | None = None,
    watched: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
    checked: Callable[[Index], object] = id,
) -> ValidationReport:
    """Evaluate a network on a split of a data set, in this process alone.

    Where the network comes from a run its settings hold (`evaluation`, `loss`, `data.image_size`, `training.amp`, `channels_last`,
    `threads` and `exact`), so that on the same kind of machine every number is that of `training_metrics.json`.

    Args:
        data: None for the one that it was trained on.
        watched: hands on the batches, and sees when each is done.
        checked: sees the split before anything is computed, and may raise.

    Raises:
        ConfigError: there is no such device, or no data set is known.
        DataError: there is no such data set or split, it is damaged, or its classes are not those of the network.
    """
    question = question or Question()
    config, notes = settings_of(model, data, question)
    data, split = config.data, question.split
    index = described(read_any(data, split) if split == "test" else load_index(data, split, from_cache=False), split, data)
    checked(index)
    notes += check_classes(model, index)
    notes += [f"{one.kind}: {one.count}, {one.action}; the first: {one.example}" for one in index.problems]
    if data.path != BUILT_IN:
        check_decodable(index, data.image_size, data.max_bad_fraction)
    with arithmetic_of(config) as world:
        evaluation = _evaluate(model, config, index, world, watched)
    assert evaluation.curves is not None
    if evaluation.unreadable:
        notes.append(f"{len(evaluation.unreadable)} of {len(index)} images cannot be decoded and are left out of the numbers")
    confusion = confusion_of(evaluation.index, evaluation.detections, question.confidence, question.iou)
    best = best_point(evaluation.curves)
    return ValidationReport(model, config, question, world.device.type, index, evaluation, evaluation.curves, confusion, best, notes)


def settings_of(model: TrainedModel, data: DataConfig | None, question: Question) -> tuple[Config, list[str]]:
    """What a network is evaluated under, and what is otherwise than in training. Raises `ConfigError`."""
    known, notes = model.config or Config(), list[str]()
    if data is None and model.config is None:
        raise ConfigError(f"{model.path}: does not say which data it was trained on; give a data set with --data.")
    if data is None:
        data = known.data
        if data.path != BUILT_IN and not expand(data.path).exists():
            raise ConfigError(f"{model.path}: was trained on {data.path}, which is not there seen from this folder; give it with --data.")
    # What one pass takes no advantage of.
    data = data.model_copy(update={"image_size": known.data.image_size, "cache": "none"})
    device = question.device or ("cpu" if known.training.device == "cpu" else "auto")
    training = known.training.model_copy(update={"device": device})
    if training.amp == "fp16" and not (device != "cpu" and torch.cuda.is_available()):
        training = training.model_copy(update={"amp": "none"})
        notes.append("trained in fp16, which needs a GPU; evaluated in float32 here")
    evaluation = known.evaluation
    if question.batch_size is not None:
        evaluation = evaluation.model_copy(update={"batch_size": question.batch_size})
    return known.model_copy(update={"data": data, "training": training, "evaluation": evaluation}), notes


def check_classes(model: TrainedModel, index: Index) -> list[str]:
    """See that the classes of a data set are those that a network tells apart, in its order; returns notes.

    Raises:
        DataError: they are not.
    """
    ours, theirs = model.class_names, index.class_names
    if ours == theirs:
        return []
    if len(ours) == len(theirs) and ours == [f"class {number}" for number in range(len(ours))]:
        return [f"{model.path} names no classes; those of the data set are taken, in its order"]
    where = f"{index.source}: its classes are not those of {model.path}"
    if sorted(ours) == sorted(theirs):
        place = next(number for number, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        raise DataError(
            f"{where} in their order (the first difference is number {place}: {theirs[place]!r} in place of {ours[place]!r}); number them "
            "as the network does."
        )
    parts = [("in the data set", _without(theirs, ours)), ("in the network", _without(ours, theirs))]
    only = [f"only {place}: {_listed(names)}" for place, names in parts if names] or ["the same names another number of times"]
    raise DataError(f"{where} ({len(theirs)} and {len(ours)}; {'; '.join(only)}); give a data set of the same classes.")


@contextlib.contextmanager
def arithmetic_of(config: Config) -> Iterator[World]:
    """This process alone, computing as the training did; as it was before when the block is done.

    Raises:
        ConfigError: there is no such device, or this is one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("WORLD_SIZE: this is one of several processes, and a validation is done by one; start it without torchrun.")
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fills, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark  # type: ignore[attr-defined]
    deterministic = torch.backends.cudnn.deterministic
    try:
        if config.training.exact:
            fix_arithmetic()
        yield World(config.training.device, config.training.threads)
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic


def _evaluate(
    model: TrainedModel, config: Config, index: Index, world: World, watched: Callable[[Iterable[Batch]], Iterable[Batch]]
) -> Evaluation:
    data, training = config.data, config.training
    images = ImageSource(index.images, data.image_size, data.cache, data.cache_folder)
    is_gpu = world.device.type == "cuda"
    loader = EvaluationLoader(EvaluationSet(images), config.evaluation.batch_size, world.rank, world.world_size, data.workers, is_gpu)
    with contextlib.closing(loader):
        loss = DetectionLoss(config.loss.box, config.loss.cls, config.loss.dfl)
        evaluator = Evaluator(loader, index, loss, world, config.evaluation, training.amp, training.channels_last)
        memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        network = copy.deepcopy(model.network).to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
        return evaluator(network, watched)


def _without(names: list[str], others: list[str]) -> list[str]:
    return [name for name in names if name not in others]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
