"""Which samples are trained on, over any schedule of kills and resizes: simulated ranks, real order, plan and loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gai_yolo.data.augment import Sample
from gai_yolo.data.dataset import Item, SampleSet
from gai_yolo.data.loader import TrainingLoader
from gai_yolo.data.order import BatchPlan, Key

EPOCHS = 3
Trained = dict[tuple[int, int], list[list[int]]]
"""(epoch, step) -> the micro-batches of the global batch."""


class Ids(SampleSet):
    """A data set whose samples are their own numbers."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: Key) -> Item:
        nothing = Sample(np.zeros((1, 1, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        return Item(nothing, key.position, (0.0, 0.0, 0.0), ())


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Shapes of epochs of at most some twenty steps."""
    batch = draw(st.integers(1, 12))
    return BatchPlan(draw(st.integers(1, 18 * batch)), batch, draw(st.integers(1, batch)), draw(st.integers(0, 2**32 - 1)))


starts = st.lists(
    # World size; steps until the kill; how many of the ranks did the killed step's work; steps since the last save.
    st.tuples(st.integers(1, 6), st.integers(0, 25), st.integers(0, 6), st.integers(0, 6)),
    max_size=8,
)
fired: Counter[str] = Counter()


def simulate(plan: BatchPlan, schedule: list[tuple[int, int, int, int]]) -> tuple[Trained, Counter[tuple[int, int, int]]]:
    """What is trained on in the end, and how often each (epoch, step, sample) is part of the state that is left.

    Every start goes on from the newest save, as the job does: its position is a number of completed steps and nothing else.
    """
    trained: Trained = {}
    steps, position = plan.steps_per_epoch, 0
    for world_size, until_kill, ranks_done, since_save in [*schedule, (2, EPOCHS * steps + 1, 0, 0)]:
        loaders = [TrainingLoader(Ids(plan.num_samples), plan, rank, world_size, workers=0, pin_memory=False) for rank in range(world_size)]
        made, place = 0, position
        while place < EPOCHS * steps and made < until_kill:
            epoch, first = place // steps + 1, place % steps
            by_rank = [loader.epoch(epoch, first) for loader in loaders]
            for step in range(first, steps):
                if made == until_kill:
                    # Some ranks have done their part of a step that is never completed.
                    for batches in by_rank[:ranks_done]:
                        next(batches)
                        fired["killed in mid-step"] += 1
                    break
                spans = [next(batches) for batches in by_rank]
                # What a killed start did after its last save is trained again, and replaces it.
                trained[epoch, step] = [batch.image_ids.tolist() for span in spans for batch in span]
                fired["idle rank"] += any(not span for span in spans)
                made, place = made + 1, place + 1
        saved = max(position, place - since_save) if place < EPOCHS * steps else place
        fired["replayed"] += saved < place
        fired["killed in mid-epoch"] += saved % steps > 0
        position = saved
        trained = {key: value for key, value in trained.items() if (key[0] - 1) * steps + key[1] < position}
        if position == EPOCHS * steps:
            break
    seen = Counter((epoch, step, sample) for (epoch, step), micros in trained.items() for micro in micros for sample in micro)
    return trained, seen


@pytest.mark.parametrize("examples", [60, pytest.param(250, marks=pytest.mark.exhaustive)])
def test_each_epoch_is_the_data_set_once_and_each_step_the_undisturbed_ones(examples: int, figure: Callable[[str], None]) -> None:
    """Loss: samples lost or doubled by a preemption, or another batch after a resize; nobody sees it in a loss curve."""
    schedules = 0
    fired.clear()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(plans(), starts)
    def check(plan: BatchPlan, schedule: list[tuple[int, int, int, int]]) -> None:
        nonlocal schedules
        schedules += 1
        undisturbed, _ = simulate(plan, [(1, EPOCHS * plan.steps_per_epoch, 0, 0)])
        trained, seen = simulate(plan, schedule)
        assert trained == undisturbed
        for epoch in range(1, EPOCHS + 1):
            samples = Counter(sample for (of_epoch, _, sample), count in seen.items() if of_epoch == epoch for _ in range(count))
            assert samples == Counter(range(plan.num_samples))

    check()
    figure(f"sample ledger: {schedules} random schedules, {dict(fired)}")
    assert schedules >= 0.8 * examples
    assert all(fired[kind] >= 0.2 * examples for kind in ("killed in mid-step", "idle rank", "replayed", "killed in mid-epoch"))
