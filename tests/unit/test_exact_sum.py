"""Sums that do not depend on who adds up what in which order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from gai_yolo.distributed.exact_sum import (
    FALL_BITS,
    HEADROOM_BITS,
    NO_EXPONENT,
    ExactSum,
    GradientSum,
    expected,
    exponents_of,
    followed,
    is_too_coarse,
    memory_order,
)

CPU = torch.device("cpu")
SHAPES = [(16, 3, 3, 3), (7,), (32, 16, 1, 1), (1,), (40, 5)]


def rows(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Numbers of all magnitudes and both signs, so that rounding depends on the order."""
    generator = torch.Generator().manual_seed(count)
    magnitudes = 2.0 ** torch.randint(-30, 30, (count, size), generator=generator).to(dtype)
    return list(torch.randn((count, size), generator=generator, dtype=dtype) * magnitudes)


def shuffled_groups(count: int, seed: int) -> list[list[int]]:
    """The numbers below `count` in random order, in random groups: ranks with their micro-batches."""
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    cuts = sorted(rng.choices(range(count + 1), k=rng.randint(0, 4)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


# --- ExactSum --------------------------------------------------------------------------------------------------------------


def summed(groups: Sequence[Sequence[Tensor]], size: int) -> ExactSum:
    """As ranks would: each sums its rows, then all words are added up."""
    parts = [ExactSum(size, 2, 16, CPU) for _ in groups]
    for part, group in zip(parts, groups, strict=True):
        for row in group:
            part.add(row)
        part.count(torch.tensor([len(group), 1]))
    sent: list[Tensor] = []
    for part in parts:
        part.reduce(lambda words: sent.append(words.clone()) or words)  # type: ignore[func-returns-value]
    parts[0].reduce(lambda words: words.copy_(torch.stack(sent).sum(dim=0)))
    return parts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_has_the_same_bits_in_any_order_and_grouping(dtype: torch.dtype) -> None:
    """Loss: BatchNorm's statistics and the loss's divisor differ in the last bit after a resize, and so does every weight."""
    numbers = rows(13, 50, dtype)
    wanted = summed([numbers], 50).result()
    naive = {tuple(sum(random.Random(seed).sample(numbers, 13), torch.zeros(50, dtype=dtype)).tolist()) for seed in range(20)}
    assert len(naive) > 1, "the numbers are such that the order matters"
    for seed in range(30):
        groups = shuffled_groups(13, seed)
        found = summed([[numbers[i] for i in group] for group in groups], 50)
        assert torch.equal(found.result(), wanted)
        assert found.is_finite and found.counts == [13, len(groups)]


def test_a_sum_is_as_good_as_float64_can_hold() -> None:
    """Loss: statistics that are the same everywhere, and wrong."""
    numbers = rows(9, 200, torch.float64)
    result = summed([numbers], 200).result()
    for place in range(200):
        column = [row[place].item() for row in numbers]
        exact = math.fsum(column)
        assert abs(result[place].item() - exact) <= 9 * 2.0**-60 + abs(exact) * 2.0**-52


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**38, -1e30])
def test_what_a_sum_cannot_represent_is_known_to_all(bad: float) -> None:
    """Loss: a NaN on one rank becomes a plausible number on all."""
    numbers = rows(6, 4)
    numbers[3] = torch.tensor([1.0, bad, 2.0, 3.0])
    for seed in range(5):
        assert not summed([[numbers[i] for i in group] for group in shuffled_groups(6, seed)], 4).is_finite


@pytest.mark.parametrize("num_rows", [1, 16, 4096, 2**22])
def test_as_many_rows_as_were_announced_fit_up_to_the_limit(num_rows: int) -> None:
    """Loss: int64 overflows silently, on a machine with many small micro-batches."""
    limit = 2.0 ** (42 - (num_rows - 1).bit_length())
    largest = math.nextafter(limit, 0.0)
    sums = ExactSum(1, 0, num_rows, CPU)
    sums.add(torch.tensor([-largest], dtype=torch.float64))
    sent: list[Tensor] = []
    sums.reduce(lambda words: sent.append(words.clone()) or words)  # type: ignore[func-returns-value]
    assert all(abs(word) * num_rows < 2**63 for word in sent[0].tolist()), "in Python's own integers"
    assert sums.is_finite and sums.result().item() == pytest.approx(-largest)
    sums.add(torch.tensor([limit]))
    assert not sums.is_finite


# --- GradientSum -----------------------------------------------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    """Of several shapes, one of them in channels-last memory."""
    made = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    made[0] = nn.Parameter(torch.zeros(SHAPES[0]).to(memory_format=torch.channels_last))
    return made


def gradients(count: int, seed: int = 0) -> list[list[Tensor]]:
    """For each micro-batch a gradient of each parameter, each parameter with a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    scales = (1e3, 1e-9, 1.0, 1e-4, 1e6)
    return [
        [
            (torch.randn(shape, generator=generator) * scale * (1 + number)).to(
                memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
            )
            for shape, scale in zip(SHAPES, scales, strict=True)
        ]
        for number in range(count)
    ]


def measured(parts: Sequence[Sequence[Tensor]]) -> list[int]:
    largest = [max(float(part[i].abs().max()) for part in parts) for i in range(len(SHAPES))]
    return exponents_of(torch.tensor(largest))


def gradient_sum(parts: Sequence[Sequence[Tensor]], exponents: Sequence[int], loss_scale: float = 1.0) -> tuple[list[Tensor], bool]:
    """The summed gradients of one rank, and whether one was above what was expected."""
    own = parameters()
    sums = GradientSum(own, 1)
    sums.begin(exponents, len(parts), loss_scale)
    for part in parts:
        for parameter, gradient in zip(own, part, strict=True):
            parameter.grad = gradient.clone()
        sums.take()
        assert all(parameter.grad is None for parameter in own)
    above = bool(sums.above)
    sums.finish()
    found = [parameter.grad for parameter in own]
    assert all(g is not None and g.stride() == p.stride() for g, p in zip(found, own, strict=True))
    return [g for g in found if g is not None], above


def test_gradients_have_the_same_bits_in_any_order() -> None:
    """Loss: the whole promise."""
    parts = gradients(6)
    exponents = measured(parts)
    wanted, _ = gradient_sum(parts, exponents)
    for seed in range(20):
        found, above = gradient_sum(random.Random(seed).sample(parts, 6), exponents)
        assert not above
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_second_step_does_not_remember_the_first() -> None:
    """Loss: every step also repeats the steps before it."""
    own, parts = parameters(), gradients(3)
    sums = GradientSum(own, 1)
    results = []
    for _ in range(2):
        sums.begin(measured(parts), 3)
        for part in parts:
            for parameter, gradient in zip(own, part, strict=True):
                parameter.grad = gradient.clone()
            sums.take()
        sums.finish()
        results.append([p.grad.clone() for p in own if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("surprise", [0, 5, HEADROOM_BITS - 1])
def test_the_rounding_is_below_that_of_float32(surprise: int) -> None:
    """Loss: exactness bought with worse gradients, of small parameters first of all; also just below the limit of what was expected."""
    parts = gradients(8)
    exponents = [exponent - surprise for exponent in measured(parts)]
    found, above = gradient_sum(parts, exponents)
    assert not above
    for place in range(len(SHAPES)):
        stack = torch.stack([part[place] for part in parts])
        truth = stack.double().sum(dim=0)
        plain = torch.zeros_like(stack[0])
        for one in stack:
            plain += one
        ours = (found[place].double() - truth).square().mean().sqrt()
        theirs = (plain.double() - truth).square().mean().sqrt()
        assert ours <= theirs, SHAPES[place]
        # Half a unit in the last place of float32 at most, but for what is far below the rest of the tensor.
        bound = truth.abs() * 2.0**-24 + truth.square().mean().sqrt() * 2.0**-30
        assert bool(((found[place].double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_a_gradient_that_is_no_number_is_noticed(bad: float, place: int) -> None:
    """Loss: int64 of NaN is some number, and nobody would know."""
    parts = gradients(3)
    exponents = measured(parts)
    memory_order(parts[1][place])[-1] = bad
    assert gradient_sum(parts, exponents)[1]


def test_a_gradient_above_what_was_expected_is_noticed_and_one_below_is_not() -> None:
    """Loss: int64 overflows silently."""
    parts = [[torch.zeros(shape) for shape in SHAPES] for _ in range(5)]
    exponents = [0] * len(SHAPES)
    limit = 2.0 ** (HEADROOM_BITS)
    for part in parts:
        part[1][2] = limit * 0.999  # five of them at once must fit
    found, above = gradient_sum(parts, exponents)
    assert not above and found[1][2].item() == pytest.approx(5 * limit * 0.999, rel=1e-6)
    parts[4][1][2] = -limit * 1.001
    assert gradient_sum(parts, exponents)[1]


def test_a_loss_scale_changes_no_bit_but_the_scale() -> None:
    """Loss: fp16's loss scaling eats up the headroom, or the bits depend on it."""
    parts = gradients(3)
    plain, _ = gradient_sum(parts, measured(parts))
    scaled, above = gradient_sum([[g * 1024 for g in part] for part in parts], measured(parts), loss_scale=1024.0)
    assert not above
    assert all(torch.equal(a * 1024, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("exponent", [-90, -60, 0, 100, 127])
def test_extreme_magnitudes_are_summed(exponent: int) -> None:
    """Loss: a factor that float32 cannot hold turns a whole parameter's gradient into zero, infinity or NaN."""
    value = 2.0 ** (exponent - 1)
    parts = [[torch.full(shape, value) for shape in SHAPES] for _ in range(2)]
    found, above = gradient_sum(parts, [exponent] * len(SHAPES))
    assert not above
    wanted = torch.tensor([2 * value], dtype=torch.float32)
    assert all(torch.equal(g, wanted.expand_as(g)) for g in found)


def test_exponents_are_the_next_powers_of_two() -> None:
    """Loss: expectations off by one eat headroom; those of a zero or a NaN are taken for a magnitude."""
    values = torch.tensor([1.0, 0.99, 2.0, 3.0, 1e-40, 0.0, math.nan, math.inf])
    assert exponents_of(values) == [1, 0, 2, 2, -132, NO_EXPONENT, NO_EXPONENT, NO_EXPONENT]


def test_expectations_rise_at_once_and_fall_slowly() -> None:
    """Loss: one batch without objects makes the next one overflow; a parameter without gradient forgets what it was."""
    assert followed([3, 3, 3, 3, NO_EXPONENT], [9, 3, -20, NO_EXPONENT, 5]) == [9, 3, 2, 3, 5]
    assert followed(None, [4, NO_EXPONENT]) == [4, NO_EXPONENT]
    assert followed(None, [NO_EXPONENT, NO_EXPONENT]) is None, "fp16 that has not found its scale yet"


def test_what_was_never_seen_is_expected_to_be_as_large_as_the_others() -> None:
    """Loss: the first gradient of a parameter overflows."""
    assert expected([3, NO_EXPONENT, -7]) == [3, 3, -7]
    assert expected([NO_EXPONENT, NO_EXPONENT]) == [0, 0]


@pytest.mark.parametrize(
    ("exponents", "norms", "answer"),
    [
        ([5, 5], [5, -50], False),  # what it is added to is larger
        ([5, 5], [5, NO_EXPONENT], False),
        ([5, NO_EXPONENT], [5, NO_EXPONENT], False),
        ([5, NO_EXPONENT], [5, 5 - FALL_BITS], False),
        ([5, NO_EXPONENT], [5, 4 - FALL_BITS], True),
        ([5, NO_EXPONENT], [5, 99], False),
    ],
)
def test_a_first_gradient_that_is_small_is_too_coarse(exponents: list[int], norms: list[int], answer: bool) -> None:
    """Loss: the first gradients of a branch are rounded to a few bits, or to zero, silently."""
    assert is_too_coarse(exponents, norms) is answer


def test_a_first_gradient_that_is_not_too_coarse_is_rounded_below_float32() -> None:
    """Loss: the limit is drawn where the damage is done."""
    shape, parts = (64, 64, 3, 3), 8
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn((parts, *shape), generator=generator)
    truth = stack.double().sum(dim=0)
    own = nn.Parameter(torch.zeros(shape))
    sums = GradientSum([own], 1)
    sums.begin([exponents_of(truth.norm().float()[None])[0] + FALL_BITS], parts)
    plain = torch.zeros(shape)
    for one in stack:
        own.grad = one.clone()
        sums.take()
        plain += one
    sums.finish()
    assert own.grad is not None
    assert (own.grad.double() - truth).norm() <= (plain.double() - truth).norm()


def test_after_a_fall_the_rounding_is_below_that_of_the_momentum(figure: Callable[[str], None]) -> None:
    """Loss: after a spike, or where a branch has no objects for a while, momentum drifts by what is cut off."""
    generator = torch.Generator().manual_seed(0)
    shape, beta = (64, 64, 3, 3), 0.9
    own = nn.Parameter(torch.zeros(shape))
    sums = GradientSum([own], 1)
    exact, ours, theirs = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape), torch.zeros(shape)
    exponents: list[int] | None = None
    for step in range(60):
        # From a large gradient to one 2^-30 of it, at once, and slowly back.
        scale = 1.0 if step < 5 else 2.0 ** (min(0, step - 35))
        parts = [torch.randn(shape, generator=generator) * scale for _ in range(4)]
        sums.begin(exponents or exponents_of(parts[0].abs().max()[None]), len(parts))
        for one in parts:
            own.grad = one.clone()
            sums.take()
        sums.finish()
        assert own.grad is not None and not sums.above
        exponents = followed(exponents, exponents_of(own.grad.norm()[None]))
        plain = parts[0] + parts[1] + parts[2] + parts[3]
        exact = beta * exact + torch.stack(parts).double().sum(dim=0)
        ours, theirs = beta * ours + own.grad, beta * theirs + plain
        error, error_of_float32 = (ours.double() - exact).norm(), (theirs.double() - exact).norm()
        assert error <= 1.05 * error_of_float32, step
    figure(f"momentum after a fall of the gradients by 2^30: error {error / error_of_float32:.3f} of float32's")


def test_memory_order_sees_every_element_of_a_channels_last_tensor_once() -> None:
    """Loss: a gradient whose elements are summed with others'."""
    tensor = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat = memory_order(tensor)
    assert flat.tolist() == tensor.permute(0, 2, 3, 1).flatten().tolist()
    flat += 1
    assert tensor[0, 0, 0, 0] == 1.0, "a view"
