"""THE list of what is saved: everything that training depends on and nothing that the machines decide.

Law: `apply(capture())` changes nothing. Learning rate, momentum, sample order, augmentation and its phase are pure
functions of (config, seed, step) and therefore not here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch.optim import Optimizer

from gai_yolo.detector import YOLO12
from gai_yolo.detector.ema import EMA
from gai_yolo.errors import CheckpointError

CHECKPOINT_FORMAT = 4
"""Version of the checkpoint's layout; raised when an older program could not continue from it."""


LOSSES = ("total", "box", "cls", "dfl")
TIMES = ("seconds", "images_per_second", "evaluation_seconds")
"""Columns of the metrics rows that depend on the machine."""


@dataclass
class Progress:
    """What an unfinished epoch has gathered for its row of metrics."""

    losses: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 0.0))
    """Sums over the epoch's steps so far."""
    seconds: float = 0.0
    """Time spent on them, over all starts of the job."""
    bad_steps: int = 0
    """Steps of the epoch that were passed over, and have no losses."""


@dataclass
class TrainingState:
    """The model and everything else that changes while training."""

    model: YOLO12
    ema: EMA
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    """Loss scaling of fp16; disabled otherwise."""
    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed optimizer steps."""
    samples: int = 0
    """Samples trained on."""
    best_metric: float | None = None
    """Highest mAP50-95 so far; None before the first evaluation."""
    best_since: int = -1
    """The step after which the validation set is the present one: only later evaluations say which epoch is the best."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row for each completed epoch, as in `training_metrics.json`."""
    progress: Progress = field(default_factory=Progress)
    """Of the epoch after the completed ones."""
    gradient_exponents: list[int] | None = None
    """What to expect of each trained parameter's gradient (`distributed.exact_sum.GradientSum`); None before the first step."""
    bad_in_row: int = 0
    """Steps in a row, up to the last one, that were passed over."""
    origin: dict[str, Any] | None = None
    """Of the weights that it began with, the fields of `detector.weights.Origin`; None if it began with nothing."""
    changing: threading.RLock = field(default_factory=threading.RLock)
    """Held while the state goes from one step to the next. Whoever holds it in another thread sees a whole step's state, but for
    BatchNorm's statistics (`TrainingStep.boundary`)."""
    is_whole: bool = True
    """Whether it is that of a whole number of steps; not after a transition that was broken off."""

    @contextlib.contextmanager
    def transition(self) -> Iterator[None]:
        """Around what brings the state to the next step, or the next epoch."""
        with self.changing:
            self.is_whole = False
            yield
            self.is_whole = True

    def advance(self, samples: int, losses: Mapping[str, float] | None) -> None:
        """Count a completed step; without losses it was passed over."""
        self.step += 1
        self.samples += samples
        if losses is None:
            self.progress.bad_steps += 1
            self.bad_in_row += 1
        else:
            self.progress.losses = {name: self.progress.losses[name] + losses[name] for name in LOSSES}
            self.bad_in_row = 0

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Count a completed epoch, with its row of metrics."""
        with self.transition():
            metric = row["mAP50-95"]
            if metric is not None:
                self.best_metric = metric if self.best_metric is None else max(metric, self.best_metric)
            self.epoch += 1
            self.history.append(row)
            self.progress = Progress()

    def capture(self) -> dict[str, Any]:
        """Plain data and tensors; tensors are the live ones, so write or copy them before the next step."""
        return {"format": CHECKPOINT_FORMAT, **{field.name: field.get(self) for field in FIELDS}}

    def apply(self, saved: dict[str, Any]) -> None:
        """Become the captured state.

        Raises:
            CheckpointError: a part is missing or belongs to another model or optimizer.
        """
        try:
            for field in FIELDS:
                if field.put is not None and (field.is_required or field.name in saved):
                    field.put(self, saved[field.name])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the checkpoint does not fit this model and optimizer ({reason}).") from None

    @property
    def is_on_gpu(self) -> bool:
        """Whether the weights are there."""
        return next(self.model.parameters()).is_cuda

    def expected_bytes(self) -> int:
        """Size of a snapshot, a little too large rather than too small, also before the optimizer has state of its own."""
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        moments = 2 if isinstance(self.optimizer, torch.optim.AdamW) else 1
        return int((2 + moments) * weights * 1.02) + (1 << 20)


@dataclass(frozen=True)
class Field:
    """One part of what is saved: what a new one needs is said here and nowhere else."""

    name: str
    """In a checkpoint."""
    get: Callable[[TrainingState], Any]
    put: Callable[[TrainingState, Any], None] | None
    """None for what follows from another part."""
    seen: Callable[[Any], dict[str, Any]] | None = None
    """What is compared between runs: parts of the digest, and what of the value they hold. None: nothing."""
    is_required: bool = True
    """Whether a checkpoint without it is none; otherwise what a new state has in its place stays."""
    is_network: bool = False
    """Whether it is made of tensors that must be finite."""


def _plain(name: str, kind: Callable[[Any], Any] = lambda value: value) -> Field:
    """A plain value that is an attribute of the same name, and part of the position."""
    return Field(name, attrgetter(name), lambda state, saved: setattr(state, name, kind(saved)), lambda value: {"position": {name: value}})


def _put_optimizer(state: TrainingState, saved: dict[str, Any]) -> None:
    # torch loads AdamW's state into SGD without a word; their groups have other settings.
    for own, other in zip(state.optimizer.param_groups, saved["param_groups"], strict=True):
        if own.keys() != other.keys():
            raise ValueError("it was written by another kind of optimizer")
    state.optimizer.load_state_dict(saved)


def _put_scaler(state: TrainingState, saved: dict[str, Any]) -> None:
    if state.scaler.is_enabled() and saved:
        state.scaler.load_state_dict(saved)


def _split(model: dict[str, Any]) -> dict[str, Any]:
    """The weights of a model, and the statistics that its BatchNorms have gathered."""
    statistics = {name: tensor for name, tensor in model.items() if "running_" in name or name.endswith("num_batches_tracked")}
    return {"weights": {name: tensor for name, tensor in model.items() if name not in statistics}, "batch_norm": statistics}


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMES}


def _last_row(name: str) -> Field:
    """For people who open a checkpoint."""
    return Field(name, lambda state: state.history[-1].get(name) if state.history else None, None, is_required=False)


FIELDS = (
    Field("model_state_dict", lambda s: s.model.state_dict(), lambda s, saved: s.model.load_state_dict(saved), _split, is_network=True),
    Field(
        "ema_state_dict",
        lambda state: state.ema.model.state_dict(),
        lambda state, saved: state.ema.model.load_state_dict(saved),
        lambda saved: {"ema": saved},
        is_network=True,
    ),
    Field(
        "ema_updates",
        lambda state: state.ema.updates,
        lambda state, saved: setattr(state.ema, "updates", int(saved)),
        lambda value: {"position": {"ema_updates": value}},
    ),
    Field("optimizer_state_dict", lambda state: state.optimizer.state_dict(), _put_optimizer, lambda saved: {"optimizer": saved}),
    Field(
        "scaler_state_dict",
        lambda state: state.scaler.state_dict(),
        _put_scaler,
        lambda saved: {"position": {"scaler_state_dict": saved}},
    ),
    _plain("epoch", int),
    _plain("step", int),
    _plain("samples", int),
    _plain("best_metric"),
    replace(_plain("best_since", int), seen=None, is_required=False),  # older versions knew one validation set, and no such number
    replace(_plain("history", list), seen=lambda rows: {"metrics": {"rows": [_without_times(row) for row in rows]}}),
    Field(
        "progress",
        lambda state: asdict(state.progress),
        lambda state, saved: setattr(state, "progress", Progress(**saved)),
        lambda saved: {"metrics": {"epoch so far": _without_times(saved)}},
    ),
    _plain("gradient_exponents", lambda exponents: None if exponents is None else [int(exponent) for exponent in exponents]),
    _plain("bad_in_row", int),
    replace(_plain("origin"), seen=None, is_required=False),  # the weights tell what it was made of; older versions did not say
    _last_row("train_loss"),
    _last_row("val_loss"),
)
"""THE list. A part that a future version needs and that older checkpoints lack is not required; one that they cannot do without raises
`CHECKPOINT_FORMAT`."""
PARTS = ("weights", "batch_norm", "ema", "optimizer", "metrics", "position")
"""Of the digest, as people see them."""
