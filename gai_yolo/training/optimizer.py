"""Optimizer, parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gai_yolo.sections import TrainingConfig

FEW_ITERATIONS = 10_000
"""`optimizer: auto` takes AdamW below this many steps."""


@dataclass(frozen=True)
class OptimizerSchedule:
    """The optimisation settings with every `auto` resolved."""

    optimizer: str
    lr: float
    momentum: float
    warmup_momentum: float
    weight_decay: float
    """Scaled with the batch."""
    final_lr_fraction: float
    cosine: bool
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step` (0-based): a linear rise, then a linear or cosine fall over the whole run."""
        progress = min(step / self.total_steps, 1.0)
        fall = (1 - math.cos(math.pi * progress)) / 2 if self.cosine else progress
        rate = self.lr * (1 - (1 - self.final_lr_fraction) * fall)
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate

    def momentum_at(self, step: int) -> float:
        """Momentum (AdamW: beta1) of step `step` (0-based)."""
        if step >= self.warmup_steps:
            return self.momentum
        start = min(self.warmup_momentum, self.momentum)
        return start + (self.momentum - start) * step / self.warmup_steps


def make_schedule(config: TrainingConfig, num_classes: int, steps_per_epoch: int) -> OptimizerSchedule:
    """Resolve every `auto` for a data set.

    Args:
        num_classes: enters AdamW's default learning rate, 0.002 x 5 / (4 + classes).
    """
    total_steps = config.epochs * steps_per_epoch
    name = choose_optimizer(config, total_steps)
    default_lr = 0.01 if name == "sgd" else round(0.002 * 5 / (4 + num_classes), 6)
    default_momentum = 0.937 if name == "sgd" else 0.9
    return OptimizerSchedule(
        optimizer=name,
        lr=default_lr if config.lr == "auto" else config.lr,
        momentum=default_momentum if config.momentum == "auto" else config.momentum,
        warmup_momentum=config.warmup_momentum,
        weight_decay=config.weight_decay * config.batch_size / 64,
        final_lr_fraction=config.final_lr_fraction,
        cosine=config.schedule == "cosine",
        warmup_steps=max(round(config.warmup_epochs * steps_per_epoch), config.warmup_iterations) if config.warmup_epochs else 0,
        total_steps=total_steps,
    )


def choose_optimizer(config: TrainingConfig, total_steps: int) -> Literal["sgd", "adamw"]:
    """What `optimizer: auto` means for a run of so many steps."""
    if config.optimizer != "auto":
        return config.optimizer
    return "adamw" if total_steps < FEW_ITERATIONS else "sgd"


def make_optimizer(model: nn.Module, schedule: OptimizerSchedule) -> Optimizer:
    """Two groups: convolution weights with decay; biases, norms and residual scales (all with one dimension) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=schedule.momentum > 0)
    return AdamW(groups, lr=schedule.lr, betas=(schedule.momentum, 0.999))


def set_rates(optimizer: Optimizer, schedule: OptimizerSchedule, step: int) -> float:
    """Set what step `step` (0-based) is to use, whatever a loaded optimizer state says; returns the learning rate."""
    rate, momentum = schedule.learning_rate(step), schedule.momentum_at(step)
    for group, weight_decay in zip(optimizer.param_groups, (schedule.weight_decay, 0.0), strict=True):
        group["lr"], group["weight_decay"] = rate, weight_decay
        if "momentum" in group:
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, group["betas"][1])
    return rate
