"""Another process reads the state as it was when it was captured."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gai_yolo.checkpointing.capture import TENSOR_ALIGNMENT, StateBuffer, open_state
from gai_yolo.checkpointing.state import LOSSES, Progress, TrainingState
from gai_yolo.data.dataset import Batch
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.world import World
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.optimizer import make_schedule
from gai_yolo.training.step import TrainingStep

MakeState = Callable[..., TrainingState]
MakeBatch = Callable[[int, Sequence[int]], Batch]


@pytest.fixture
def buffer() -> Iterator[StateBuffer]:
    """Without room for anything yet."""
    buffer = StateBuffer(0, pinned=False)
    yield buffer
    buffer.close()


def opened(buffer: StateBuffer, state: dict[str, Any]) -> dict[str, Any]:
    """What the writer sees of a state."""
    buffer.fill(state)
    return open_state(buffer.descriptor, buffer.content)


def assert_equal(a: Any, b: Any, where: str = "state") -> None:
    """Equality to the last bit and type, all the way down."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a, b), where
        return
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{number}]")
    else:
        assert a == b, where


def tensors_of(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    values = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else []
    return [tensor for value in values for tensor in tensors_of(value)]


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


# --- what goes in comes out ------------------------------------------------------------------------------------------------


def test_nested_and_plain_data_comes_through(buffer: StateBuffer) -> None:
    """Loss: history or optimizer settings that are missing, or a key 0 that became "0"."""
    state = {
        "plain": [1, -2.5, 1e300, True, None, "größe", b"\x00\xff", (1, (2, [3])), {}, []],
        "dicts": {0: {"a": {"b": [torch.arange(3), {"c": torch.ones(2)}]}}, "0": 1, (1, 2): "tuple"},
        "ordered": OrderedDict([("z", torch.zeros(1)), ("a", 2)]),
        "history": [{"epoch": 1, "loss": None, "mAP50-95": 0.25}] * 2,
        "bare": torch.tensor(3.0),
    }
    assert_equal(opened(buffer, copy.deepcopy(state)), state)


def test_state_without_tensors_comes_through(buffer: StateBuffer) -> None:
    """Loss: the one state that has none ends the training with an error from inside torch."""
    assert opened(buffer, {"epoch": 3, "rows": []}) == {"epoch": 3, "rows": []}


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, tuple(shape), generator=generator).to(dtype)


def test_every_dtype_and_empty_and_single_numbers_come_through_together(buffer: StateBuffer) -> None:
    """Loss: an odd number of bytes shifts every tensor behind it."""
    shapes = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (63,), (2, 3, 5, 7)]
    state = {"all": [numbers(shape, dtype, seed) for seed, dtype in enumerate(DTYPES) for shape in shapes]}
    result = opened(buffer, state)
    assert_equal(result, state)
    assert all(tensor.data_ptr() % TENSOR_ALIGNMENT == 0 for tensor in result["all"] if tensor.numel()), "fast copies want it"


def test_special_numbers_keep_their_bits(buffer: StateBuffer) -> None:
    """Loss: a NaN or a minus zero that is another one after a restart."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    result = opened(buffer, {"a": special, "b": special.half(), "c": special.bfloat16()})
    assert torch.equal(result["a"].view(torch.int32), special.view(torch.int32))
    assert torch.equal(result["b"].view(torch.int16), special.half().view(torch.int16))
    assert torch.equal(result["c"].view(torch.int16), special.bfloat16().view(torch.int16))


def test_order_in_memory_is_kept(buffer: StateBuffer) -> None:
    """Loss: weights come back in another memory format, and the bits of training after a restart are others."""
    channels_last = numbers((4, 3, 5, 7), torch.float32).to(memory_format=torch.channels_last)
    state = {"nhwc": channels_last, "nchw": channels_last.contiguous(), "transposed": numbers((4, 6), torch.float32).T}
    result = opened(buffer, state)
    assert_equal(result, state)
    assert {name: tensor.stride() for name, tensor in result.items()} == {name: tensor.stride() for name, tensor in state.items()}
    assert result["nhwc"].is_contiguous(memory_format=torch.channels_last) and not result["nhwc"].is_contiguous()


def test_parts_of_tensors_come_through_without_what_they_are_parts_of(buffer: StateBuffer) -> None:
    """Loss: other numbers where a tensor has gaps or repeats; or a checkpoint a thousand times too large."""
    large = numbers((1000, 1000), torch.float32)
    state = {
        "row": large[3],
        "column": large[:, 3],
        "block": large[10:13, 20:24],
        "every third": large[:9:3, ::300],
        "transposed block": large[10:13, 20:24].T,
        "expanded": numbers((3, 1), torch.float32).expand(3, 4),
        "scalar expanded": torch.tensor(2.5).expand(2, 2),
        "parameter": nn.Parameter(numbers((3,), torch.float32)),
    }
    result = opened(buffer, state)
    assert_equal(result, state)
    assert buffer.content.size < 20_000
    assert len(saved(result)) < 30_000
    assert not result["parameter"].requires_grad


@st.composite
def pieces(draw: st.DrawFn) -> Tensor:
    """A tensor, or a view of one, of any make."""
    tensor = numbers(draw(st.lists(st.integers(0, 4), max_size=4)), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    if tensor.dim():
        tensor = tensor.permute(*draw(st.permutations(range(tensor.dim()))))
        dim = draw(st.integers(0, tensor.dim() - 1))
        start, size = draw(st.integers(0, 3)), tensor.shape[dim]
        tensor = tensor.narrow(dim, min(start, size), size - min(start, size))
        tensor = tensor[(slice(None),) * dim + (slice(None, None, draw(st.integers(1, 3))),)]
    if draw(st.booleans()):
        tensor = tensor.expand(draw(st.integers(0, 3)), *tensor.shape)
    return tensor


@settings(deadline=None, max_examples=150)
@given(st.lists(pieces(), min_size=1, max_size=6))
def test_whatever_the_tensors_are_they_come_through(tensors: list[Tensor]) -> None:
    """Loss: a kind of view that nobody thought of is saved as something else."""
    buffer = StateBuffer(0, pinned=False)
    try:
        result = opened(buffer, {"t": tensors})
        assert_equal(result["t"], tensors)
        assert_equal(torch.load(io.BytesIO(saved(result)), weights_only=True), result)
    finally:
        buffer.close()


# --- files -----------------------------------------------------------------------------------------------------------------


def test_a_file_of_it_holds_each_tensor_once_and_nothing_else(buffer: StateBuffer) -> None:
    """Loss: every tensor drags the whole buffer into the file; a checkpoint of 30 MB has 30 GB."""
    state = {"weights": [numbers((1000,), torch.float32, seed) for seed in range(50)]}
    result = opened(buffer, state)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(result)}
    assert len(storages) == 50
    assert all(tensor.untyped_storage().nbytes() == 4000 for tensor in tensors_of(result))
    assert len(saved(result)) <= len(saved(state))
    assert_equal(torch.load(io.BytesIO(saved(result)), weights_only=True), state)


READER = """
import sys
import torch
from gai_yolo.checkpointing.capture import Content, open_state
tensors, skeleton, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.save(open_state(0, Content(tensors, skeleton)), path)
"""


def test_another_process_reads_it_by_its_descriptor(buffer: StateBuffer, tmp_path: Path) -> None:
    """Loss: memory that only the training process itself can see."""
    state = {"a": numbers((300, 7), torch.float32), "b": [1, {"c": numbers((), torch.int64)}]}
    buffer.fill(state)
    path = tmp_path / "state.pt"
    command = [sys.executable, "-c", READER, str(buffer.content.tensors), str(buffer.content.skeleton), str(path)]
    subprocess.run(command, stdin=buffer.descriptor, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_equal(torch.load(path, weights_only=True), state)


# --- time ------------------------------------------------------------------------------------------------------------------


def test_what_happens_after_does_not_change_it(buffer: StateBuffer) -> None:
    """Loss: a checkpoint with the weights of step 100 and the momentum of step 101."""
    state = {"w": numbers((5, 5), torch.float32), "h": [{"loss": 1.0}], "progress": {"losses": {"box": 2.0}}}
    before = copy.deepcopy(state)
    result = opened(buffer, state)
    state["w"].fill_(7.0)  # type: ignore[attr-defined]
    state["h"].append({"loss": 9.0})  # type: ignore[attr-defined]
    state["progress"]["losses"]["box"] = 9.0  # type: ignore[index]
    assert_equal(result, before)
    assert_equal(open_state(buffer.descriptor, buffer.content), before)


def test_filling_does_not_touch_the_live_state(buffer: StateBuffer) -> None:
    """Loss: saving leaves a trace in training."""
    weight = nn.Parameter(numbers((4, 3), torch.float32))
    (weight * 2).sum().backward()
    state = {"w": weight, "t": numbers((4, 3), torch.float32).T}
    before = copy.deepcopy(state)
    version, pointer = weight._version, weight.data_ptr()
    opened(buffer, state)
    assert_equal(state, before)
    assert (weight._version, weight.data_ptr(), weight.requires_grad) == (version, pointer, True)
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((4, 3), 2.0))


def test_a_buffer_takes_one_state_after_the_other(buffer: StateBuffer) -> None:
    """Loss: parts of the snapshot before in the one that was just taken."""
    states: list[dict[str, Any]] = [
        {"a": numbers((100,), torch.float32), "b": numbers((3,), torch.int64)},
        {"a": numbers((100,), torch.float32, 1), "b": numbers((3,), torch.int64, 1)},
        {"other": numbers((7, 3), torch.float16, 2), "history": ["x" * 1000]},
        {"a": numbers((90, 90), torch.float32, 3)},
        {"a": numbers((100,), torch.float32, 4), "b": numbers((3,), torch.int64, 4)},
        {"small": torch.tensor(1)},
    ]
    for state in states:
        assert_equal(opened(buffer, state), state)


def test_buffer_that_is_too_small_grows_and_then_stays(buffer: StateBuffer) -> None:
    """Loss: the history gets one row longer than was foreseen, and nothing is saved any more; or memory grows with every save."""
    small, large = {"w": numbers((10,), torch.float32)}, {"w": numbers((100_000,), torch.float32)}
    assert_equal(opened(buffer, small), small)
    assert os.fstat(buffer.descriptor).st_size < 100_000
    assert_equal(opened(buffer, large), large)
    size, descriptor = os.fstat(buffer.descriptor).st_size, buffer.descriptor
    assert size >= 400_000
    for state in (small, large, small):
        assert_equal(opened(buffer, state), state)
    assert (os.fstat(buffer.descriptor).st_size, buffer.descriptor) == (size, descriptor)


def test_state_that_is_still_read_survives_the_growth_of_its_buffer(buffer: StateBuffer) -> None:
    """Loss: the writer of the last snapshot crashes because the next one needs more room."""
    small = {"w": numbers((10,), torch.float32)}
    result = opened(buffer, small)
    opened(buffer, {"w": numbers((100_000,), torch.float32)})
    assert_equal(result, small)


def test_one_that_is_large_enough_does_not_grow() -> None:
    """Loss: what was set aside in advance is thrown away with the first save."""
    buffer = StateBuffer(1 << 20, pinned=False)
    descriptor = buffer.descriptor
    opened(buffer, {"w": numbers((200_000,), torch.float32)})
    assert buffer.descriptor == descriptor and os.fstat(descriptor).st_size == 1 << 20
    buffer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    buffer.close()  # twice is once


def test_nothing_is_left_open_when_buffers_and_readers_are_gone() -> None:
    """Loss: a long run that ends with `too many open files`."""
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for size in (10, 10_000):
        buffer = StateBuffer(0, pinned=False)
        result = opened(buffer, {"w": numbers((size,), torch.float32)})
        buffer.close()
        del result, buffer
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- the training state ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sgd", "adamw"])
def trained(request: pytest.FixtureRequest, world: World, make_state: MakeState, make_batch: MakeBatch) -> TrainingState:
    """In the middle of the third epoch."""
    optimizer = str(request.param)
    return train_a_step(make_state(optimizer), optimizer, world, make_batch)


def train_a_step(state: TrainingState, optimizer: str, world: World, make_batch: MakeBatch) -> TrainingState:
    config = TrainingConfig.model_validate({"optimizer": optimizer, "epochs": 10, "lr": 0.001, "channels_last": True})
    state.model.train().to(memory_format=torch.channels_last)
    step = TrainingStep(state, DetectionLoss(), make_schedule(config, 3, 10), world, config)
    step([make_batch(1, (1, 2))], 1, 2, 64)
    state.epoch, state.best_metric, state.history = 2, 0.25, [{"epoch": 1, "train_loss": 5.0, "mAP50-95": None}]
    state.progress = Progress({name: 1.5 * number for number, name in enumerate(LOSSES)}, 12.5)
    return state


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_state_fits_into_what_is_foreseen(
    optimizer: str, world: World, make_state: MakeState, make_batch: MakeBatch, buffer: StateBuffer
) -> None:
    """Loss: the first save of a run waits until the memory for it has grown; or memory is taken that nobody needs."""
    state = make_state(optimizer, size="n")
    foreseen = state.expected_bytes()
    buffer.fill(train_a_step(state, optimizer, world, make_batch).capture())
    assert buffer.content.size <= foreseen <= 1.2 * buffer.content.size


def test_a_training_state_comes_through(trained: TrainingState, buffer: StateBuffer) -> None:
    """Loss: a state that is written is another one than that of the training."""
    captured = trained.capture()
    result = opened(buffer, captured)
    tensors, originals = tensors_of(result), tensors_of(captured)
    assert len(tensors) == len(originals) > 500
    for one, other in zip(tensors, originals, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()
    assert_equal(result, captured)
    assert any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors if t.dim() == 4)
    assert_equal(torch.load(io.BytesIO(saved(result)), weights_only=True), captured)


def test_applying_what_went_through_a_buffer_is_the_identity(trained: TrainingState, make_state: MakeState, buffer: StateBuffer) -> None:
    """Loss: an interruption in the middle of an epoch that leaves a trace, or forgets the epoch's first losses."""
    captured = copy.deepcopy(trained.capture())
    result = opened(buffer, trained.capture())
    optimizer = "adamw" if isinstance(trained.optimizer, torch.optim.AdamW) else "sgd"
    for state in (trained, make_state(optimizer, seed=1)):
        state.apply(result)
        assert_equal(state.capture(), captured)
        assert (state.epoch, state.step, state.samples, state.best_metric) == (2, 1, 2, 0.25)
        assert state.progress == Progress({"total": 0.0, "box": 1.5, "cls": 3.0, "dfl": 4.5}, 12.5)
    trained.apply(trained.capture())
    assert_equal(trained.capture(), captured)
