"""Layers that are not trained, for a number of epochs or for the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from gai_yolo.detector import YOLO12
from gai_yolo.errors import ConfigError
from gai_yolo.sections import ModelConfig


@dataclass(frozen=True)
class Freezing:
    """Which parameters are left as they are, as a function of the epoch."""

    names: frozenset[str] = frozenset()
    """Of parameters, as in the state dict."""
    epochs: int | None = None
    """In so many first epochs; None: in all."""

    def in_epoch(self, epoch: int) -> frozenset[str]:
        """Names of the frozen parameters in an epoch (1-based)."""
        return self.names if self.epochs is None or epoch <= self.epochs else frozenset()


def freezing_of(config: ModelConfig, model: YOLO12) -> Freezing:
    """What `model.freeze` means for a network.

    Raises:
        ConfigError: a pattern fits nothing, or nothing would be left to train.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    patterns = [f"model.{layer}" for layer in range(config.freeze)] if isinstance(config.freeze, int) else config.freeze
    names: set[str] = set()
    for pattern in patterns:
        found = {name for name in trained if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found and not isinstance(config.freeze, int):  # some layers have no parameters
            raise ConfigError(
                f"model.freeze: {pattern!r} fits no parameter of YOLO12-{model.size}; such names are {trained[0]}, {trained[-1]}."
            )
        names |= found
    if names.issuperset(trained):
        raise ConfigError("model.freeze: leaves nothing to train; freeze fewer of the network's 22 layers.")
    return Freezing(frozenset(names), config.freeze_epochs)


def frozen_norms(model: nn.Module, frozen: frozenset[str]) -> dict[str, nn.BatchNorm2d]:
    """BatchNorm layers by name all of whose parameters are frozen: they use the statistics that they have, and gather none."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return {name: norm for name, norm in norms.items() if frozen.issuperset(f"{name}.{one}" for one, _ in norm.named_parameters())}
