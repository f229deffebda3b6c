"""THE list of what is saved: everything that training depends on and nothing that the machines decide.

Law: `apply(capture())` changes nothing. Learning rate, momentum, sample order, augmentation and its phase are pure
functions of (config, seed, step) and therefore not here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from gai_yolo.detector import YOLO12
from gai_yolo.detector.ema import EMA
from gai_yolo.errors import CheckpointError

CHECKPOINT_FORMAT = 4
"""Version of the checkpoint's layout; raised when an older program could not continue from it."""


LOSSES = ("total", "box", "cls", "dfl")


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
        row = self.history[-1] if self.history else {}
        return {
            "format": CHECKPOINT_FORMAT,
            "model_state_dict": self.model.state_dict(),
            "ema_state_dict": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "samples": self.samples,
            "best_metric": self.best_metric,
            "best_since": self.best_since,
            "history": self.history,
            "progress": asdict(self.progress),
            "gradient_exponents": self.gradient_exponents,
            "bad_in_row": self.bad_in_row,
            "train_loss": row.get("train_loss"),
            "val_loss": row.get("val_loss"),
        }

    def apply(self, saved: dict[str, Any]) -> None:
        """Become the captured state.

        Raises:
            CheckpointError: a part is missing or belongs to another model or optimizer.
        """
        try:
            self.model.load_state_dict(saved["model_state_dict"])
            self.ema.model.load_state_dict(saved["ema_state_dict"])
            self.ema.updates = int(saved["ema_updates"])
            _check_same_kind(self.optimizer, saved["optimizer_state_dict"])
            self.optimizer.load_state_dict(saved["optimizer_state_dict"])
            if self.scaler.is_enabled() and saved["scaler_state_dict"]:
                self.scaler.load_state_dict(saved["scaler_state_dict"])
            self.epoch, self.step, self.samples = int(saved["epoch"]), int(saved["step"]), int(saved["samples"])
            self.best_metric = saved["best_metric"]
            self.best_since = int(saved.get("best_since", -1))  # not in those of older versions, which knew one validation set
            self.history = list(saved["history"])
            self.progress = Progress(**saved["progress"])
            exponents = saved["gradient_exponents"]
            self.gradient_exponents = None if exponents is None else [int(exponent) for exponent in exponents]
            self.bad_in_row = int(saved["bad_in_row"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the checkpoint does not fit this model and optimizer ({reason}).") from None


def _check_same_kind(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """torch loads AdamW's state into SGD without a word; their groups have other settings."""
    for own, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if own.keys() != other.keys():
            raise ValueError("it was written by another kind of optimizer")
