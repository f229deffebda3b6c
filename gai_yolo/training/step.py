"""One optimizer step over the global batch, whatever the number of ranks and micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gai_yolo.config import TrainingConfig
from gai_yolo.data.batch import Batch
from gai_yolo.detector.loss import DetectionLoss, normalised
from gai_yolo.detector.precision import autocast, to_input
from gai_yolo.elastic.process import World
from gai_yolo.errors import Refusal
from gai_yolo.training.optim import Recipe, set_rates
from gai_yolo.training.running_statistics import RunningStatistics
from gai_yolo.training.state import TrainingState


class Diverged(Refusal):
    """The loss is no longer a number; going on would only overwrite good weights."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports: the same on every rank."""

    losses: dict[str, float]
    """box, cls, dfl of the global batch, normalised by its target scores, and their sum `total`."""
    learning_rate: float


class TrainingStep:
    """Forward, backward, reduction, clipping, optimizer and EMA update.

    The gradient is that of the global batch's loss times its number of samples: un-normalised gradients are summed over
    micro-batches and ranks and then divided once by the target scores of the whole batch.

    Args:
        state: holds model, EMA, optimizer and scaler, all changed by each step.
        recipe: learning rate and momentum of each step.
    """

    def __init__(self, state: TrainingState, loss: DetectionLoss, recipe: Recipe, world: World, config: TrainingConfig) -> None:
        self.state, self.loss, self.recipe, self.world, self.config = state, loss, recipe, world, config
        self.model: nn.Module = state.model
        if world.world_size > 1:
            # Buffers are not broadcast: RunningStatistics makes them equal on all ranks.
            devices = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(state.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.statistics = RunningStatistics(state.model, world.sum)
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]

    def __call__(self, micro_batches: Sequence[Batch], num_micro_batches: int, num_samples: int, image_size: int) -> StepResult:
        """Train on this rank's part of one global batch.

        Args:
            micro_batches: of this rank; may be empty.
            num_micro_batches, num_samples: of the global batch.
            image_size: for the blank image of a rank without micro-batches.

        Raises:
            Diverged: the loss is not finite. Weights are unchanged.
        """
        learning_rate = set_rates(self.state.optimizer, self.recipe, self.state.step)
        self.statistics.begin_step()
        sums = self._backward(micro_batches, image_size)
        self.world.sum(sums)
        self._check_finite(sums)
        self._update(float(num_samples) * self.world.world_size / max(sums[3].item(), 1.0))
        self.statistics.end_step(num_micro_batches, self.state.step + 1)
        self.state.ema.update(self.state.model)
        self.state.advance(num_samples)
        return StepResult(normalised(sums), learning_rate)

    def _backward(self, micro_batches: Sequence[Batch], image_size: int) -> Tensor:
        """Gradients of un-normalised losses of all micro-batches, averaged over ranks; returns this rank's (4,) loss sums."""
        self.state.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(micro_batches, start=1):
            with self._reduction(on=number == len(micro_batches)):
                sums += self._forward_backward(batch.to(self.world.device), weight=1.0)
            self.statistics.end_micro_batch()
        if not micro_batches:
            # Every rank must take part in the reduction: a blank image with weight zero adds nothing.
            self._forward_backward(_blank(image_size, self.world.device), weight=0.0)
            self.statistics.end_micro_batch(counts=False)
        return sums

    def _forward_backward(self, batch: Batch, weight: float) -> Tensor:
        with autocast(self.world.device, self.config.amp):
            raw = self.model(to_input(batch.images, self.config.channels_last))
        height, width = batch.images.shape[-2:]
        part = self.loss(raw, height, width, batch.box_image, batch.classes, batch.boxes)
        self.state.scaler.scale(part.total * weight).backward()  # type: ignore[no-untyped-call]
        return part.detached()

    def _reduction(self, on: bool) -> contextlib.AbstractContextManager[None]:
        if on or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _check_finite(self, sums: Tensor) -> None:
        if not bool(sums.isfinite().all()):
            raise Diverged(
                f"the loss is not finite at step {self.state.step + 1}; the newest checkpoint is untouched: "
                "lower training.lr or set training.amp: none, and start again."
            )

    def _update(self, gradient_factor: float) -> None:
        self.state.scaler.unscale_(self.state.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, gradient_factor)
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()


def _blank(image_size: int, device: torch.device) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    return Batch(images, none, none, torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3), none).to(device)
