"""Which sample comes when."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import pairwise, permutations

import pytest

from gai_yolo.data.order import BatchPlan, Order, split_evenly

WORLD_SIZES = range(1, 6)
GOLDEN = [10, 9, 4, 5, 7, 11, 0, 8, 3, 2, 1, 6]


def plans() -> list[BatchPlan]:
    """Shapes of epochs: small and odd ones, and random ones."""
    rng = random.Random(0)
    fixed = [
        BatchPlan(1, 1, 1, 0),
        BatchPlan(1, 64, 64, 0),
        BatchPlan(7, 7, 1, 1),
        BatchPlan(8, 3, 3, 2),
        BatchPlan(65, 64, 16, 3),
        BatchPlan(5, 10, 4, 4),
    ]
    for _ in range(60):
        batch = rng.randint(1, 40)
        fixed.append(BatchPlan(rng.randint(1, 200), batch, rng.randint(1, batch), rng.randrange(2**32)))
    return fixed


def everything(plan: BatchPlan, epoch: int) -> list[int]:
    """An epoch's samples in order."""
    return plan.order(epoch).samples(0, plan.num_samples)


@cache
def epoch_by_rank(plan: BatchPlan, epoch: int, world_size: int) -> list[list[list[list[int]]]]:
    """Micro-batches of every step of every rank; each rank works out the order by itself, as in a real job."""
    order, steps = plan.order(epoch), range(plan.steps_per_epoch)
    spans = [[plan.rank_micro_batches(order, step, rank, world_size) for step in steps] for rank in range(world_size)]
    return [[[[key.position for key in micro] for micro in step] for step in rank] for rank in spans]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_sample_comes_exactly_once_per_epoch_over_all_ranks(world_size: int) -> None:
    """Loss: samples that are never learned, or counted twice, because the numbers do not divide."""
    for plan in plans():
        ranks = epoch_by_rank(plan, 3, world_size)
        seen = Counter(sample for rank in ranks for step in rank for micro in step for sample in micro)
        assert seen == Counter(range(plan.num_samples)), plan


def test_micro_batches_of_a_step_are_the_same_for_every_world_size() -> None:
    """Loss: after a change of machines BatchNorm sees other groups of images, and the run is another run."""
    for plan in plans():
        alone = epoch_by_rank(plan, 3, 1)[0]
        for world_size in WORLD_SIZES:
            ranks = epoch_by_rank(plan, 3, world_size)
            together = [[micro for rank in ranks for micro in rank[step]] for step in range(plan.steps_per_epoch)]
            assert together == alone, (plan, world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_work_of_ranks_differs_by_at_most_one_micro_batch(world_size: int) -> None:
    """Loss: one rank computes while all others wait for it."""
    for plan in plans():
        for step in zip(*epoch_by_rank(plan, 3, world_size), strict=True):
            sizes = [len(span) for span in step]
            assert max(sizes) - min(sizes) <= 1, plan


def test_micro_batches_are_full_or_even_and_never_too_large() -> None:
    """Loss: out of memory, or a leftover micro-batch of one image whose BatchNorm statistics are noise."""
    for plan in plans():
        order = plan.order(1)
        for step in range(plan.steps_per_epoch):
            sizes = [len(micro) for micro in plan.micro_batches(order, step)]
            assert 1 <= min(sizes) <= max(sizes) <= plan.micro_batch_size, plan
            assert max(sizes) - min(sizes) <= 1, plan
            assert sum(sizes) == plan.batch_size or step == plan.steps_per_epoch - 1, plan


def test_step_size_agrees_with_the_micro_batches() -> None:
    """Loss: the gradient and the running statistics are divided by a number of micro-batches that nobody computed."""
    for plan in plans():
        order = plan.order(2)
        for step in range(plan.steps_per_epoch):
            micros = plan.micro_batches(order, step)
            assert plan.step_size(step) == (len(micros), sum(map(len, micros))), (plan, step)


def test_samples_follow_the_order_of_the_epoch() -> None:
    """Loss: shuffling that is lost on the way to the ranks."""
    for plan in plans():
        order = plan.order(4)
        flat = [key.position for step in range(plan.steps_per_epoch) for micro in plan.micro_batches(order, step) for key in micro]
        assert flat == order.samples(0, plan.num_samples)


def test_orders_are_repeatable_and_differ_between_epochs_and_seeds() -> None:
    """Loss: a resumed epoch in another order, or every epoch (or every seed) in the same one."""
    orders = {(seed, epoch): everything(BatchPlan(100, 10, 5, seed), epoch) for seed in range(5) for epoch in range(1, 6)}
    assert len({tuple(order) for order in orders.values()}) == 25
    assert all(everything(BatchPlan(100, 7, 2, seed), epoch) == order for (seed, epoch), order in orders.items()), "batch size has no say"
    assert all(order != sorted(order) for order in orders.values())


def test_order_is_the_one_of_earlier_releases() -> None:
    """Loss: after an update of this program or of NumPy, a run goes on with samples it has already seen in the epoch."""
    assert everything(BatchPlan(12, 4, 2, seed=7), 1) == GOLDEN


def test_shuffling_mixes_the_whole_set() -> None:
    """Loss: neighbours in the annotation file (frames of one video) stay neighbours in the batches."""
    order = everything(BatchPlan(1000, 10, 5, 0), 1)
    distance = sum(abs(place - sample) for place, sample in enumerate(order)) / 1000
    assert 280 < distance < 390, "a third of the length is expected"


@pytest.mark.parametrize(("num_samples", "max_steps", "expected"), [(100, None, 10), (101, None, 11), (100, 3, 3), (15, 3, 2), (1, 1, 1)])
def test_max_steps_ends_an_epoch_early_and_never_lengthens_it(num_samples: int, max_steps: int | None, expected: int) -> None:
    """Loss: a trial of three steps that takes an epoch, or steps without samples."""
    plan = BatchPlan(num_samples, 10, 5, 0, max_steps)
    assert plan.steps_per_epoch == expected
    full = BatchPlan(num_samples, 10, 5, 0)
    assert [plan.step_size(step) for step in range(expected)] == [full.step_size(step) for step in range(expected)]


def test_split_evenly_keeps_order_and_gives_longer_parts_first() -> None:
    """Loss: a rank without work in the middle, or items out of order."""
    assert split_evenly(list("abcdefgh"), 3) == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]
    assert split_evenly([1, 2], 4) == [[1], [2], [], []]
    assert split_evenly([], 2) == [[], []]


# --- the order itself ------------------------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 64, 99, 100, 101, 205, 1000, 4096, 10_007]


@pytest.mark.parametrize("num_samples", SIZES)
def test_an_order_has_every_sample_once(num_samples: int) -> None:
    """Loss: a shuffle that is no bijection loses samples and repeats others, and nobody sees it in the loss."""
    for seed in range(20):
        assert sorted(Order(num_samples, seed, seed + 1).samples(0, num_samples)) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [101, 118_287])
def test_any_part_of_an_order_is_the_part_of_the_whole(num_samples: int) -> None:
    """Loss: after a resume in mid-epoch the samples are others than they would have been."""
    order, whole = Order(num_samples, 3, 2), Order(num_samples, 3, 2).samples(0, num_samples)
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(num_samples)
        stop = start + rng.randint(0, 300)
        assert order.samples(start, stop) == whole[start:stop]
    assert order.samples(num_samples, num_samples + 5) == []


def test_an_order_of_ten_thousand_million_is_a_bijection_where_it_is_looked_at() -> None:
    """Loss: arithmetic that overflows on large sets, and repeats samples there."""
    order = Order(10**10, 0, 1)
    seen = [order.samples(start, start + 20_000) for start in (0, 10**9, 5 * 10**9, 10**10 - 20_000)]
    flat = [sample for part in seen for sample in part]
    assert len(set(flat)) == len(flat) == 80_000
    assert 0 <= min(flat) < 10**7 and 10**10 - 10**7 < max(flat) < 10**10
    assert all(abs(sum(part) / len(part) / 10**10 - 0.5) < 5 * 0.2887 / 20_000**0.5 for part in seen)


def chi_square(counts: Counter[tuple[int, ...]], num_cells: int) -> float:
    """Pearson's statistic against equal chances, in standard deviations from what chance alone gives."""
    expected = counts.total() / num_cells
    missing = num_cells - len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values()) + missing * expected
    freedom = num_cells - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("num_samples", [2, 3, 4, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_every_permutation_of_a_small_set_is_as_likely_as_the_others(num_samples: int) -> None:
    """Loss: a shuffle that prefers some orders, which shows first on small sets."""
    num_cells = len(list(permutations(range(num_samples))))
    counts = Counter(
        tuple(Order(num_samples, seed, epoch).samples(0, num_samples)) for seed in range(100) for epoch in range(1, 3 * num_cells + 1)
    )
    assert chi_square(counts, num_cells) < 4


@pytest.mark.parametrize("epochs", [2000, pytest.param(8000, marks=pytest.mark.exhaustive)])
def test_places_and_neighbours_are_random_on_a_larger_set(epochs: int) -> None:
    """Loss: samples that keep to a part of the epoch, or to their neighbours in the annotation file (frames of one video)."""
    size = 23
    places: Counter[tuple[int, ...]] = Counter()
    neighbours: Counter[tuple[int, ...]] = Counter()
    for epoch in range(1, epochs + 1):
        order = Order(size, 7, epoch).samples(0, size)
        places.update(enumerate(order))
        neighbours.update(pairwise(order))
    # Each place and each sample is filled once an epoch, so that the cells are not independent: (n - 1)^2 of n^2 are free.
    assert abs(chi_square(places, size * size)) < 6
    assert abs(chi_square(neighbours, size * (size - 1))) < 6


def test_an_epoch_says_nothing_about_the_next() -> None:
    """Loss: the same batches again in another order."""
    size = 5000
    first, second = (Order(size, 0, epoch).samples(0, size) for epoch in (1, 2))
    mean = (size - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True)) / size
    assert abs(covariance / (size * size / 12)) < 5 / size**0.5
    fixed = sum(a == b for a, b in zip(first, second, strict=True))
    assert fixed < 10, "one is expected by chance"
