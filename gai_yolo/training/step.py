"""One optimizer step over the global batch, whatever the number of ranks and micro-batches."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.data.dataset import Batch
from gai_yolo.detector.loss import DetectionLoss, normalised
from gai_yolo.detector.network import autocast, to_input
from gai_yolo.distributed.exact_sum import NO_EXPONENT, ExactSum, GradientSum, exponents_of, followed, is_too_coarse
from gai_yolo.distributed.world import World
from gai_yolo.errors import Stop
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.batchnorm import RunningStatistics
from gai_yolo.training.freezing import Freezing, frozen_norms
from gai_yolo.training.optimizer import OptimizerSchedule, set_rates

NUM_LOSSES = 4
"""Numbers in `LossSums.detached()`; the last is the target scores."""
ABOVE, SAVING, LEAVING = 0, 1, 2
"""Places of the counts that travel with the sums: a gradient was above what was expected; a rank wants the state saved, or has to
leave."""
NUM_COUNTS = 3


class WentBad(Stop):
    """Too many steps in a row had no finite loss or gradient; the run is to go back to its last good state."""


@dataclass(frozen=True)
class StepRequests:
    """What this rank wants all to do after the step."""

    save: bool = False
    """Compare and save the state."""
    leave: bool = False
    """Save it and end, because this rank has to."""


NO_REQUESTS = StepRequests()
NOTHING_FROZEN = Freezing()


@dataclass(frozen=True)
class StepResult:
    """What a step reports: the same on every rank."""

    losses: dict[str, float] | None
    """box, cls, dfl of the global batch, normalised by its target scores, and their sum `total`; None if they or the gradient are not
    finite and the step was passed over."""
    learning_rate: float
    requests: StepRequests
    """Of all ranks together."""
    measured: bool
    """Whether the gradients were measured before they were added up: in a run's first step, and after a jump."""


class TrainingStep:
    """Forward, backward, reduction, clipping, optimizer and EMA update.

    The gradient is that of the global batch's loss times its number of samples: un-normalised gradients are summed over
    micro-batches and ranks and then divided once by the target scores of the whole batch. With `training.exact` the sum is
    order-invariant (`distributed.exact_sum`), so no bit depends on who computed which micro-batch. Losses and BatchNorm's statistics
    are always summed so.

    Args:
        state: holds model, EMA, optimizer and scaler, all changed by each step.
        schedule: learning rate and momentum of each step.
        freezing: which parameters are left as they are.
    """

    def __init__(
        self,
        state: TrainingState,
        loss: DetectionLoss,
        schedule: OptimizerSchedule,
        world: World,
        config: TrainingConfig,
        freezing: Freezing = NOTHING_FROZEN,
    ) -> None:
        self.state, self.loss, self.schedule, self.world, self.config = state, loss, schedule, world, config
        self.freezing = freezing
        self._all = {name: parameter for name, parameter in state.model.named_parameters() if parameter.requires_grad}
        self._train_but(freezing.in_epoch(state.epoch + 1))

    def begin_epoch(self, epoch: int) -> None:
        """Train the layers that are to be trained in an epoch (1-based). A collective where others were before."""
        frozen = self.freezing.in_epoch(epoch)
        if frozen != self._frozen:
            self._train_but(frozen)
        self.state.model.train()
        for norm in frozen_norms(self.state.model, frozen).values():
            norm.eval()

    def _train_but(self, frozen: frozenset[str]) -> None:
        """Frozen parameters get no gradient, and so the optimizer passes them over; what they are added up with has no place for them."""
        self._frozen = frozen
        self.model: nn.Module = self.state.model  # and no longer what was wrapped around it for others
        for name, parameter in self._all.items():
            parameter.grad = None
            parameter.requires_grad_(name not in frozen)
        self.parameters = [parameter for parameter in self._all.values() if parameter.requires_grad]
        self.gradients = GradientSum(self.parameters, self.world.world_size) if self.config.exact else None
        if self.world.world_size > 1:
            self.model = _parallel(self.state.model, self.world.device, self.gradients)
        self.statistics = RunningStatistics(self.state.model, frozen_norms(self.state.model, frozen))

    def __call__(
        self,
        micro_batches: Sequence[Batch],
        num_micro_batches: int,
        num_samples: int,
        image_size: int,
        requests: StepRequests = NO_REQUESTS,
    ) -> StepResult:
        """Train on this rank's part of one global batch.

        Args:
            micro_batches: of this rank; may be empty.
            num_micro_batches, num_samples: of the global batch.
            image_size: side of the network's input, in pixels; images of another size are resized.
            requests: of this rank.

        Raises:
            WentBad: the loss or the gradient was not finite in more than `max_bad_steps` steps in a row.
        """
        with self.state.changing:
            learning_rate = set_rates(self.state.optimizer, self.schedule, self.state.step)
            self.statistics.begin_step()
        known = self._known_exponents()
        exponents = known or self._measure(micro_batches, image_size)
        sums, norms = self._accumulate(micro_batches, num_micro_batches, image_size, exponents, requests)
        measured = self.gradients is not None and known is None
        if not measured and self._is_out_of_range(sums, norms):
            # All ranks see it alike, and it does not depend on who computed what: each micro-batch has the same limits.
            measured, exponents = True, self._measure(micro_batches, image_size)
            sums, norms = self._accumulate(micro_batches, num_micro_batches, image_size, exponents, requests)
        losses = None
        with self.state.transition():
            if self._is_usable(sums, norms):
                losses = self._advance(sums, norms, num_micro_batches, num_samples)
            else:
                self.statistics.pass_over(self.state.step + 1)
                self.state.advance(num_samples, None)
        if self.state.bad_in_row > self.config.max_bad_steps:
            raise WentBad(
                f"the loss or the gradient was not finite in {self.state.bad_in_row} steps in a row, up to step {self.state.step}"
            )
        return StepResult(losses, learning_rate, StepRequests(sums.counts[SAVING] > 0, sums.counts[LEAVING] > 0), measured)

    def boundary(self) -> dict[str, Any]:
        """The state after the last completed step, as `TrainingState.capture` gives it, also in the middle of the next one and from
        another thread; to be called with `state.changing` held."""
        content = self.state.capture()
        return {**content, "model_state_dict": self.statistics.before_step(content["model_state_dict"], self.state.step)}

    def _advance(self, sums: ExactSum, norms: Tensor, num_micro_batches: int, num_samples: int) -> dict[str, float]:
        """Let the sums change the state; returns the losses."""
        losses, statistics = torch.split(sums.result(), [NUM_LOSSES, self.statistics.size])
        factor = num_samples / max(losses[-1].item(), 1.0)
        # Plain DDP averages over ranks.
        self._update(norms, factor if self.gradients else factor * self.world.world_size)
        self.statistics.end_step(statistics / num_micro_batches, self.state.step + 1)
        self.state.ema.update(self.state.model)
        means = normalised(losses)
        self.state.advance(num_samples, means)
        return means

    def _accumulate(
        self, micro_batches: Sequence[Batch], num_micro_batches: int, image_size: int, exponents: Sequence[int], requests: StepRequests
    ) -> tuple[ExactSum, Tensor]:
        """Gradients of un-normalised losses and the sums of everything else, over all micro-batches and ranks; returns these sums
        and the gradients' norms `(P,)`, without the loss scale."""
        device = self.world.device
        sums = ExactSum(NUM_LOSSES + self.statistics.size, NUM_COUNTS, num_micro_batches, device)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.gradients:
            self.gradients.begin(exponents, num_micro_batches, self.state.scaler.get_scale())
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else contextlib.nullcontext():
                losses = self._forward_backward(self.model, batch.to(device).resized(image_size))
            sums.add(torch.cat((losses, self.statistics.end_micro_batch())))
            if self.gradients and not (last and self.world.world_size > 1):
                self.gradients.take()
        if not micro_batches:
            # Every rank must take part in the reduction: a blank image that adds nothing.
            if self.gradients:
                self.gradients.ignore_next()
            self._forward_backward(self.model, _blank(image_size, device), weight=0.0)
            self.statistics.end_micro_batch()
        wished = torch.tensor([requests.save, requests.leave], device=device)
        sums.count(torch.cat((self.gradients.above if self.gradients else torch.zeros_like(wished[:1]), wished)))
        sums.reduce(self.world.sum)
        if self.gradients:
            self.gradients.finish()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) / self.state.scaler.get_scale()
        # What did not fit into the sum is some number in it.
        return sums, norms if not sums.counts[ABOVE] else norms.fill_(torch.inf)

    def _is_out_of_range(self, sums: ExactSum, norms: Tensor) -> bool:
        """Whether the gradients are not what was expected, so that their sum is wrong, or worse than one in float32."""
        exponents = self._known_exponents()
        if exponents is None or not sums.is_finite:
            return False
        return sums.counts[ABOVE] > 0 or is_too_coarse(exponents, exponents_of(norms))

    def _known_exponents(self) -> list[int] | None:
        """What is expected of the gradient of each parameter that is trained now; None where nothing is known of any."""
        known = self.state.gradient_exponents
        if known is None:
            return None
        ours = [exponent for name, exponent in zip(self._all, known, strict=True) if name not in self._frozen]
        return None if set(ours) <= {NO_EXPONENT} else ours

    def _remember(self, exponents: Sequence[int] | None) -> None:
        """The same from the next step on; of frozen parameters remains known what was."""
        if exponents is None:
            return
        left, ours = iter(exponents), self.state.gradient_exponents or [NO_EXPONENT] * len(self._all)
        pairs = zip(self._all, ours, strict=True)
        self.state.gradient_exponents = [known if name in self._frozen else next(left) for name, known in pairs]

    def _measure(self, micro_batches: Sequence[Batch], image_size: int) -> list[int]:
        """The exponents of the largest element of each gradient over all micro-batches and ranks, which are the same in any
        order."""
        if self.gradients is None:
            return []
        largest = torch.zeros(len(self.parameters), device=self.world.device)
        for batch in micro_batches:
            self.state.optimizer.zero_grad(set_to_none=True)
            # Not through DDP, whose forward pass may need all ranks (it rebuilds its buckets once), and some may be idle.
            self._forward_backward(self.state.model, batch.to(self.world.device).resized(image_size))
            self.statistics.end_micro_batch()
            norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None], torch.inf))
            largest = torch.maximum(largest, norms.nan_to_num(nan=torch.inf))  # not every backend's maximum knows NaN
        return exponents_of(self.world.maximum(largest) / self.state.scaler.get_scale())

    def _forward_backward(self, model: nn.Module, batch: Batch, weight: float = 1.0) -> Tensor:
        """Adds to the gradients; returns the (4,) loss sums."""
        with autocast(self.world.device, self.config.amp):
            raw = model(to_input(batch.images, self.config.channels_last))
        height, width = batch.images.shape[-2:]
        part = self.loss(raw, height, width, batch.box_image, batch.classes, batch.boxes)
        self.state.scaler.scale(part.total * weight).backward()  # type: ignore[no-untyped-call]
        return part.detached()

    def _is_usable(self, sums: ExactSum, norms: Tensor) -> bool:
        """Whether losses and gradients are finite; the same on all ranks."""
        finite = bool(norms.isfinite().all())
        if sums.is_finite and not finite and self.state.scaler.is_enabled():
            # fp16's way of finding its loss scale: the scaler passes this step over and halves it.
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter.grad.fill_(torch.inf)
            return True
        return sums.is_finite and finite

    def _update(self, norms: Tensor, gradient_factor: float) -> None:
        self.state.scaler.unscale_(self.state.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, gradient_factor)
        total = torch.linalg.vector_norm(norms) * gradient_factor
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, total)
        if self.gradients:
            # What is kept of a spike is what the optimizer was given of it.
            given = norms * (self.config.clip_norm / total).clamp(max=1.0)
            self._remember(followed(self._known_exponents(), exponents_of(given)))
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()


def _parallel(model: nn.Module, device: torch.device, gradients: GradientSum | None) -> DistributedDataParallel:
    # Buffers are not broadcast: RunningStatistics makes them equal on all ranks. The option has a new name since torch 2.15.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    if device.type == "cuda":
        options["device_ids"] = [device]
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    if gradients:
        # DDP wants the types of a hook exactly so or not at all.
        parallel.register_comm_hook(None, lambda _, bucket: gradients.hook(bucket))
    return parallel


def _blank(image_size: int, device: torch.device) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    return Batch(images, none, none, torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3), none).to(device)
