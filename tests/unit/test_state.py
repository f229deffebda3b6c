"""What is saved is all that training depends on."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT, FIELDS, TrainingState
from gai_yolo.data.dataset import Batch
from gai_yolo.detector.ema import EMA
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.exact_sum import ExactSum
from gai_yolo.distributed.world import World
from gai_yolo.errors import CheckpointError
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.batchnorm import RunningStatistics
from gai_yolo.training.optimizer import make_schedule
from gai_yolo.training.step import TrainingStep

MakeState = Callable[..., TrainingState]
MakeBatch = Callable[[int, Sequence[int]], Batch]


def through_a_file(captured: dict[str, Any]) -> dict[str, Any]:
    """What a later process reads."""
    file = io.BytesIO()
    torch.save(captured, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_equal(a: Any, b: Any, where: str = "state") -> None:
    """Equality to the last bit, all the way down."""
    assert type(a) is type(b) or {type(a), type(b)} <= {dict, type(nn.Module().state_dict())}, where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{number}]")
    else:
        assert a == b, where


def train(state: TrainingState, world: World, make_batch: MakeBatch, steps: range, optimizer: str) -> None:
    """Steps of two micro-batches each; the data depends on the step's number only."""
    config = TrainingConfig.model_validate({"optimizer": optimizer, "epochs": 10, "ema_tau": 5.0, "lr": 0.001, "channels_last": False})
    state.model.train()
    step = TrainingStep(state, DetectionLoss(), make_schedule(config, 3, 10), world, config)
    for number in steps:
        step([make_batch(number, (1, 2)), make_batch(number, (3, 4))], 2, 4, 64)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_applying_what_was_captured_restores_every_part(optimizer: str, world: World, make_state: MakeState, make_batch: MakeBatch) -> None:
    """Loss: a part of the state that starts anew after every interruption."""
    state = make_state(optimizer)
    train(state, world, make_batch, range(2), optimizer)
    state.epoch, state.best_metric = 3, 0.25
    state.history = [{"epoch": 1, "train_loss": 5.0, "val_loss": None}, {"epoch": 2, "train_loss": 4.5, "mAP50-95": 0.25}]
    saved = through_a_file(state.capture())
    other = make_state(optimizer, seed=1)
    other.apply(copy.deepcopy(saved))
    assert_equal(other.capture(), saved)
    state.apply(state.capture())
    assert_equal(state.capture(), saved, "applied to itself")
    assert (other.epoch, other.step, other.samples, other.best_metric, other.ema.updates) == (3, 2, 8, 0.25, 2)
    assert other.gradient_exponents == state.gradient_exponents and len(set(state.gradient_exponents or [])) > 3
    assert other.history == state.history


@pytest.mark.parametrize(("optimizer", "moments"), [("sgd", {"momentum_buffer"}), ("adamw", {"exp_avg", "exp_avg_sq", "step"})])
def test_capture_holds_what_the_optimizer_remembers(
    optimizer: str, moments: set[str], world: World, make_state: MakeState, make_batch: MakeBatch
) -> None:
    """Loss: momentum lost at every interruption, a bump in the loss that nobody can explain."""
    state = make_state(optimizer)
    train(state, world, make_batch, range(1), optimizer)
    captured = state.capture()
    trained = [p for p in state.model.parameters() if p.requires_grad]
    assert len(captured["optimizer_state_dict"]["state"]) == len(trained)
    assert all(moments <= entry.keys() for entry in captured["optimizer_state_dict"]["state"].values())
    assert captured["format"] == CHECKPOINT_FORMAT
    assert not torch.equal(captured["model_state_dict"]["model.0.conv.weight"], captured["ema_state_dict"]["model.0.conv.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_continuing_from_a_checkpoint_equals_not_stopping(
    optimizer: str, world: World, make_state: MakeState, make_batch: MakeBatch
) -> None:
    """Loss: an interruption that leaves a trace in the weights: law 1 of this project."""
    whole, saved = make_state(optimizer), []
    for step in range(4):
        saved.append(through_a_file(whole.capture()))
        train(whole, world, make_batch, range(step, step + 1), optimizer)
    unbroken = make_state(optimizer)
    train(unbroken, world, make_batch, range(4), optimizer)
    assert_equal(unbroken.capture(), whole.capture(), "saving changes nothing")
    for cut, one in enumerate(saved):
        second = make_state(optimizer, seed=99)
        second.apply(one)
        train(second, world, make_batch, range(cut, 4), optimizer)
        assert_equal(second.capture(), whole.capture(), f"continued after {cut} steps")


def test_applied_state_shares_nothing_with_its_history(make_state: MakeState) -> None:
    """Loss: rows appended to two lists at once."""
    state, other = make_state(), make_state()
    state.history = [{"epoch": 1}]
    other.apply(state.capture())
    other.history.append({"epoch": 2})
    assert state.history == [{"epoch": 1}]


def test_capture_shows_the_losses_of_the_last_row(make_state: MakeState) -> None:
    """Loss: readers of a checkpoint have to know where the losses are hidden."""
    state = make_state()
    assert (state.capture()["train_loss"], state.capture()["val_loss"]) == (None, None)
    state.history = [{"train_loss": 9.0, "val_loss": 8.0}, {"train_loss": 2.0, "val_loss": 3.0}]
    assert (state.capture()["train_loss"], state.capture()["val_loss"]) == (2.0, 3.0)


@pytest.mark.parametrize("missing", [field.name for field in FIELDS if field.is_required])
def test_checkpoint_without_a_part_is_refused(missing: str, make_state: MakeState) -> None:
    """Loss: a run that goes on with half of its state as if nothing was missing."""
    saved = make_state().capture()
    del saved[missing]
    with pytest.raises(CheckpointError, match=missing):
        make_state().apply(saved)


def test_checkpoint_of_an_older_version_is_gone_on_from(make_state: MakeState) -> None:
    """Loss: an update of this program ends every run; or the list of what older ones must have grows without a word."""
    saved, state = make_state().capture(), make_state()
    for field in FIELDS:
        if not field.is_required:
            del saved[field.name]
    assert saved.keys() == {
        *("format", "model_state_dict", "ema_state_dict", "ema_updates", "optimizer_state_dict", "scaler_state_dict", "epoch", "step"),
        *("samples", "best_metric", "history", "progress", "gradient_exponents", "bad_in_row"),
    }, "what version 4 has always written"
    state.apply(saved)
    assert state.best_since == -1


def test_checkpoint_of_another_model_is_refused(make_state: MakeState) -> None:
    """Loss: a traceback of a hundred lines of tensor names."""
    with pytest.raises(CheckpointError, match="does not fit") as refused:
        make_state(num_classes=5).apply(make_state(num_classes=3).capture())
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("was", "now"),
    [("sgd", "adamw"), ("adamw", "sgd")],
)
def test_checkpoint_of_another_optimizer_is_refused(was: str, now: str, world: World, make_state: MakeState, make_batch: MakeBatch) -> None:
    """Loss: with `optimizer: auto` a run that is made longer goes on with AdamW's memory in SGD, and dies in its first step."""
    state = make_state(was)
    train(state, world, make_batch, range(1), was)
    with pytest.raises(CheckpointError):
        make_state(now).apply(through_a_file(state.capture()))


# --- the moving average ----------------------------------------------------------------------------------------------------


def test_average_follows_the_published_formula(make_state: MakeState) -> None:
    """Loss: the first evaluations show the random start weights, or no smoothing at all."""
    model = make_state().model
    ema = EMA(model, decay=0.9, tau=3.0)
    name = "model.4.cv2.conv.weight"
    expected = model.state_dict()[name].double()
    for update in range(1, 6):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(tensor + update)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-update / 3.0))
        expected = decay * expected + (1 - decay) * model.state_dict()[name].double()
        torch.testing.assert_close(ema.model.state_dict()[name].double(), expected, atol=1e-5, rtol=1e-6)
    assert ema.updates == 5


def test_average_takes_statistics_in_and_copies_counters(make_state: MakeState) -> None:
    """Loss: averaged weights evaluated with the BatchNorm statistics of the start, or half a count."""
    model = make_state().model
    ema = EMA(model, decay=0.5, tau=1e-6)
    for name, buffer in model.named_buffers():
        buffer.fill_(8)
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    ema.update(model)
    averaged = dict(ema.model.named_buffers())
    assert set(averaged["model.0.bn.running_mean"].tolist()) == {4.0}, "half way from 0 to 8"
    assert set(averaged["model.0.bn.running_var"].tolist()) == {4.5}, "half way from 1 to 8"
    assert averaged["model.0.bn.num_batches_tracked"].item() == 7


def test_average_is_apart_from_the_model_and_not_trained(make_state: MakeState) -> None:
    """Loss: the average shares memory with the model, or takes gradients and memory of its own."""
    state = make_state()
    assert not state.ema.model.training
    assert not any(p.requires_grad for p in state.ema.model.parameters())
    before = copy.deepcopy(state.ema.model.state_dict())
    with torch.no_grad():
        for tensor in state.model.state_dict().values():
            tensor.add_(1)
    assert_equal(state.ema.model.state_dict(), before)
    state.model.train()
    state.ema.update(state.model)
    assert not state.ema.model.training


# --- running statistics ----------------------------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, momentum=0.3))
    model(torch.randn(4, 3, 8, 8))  # statistics that are not those of the start
    return model.train()


def micro_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + number % 2, 3, 8, 8, generator=generator) * (1 + number) for number in range(count)]


def rank_step(parts: Sequence[Tensor], total: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """One rank's step on its micro-batches; an idle rank has a forward pass that does not count."""
    model = small_model()
    statistics = RunningStatistics(model)
    sums = ExactSum(statistics.size, 0, total, torch.device("cpu"))
    statistics.begin_step()
    for part in parts:
        model(part)
        sums.add(statistics.end_micro_batch())
    if not parts:
        model(torch.full((1, 3, 8, 8), 1e6))
        statistics.end_micro_batch()
    sums.reduce(sum_over_ranks)
    statistics.end_step(sums.result() / total, 17)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def shared_step(spans: Sequence[Sequence[Tensor]]) -> list[dict[str, Tensor]]:
    """The step shared over simulated ranks: once to learn what each would send, once more with the sum of all."""
    sent: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor

    total = sum(len(span) for span in spans)
    for span in spans:
        rank_step(span, total, record)
    everything = torch.stack(sent).sum(dim=0)
    return [rank_step(span, total, lambda tensor: tensor.copy_(everything)) for span in spans]


def test_statistics_are_the_mean_over_micro_batches_that_all_start_alike() -> None:
    """Loss: BatchNorm statistics that depend on the order of micro-batches, or follow the last one only."""
    parts = micro_batches(5)
    (result,) = shared_step([parts])
    alone = []
    for part in parts:
        model = small_model()
        model(part)
        alone.append(dict(model.named_buffers()))
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        torch.testing.assert_close(result[name], torch.stack([buffers[name] for buffers in alone]).mean(dim=0), msg=name)
    assert [result[f"{i}.num_batches_tracked"].item() for i in (1, 4)] == [17, 17], "the steps, however many micro-batches"


@pytest.mark.parametrize("cuts", [(3,), (1,), (2, 4), (5,), (0,), (1, 1, 2), (5, 5, 5)])
def test_statistics_do_not_depend_on_who_computes_which_micro_batch(cuts: tuple[int, ...]) -> None:
    """Loss: after a change of the world size evaluation uses other statistics; idle ranks spoil them with blank images."""
    parts = micro_batches(5)
    (alone,) = shared_step([parts])
    edges = [0, *cuts, 5]
    ranks = shared_step([parts[a:b] for a, b in pairwise(edges)])
    for rank in ranks:
        for name, buffer in rank.items():
            assert torch.equal(buffer, alone[name]), "all ranks have what one would have, to the last bit"
