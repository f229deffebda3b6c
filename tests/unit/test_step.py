"""One optimizer step is the step of the global batch, however it is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gai_yolo.checkpointing.digest import part_digests
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.data.dataset import Batch
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.world import World
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.optimizer import OptimizerSchedule, make_schedule
from gai_yolo.training.step import NO_REQUESTS, StepRequests, TrainingStep, WentBad

MakeState = Callable[..., TrainingState]
MakeBatch = Callable[[int, Sequence[int]], Batch]

SAMPLES = (1, 2, 3, 4, 5, 6, 7)
"""Samples 3 and 6 of `make_batch` have no boxes."""


def config_of(**settings: Any) -> TrainingConfig:
    """SGD without warm-up, decay and clipping: the change of a weight is the gradient times a known factor."""
    plain = {
        "optimizer": "sgd",
        "epochs": 10,
        "lr": 3e-4,
        "weight_decay": 0.0,
        "clip_norm": 1e9,
        "warmup_epochs": 0,
        "channels_last": False,
    }
    return TrainingConfig.model_validate({**plain, **settings})


def frozen_norms(state: TrainingState, batch: Batch) -> TrainingState:
    """Training mode, but every BatchNorm stays at the statistics of a batch: images do not see each other."""
    norms = [module for module in state.model.modules() if isinstance(module, nn.BatchNorm2d)]
    state.model.train()
    for norm in norms:
        norm.momentum = 1.0
    state.model(batch.images.float() / 255)
    for norm in norms:
        norm.eval()
    return state


def make_step(state: TrainingState, world: World, config: TrainingConfig) -> tuple[TrainingStep, OptimizerSchedule]:
    schedule = make_schedule(config, 3, 10)
    return TrainingStep(state, DetectionLoss(), schedule, world, config), schedule


def weights(state: TrainingState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def change(state: TrainingState, before: dict[str, Tensor]) -> Tensor:
    """What the step did to all weights, in one row."""
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in state.model.named_parameters()])


def stepped(
    make_state: MakeState, make_batch: MakeBatch, world: World, cut: Sequence[Sequence[int]], **settings: Any
) -> tuple[Tensor, Any]:
    """Change of the weights, and result, of one step over SAMPLES in the given micro-batches."""
    config = config_of(**settings)
    state = frozen_norms(make_state(), make_batch(0, SAMPLES))
    state.model.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    before = weights(state)
    step, _ = make_step(state, world, config)
    result = step([make_batch(0, part) for part in cut], len(cut), len(SAMPLES), 64)
    return change(state, before), result


HALVES, UNEVEN = [SAMPLES[:4], SAMPLES[4:]], [SAMPLES[:2], SAMPLES[2:4], SAMPLES[4:]]
SINGLE = [(sample,) for sample in SAMPLES]
TORCH_BUG = "torch's BatchNorm on the CPU mistakes the layout of a single image's gradient"


@pytest.mark.parametrize("cut", [HALVES, UNEVEN, SINGLE], ids=["halves", "uneven", "single"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_micro_batches_do_not_change_the_gradient(
    channels_last: bool,
    cut: Sequence[Sequence[int]],
    make_state: MakeState,
    make_batch: MakeBatch,
    world: World,
    request: pytest.FixtureRequest,
) -> None:
    """Loss: a smaller GPU trains with another effective batch or learning rate; images without boxes tip the scale."""
    if cut is SINGLE and not channels_last:
        request.applymarker(pytest.mark.xfail(strict=True, reason=TORCH_BUG))
    whole, result = stepped(make_state, make_batch, world, [SAMPLES], channels_last=channels_last)
    split, split_result = stepped(make_state, make_batch, world, cut, channels_last=channels_last)
    assert whole.abs().max() > 1e-2, "the step is large enough to see a difference"
    assert (whole - split).abs().max() < 1e-5
    assert (whole - split).norm() / whole.norm() < 1e-4, "nor do small gradients differ"
    assert split_result.losses == pytest.approx(result.losses, rel=1e-5)


def test_the_step_is_that_of_the_documented_loss(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: a factor (samples, target scores, micro-batches) lost or applied twice, hidden by clipping."""
    split, result = stepped(make_state, make_batch, world, [SAMPLES[:3], SAMPLES[3:]])
    batch = make_batch(0, SAMPLES)
    state = frozen_norms(make_state(), batch)
    sums = DetectionLoss()(state.model(batch.images.float() / 255), 64, 64, batch.box_image, batch.classes, batch.boxes)
    loss = sums.total / sums.target_scores.clamp(min=1)
    (loss * len(SAMPLES)).backward()
    gradient = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in state.model.parameters()])
    expected = -3e-4 * (1 + 0.937) * gradient  # the first step of Nesterov's momentum
    assert (split - expected).norm() / expected.norm() < 1e-3
    assert result.losses["total"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.losses["total"] == pytest.approx(result.losses["box"] + result.losses["cls"] + result.losses["dfl"])
    assert result.learning_rate == pytest.approx(3e-4)


def test_gradients_of_an_earlier_step_are_not_added(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: every step also repeats all steps before it."""
    state = frozen_norms(make_state(), make_batch(0, SAMPLES))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weights(state)
    make_step(state, world, config_of())[0]([make_batch(0, SAMPLES)], 1, len(SAMPLES), 64)
    clean, _ = stepped(make_state, make_batch, world, [SAMPLES])
    assert torch.equal(change(state, before), clean)


def test_the_norm_of_the_whole_gradient_is_clipped(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: one odd batch throws the weights away; or each micro-batch is clipped by itself, which is another gradient."""
    free, clipped = (stepped(make_state, make_batch, world, HALVES, lr=1.0, clip_norm=norm)[0].double() for norm in (1e9, 0.5))
    assert free.norm() > 10
    assert clipped.norm().item() == pytest.approx(0.5 * (1 + 0.937), rel=1e-3)
    assert torch.nn.functional.cosine_similarity(free, clipped, dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_a_batch_without_any_box_is_a_step(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: a division by zero target scores on background images."""
    state = make_state()
    state.model.train()
    result = make_step(state, world, config_of())[0]([make_batch(0, (3, 6))], 1, 2, 64)
    assert result.losses is not None
    assert result.losses["box"] == result.losses["dfl"] == 0.0
    assert result.losses["cls"] > 0
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_a_step_counts_itself_and_its_samples(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: learning rate, EMA and curves that lag behind the steps; counters that depend on the micro-batches."""
    state = make_state()
    state.model.train()
    step, schedule = make_step(state, world, config_of(warmup_epochs=3))
    for number in range(3):
        result = step([make_batch(number, (1, 2)), make_batch(number, (3,)), make_batch(number, (4,))], 3, 4, 64)
        assert result.learning_rate == schedule.learning_rate(number)
        assert (state.step, state.samples, state.ema.updates) == (number + 1, 4 * (number + 1), number + 1)
        for model in (state.model, state.ema.model):
            counters = {b.item() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
            assert counters == {number + 1}


def test_running_statistics_are_the_mean_over_the_micro_batches_of_the_step(
    make_state: MakeState, make_batch: MakeBatch, world: World
) -> None:
    """Loss: a step that forgets the statistics of all micro-batches but the last, and shows it in evaluation only."""
    name = "model.3.bn.running_mean"

    def statistics(cut: Sequence[Sequence[int]]) -> Tensor:
        state = make_state()
        state.model.train()
        make_step(state, world, config_of(lr=1e-12))[0]([make_batch(0, part) for part in cut], len(cut), 4, 64)
        buffer: Tensor = state.model.state_dict()[name]
        return buffer.clone()

    together, first, second = statistics([(1, 2), (4, 5)]), statistics([(1, 2)]), statistics([(4, 5)])
    torch.testing.assert_close(together, (first + second) / 2, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(together, first, atol=1e-4)


class PoisonedLoss(DetectionLoss):
    """A loss that is no number for the second of three micro-batches."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        sums = super().__call__(*arguments)
        return sums if self.calls % 3 != 2 else type(sums)(sums.box * self.value, sums.cls, sums.dfl, sums.target_scores)


def assert_passed_over(state: TrainingState, before: dict[str, Any], samples: int) -> None:
    """Everything is as it was, but for the counts of steps."""
    after = state.capture()
    for part in ("model_state_dict", "ema_state_dict"):
        for name, tensor in after[part].items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor, before[part][name]), name
    counters = [tensor for name, tensor in after["model_state_dict"].items() if name.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {state.step}
    assert after["optimizer_state_dict"]["state"] == before["optimizer_state_dict"]["state"]
    assert (state.step, state.samples, state.ema.updates) == (before["step"] + 1, before["samples"] + samples, before["ema_updates"])
    assert state.progress.bad_steps == before["progress"]["bad_steps"] + 1 and state.bad_in_row == before["bad_in_row"] + 1
    assert state.progress.losses == before["progress"]["losses"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_passed_over_and_leaves_the_weights(
    value: float, make_state: MakeState, make_batch: MakeBatch, world: World
) -> None:
    """Loss: weights full of NaN, and the checkpoint that is written from them over the good ones."""
    state = make_state()
    state.model.train()
    config = config_of(lr=0.01)
    loss = PoisonedLoss(value)
    step = TrainingStep(state, loss, make_schedule(config, 3, 10), world, config)
    before = copy.deepcopy(state.capture())
    result = step([make_batch(0, (1, 2)), make_batch(0, (4,)), make_batch(0, (5,))], 3, 4, 64)
    assert loss.calls == 6, "measured, then summed"
    assert result.losses is None
    assert_passed_over(state, before, 4)


# --- the exact sum ---------------------------------------------------------------------------------------------------------


def test_exact_and_plain_gradients_agree_to_rounding(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: a scale or a micro-batch lost in the order-invariant sum."""
    exact, exact_result = stepped(make_state, make_batch, world, UNEVEN, channels_last=True)
    plain, plain_result = stepped(make_state, make_batch, world, UNEVEN, channels_last=True, exact=False)
    assert (exact - plain).norm() / plain.norm() < 1e-6
    assert exact_result.losses == plain_result.losses and exact_result.measured and not plain_result.measured


def test_the_order_of_micro_batches_leaves_no_trace(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: as if another rank had been faster."""
    one, result = stepped(make_state, make_batch, world, UNEVEN, channels_last=True)
    other, other_result = stepped(make_state, make_batch, world, UNEVEN[::-1], channels_last=True)
    assert torch.equal(one, other) and result.losses == other_result.losses
    plain, plain_other = (stepped(make_state, make_batch, world, cut, channels_last=True, exact=False)[0] for cut in (UNEVEN, UNEVEN[::-1]))
    assert not torch.equal(plain, plain_other), "the order matters where nothing is done about it"


def three_steps(state: TrainingState, make_batch: MakeBatch, world: World, before_step: Callable[[int], None]) -> list[bool]:
    """Whether the gradients were measured in each of three steps."""
    state.model.train()
    step, _ = make_step(state, world, config_of(lr=1e-5))
    measured = []
    for number in range(3):
        before_step(number)
        measured.append(step([make_batch(number, (1, 2, 4)), make_batch(number, (5, 7, 8))], 2, 6, 64).measured)
    return measured


def test_a_jump_of_the_gradients_is_measured_and_costs_no_bit(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: an int64 that overflowed, silently; or a run that stops where another would go on."""
    calm, surprised = make_state(), make_state()
    # In the second step a branch that had no objects in the first gets its first gradient, a small one.
    assert three_steps(calm, make_batch, world, lambda _: None) == [True, True, False]

    def forget(number: int) -> None:
        if number == 2:
            surprised.gradient_exponents = [-40] * len(calm.gradient_exponents or [])

    assert three_steps(surprised, make_batch, world, forget) == [True, True, True]
    for (name, a), b in zip(calm.model.named_parameters(), surprised.model.parameters(), strict=True):
        # Another quantum, so other roundings, but each of them below float32's own.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


class BadGradient(torch.autograd.Function):
    """Changes nothing on the way forward and spoils the way back."""

    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Any:
        return gradients[0] * float("nan")


class BadBackward(DetectionLoss):
    """A finite loss whose gradient is no number."""

    def __call__(self, *arguments: Any) -> Any:
        sums = super().__call__(*arguments)
        spoil: Any = BadGradient.apply
        return type(sums)(spoil(sums.box), sums.cls, sums.dfl, sums.target_scores)


def test_a_gradient_that_is_no_number_is_passed_over_until_there_are_too_many(
    make_state: MakeState, make_batch: MakeBatch, world: World
) -> None:
    """Loss: a finite loss above weights full of NaN; or a run that passes over every step and calls itself trained."""
    state = make_state()
    state.model.train()
    config = config_of(max_bad_steps=2)
    step = TrainingStep(state, BadBackward(), make_schedule(config, 3, 10), world, config)
    for _ in range(2):
        before = copy.deepcopy(state.capture())
        assert step([make_batch(0, (1, 2))], 1, 2, 64).losses is None
        assert_passed_over(state, before, 2)
    with pytest.raises(WentBad, match="not finite in 3 steps in a row, up to step 3"):
        step([make_batch(0, (1, 2))], 1, 2, 64)


def test_a_good_step_ends_the_row_of_bad_ones(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: a long run is sent back because of bad steps that have nothing to do with each other."""
    state = make_state()
    state.model.train()
    config = config_of(max_bad_steps=1)
    good, bad = (TrainingStep(state, loss, make_schedule(config, 3, 10), world, config) for loss in (DetectionLoss(), BadBackward()))
    for step in (bad, good, bad, good):
        step([make_batch(0, (1, 2))], 1, 2, 64)
    assert (state.step, state.bad_in_row, state.progress.bad_steps) == (4, 0, 2)


class Interrupted(DetectionLoss):
    """The second micro-batch of the second step never ends."""

    calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == 6:  # the first step is measured before it is summed
            raise RuntimeError("a peer is gone")
        return super().__call__(*arguments)


def test_the_last_whole_steps_state_can_be_had_in_the_middle_of_the_next(
    make_state: MakeState, make_batch: MakeBatch, world: World
) -> None:
    """Loss: what a rank saves when its peers are dead is half of one step and half of another."""
    state = make_state()
    state.model.train()
    config = config_of()
    step = TrainingStep(state, Interrupted(), make_schedule(config, 3, 10), world, config)
    batches = [make_batch(0, (1, 2)), make_batch(0, (4, 5))]
    step(batches, 2, 4, 64)
    whole = part_digests(copy.deepcopy({**step.boundary()}))
    with pytest.raises(RuntimeError, match="a peer is gone"):
        step(batches, 2, 4, 64)
    assert part_digests(state.capture())["batch_norm"] != whole["batch_norm"], "it is in mid-step indeed"
    interrupted = part_digests(step.boundary())
    # The learning rate of a step is set at its beginning and is a function of the step.
    assert {part: interrupted[part] for part in whole if part != "optimizer"} == {p: d for p, d in whole.items() if p != "optimizer"}


def test_a_loss_scale_that_is_too_large_is_halved_and_the_step_passed_over(
    make_state: MakeState, make_batch: MakeBatch, world: World
) -> None:
    """Loss: fp16's way of finding its loss scale would stop the run."""
    state = make_state()
    state.model.train()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    config = config_of()
    before = weights(state)
    TrainingStep(state, BadBackward(), make_schedule(config, 3, 10), world, config)([make_batch(0, (1, 2))], 1, 2, 64)
    assert state.scaler.get_scale() == 2.0**9 and state.step == 1
    assert not change(state, before).any()
    result = TrainingStep(state, DetectionLoss(), make_schedule(config, 3, 10), world, config)([make_batch(0, (1, 2))], 1, 2, 64)
    assert change(state, before).any() and result.losses is not None and result.losses["total"] > 0


def test_a_step_tells_what_any_rank_wishes(make_state: MakeState, make_batch: MakeBatch, world: World) -> None:
    """Loss: a state is saved that was not compared; or one rank leaves and the others wait for it."""
    state = make_state()
    state.model.train()
    step, _ = make_step(state, world, config_of())
    requests = [NO_REQUESTS, StepRequests(save=True), StepRequests(leave=True), StepRequests(save=True, leave=True)]
    assert [step([make_batch(0, (1, 2))], 1, 2, 64, wish).requests for wish in requests] == requests
