"""When to save in the middle of an epoch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.checkpointing.schedule import FIRST_AFTER, Cost, Schedule, asks_for, automatic_interval, young_daly
from gai_yolo.sections import SnapshotsConfig, TrainingConfig

HOUR = 3600.0


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def cadence_of(clock: Clock, step: int = 0, expected_bytes: int = 30_000_000, **settings: object) -> Schedule:
    return Schedule.of_disk(SnapshotsConfig.model_validate(settings), step, expected_bytes, clock)


def due_after(cadence: Schedule, clock: Clock, step: int = 0) -> float:
    """Seconds from now until it is due, to a thousandth; the clock is put back."""
    start, low, high = clock.now, 0.0, 1e7
    while high - low > 1e-4 * max(1.0, low):
        clock.now = start + (low + high) / 2
        low, high = (low, clock.now - start) if cadence.is_due(step) else (clock.now - start, high)
    clock.now = start
    return high


# --- by steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 7])
def test_every_so_many_steps_counts_from_the_last_save(start: int) -> None:
    """Loss: a run that starts at step 7 saves at once, and again two steps later."""
    clock = Clock()
    cadence = cadence_of(clock, start, interval_steps=3)
    saved = []
    for step in range(start + 1, start + 11):
        if cadence.is_due(step):
            saved.append(step - start)
            cadence.saved(step)
        if step == start + 4:
            cadence.saved(step)  # the epoch ended here
    assert saved == [3, 7, 10]


def test_snapshot_that_could_not_be_taken_when_due_stays_due() -> None:
    """Loss: the writer was busy at step 3, and the next chance is step 6."""
    cadence = cadence_of(Clock(), interval_steps=3)
    assert [cadence.is_due(step) for step in range(1, 6)] == [False, False, True, True, True]
    cadence.saved(5)
    assert [cadence.is_due(step) for step in range(6, 9)] == [False, False, True]


@pytest.mark.parametrize("seconds", [1.0, "auto", None])
def test_steps_go_before_seconds(seconds: float | str | None) -> None:
    """Loss: a test that asks for a snapshot at step 5 finds one at step 2 on a slow machine."""
    clock = Clock()
    cadence = cadence_of(clock, interval_steps=5, interval_seconds=seconds)
    assert cadence.interval_seconds is None
    clock.now += 1e9
    assert [cadence.is_due(step) for step in (1, 4, 5)] == [False, False, True]


@pytest.mark.parametrize("most_lost", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("start", [0, 7])
def test_no_more_steps_than_may_be_are_ever_lost(start: int, most_lost: int) -> None:
    """Loss: a crash while the memory is slow costs more steps than the configuration says; or each step waits for it."""
    schedule = Schedule.of_memory(most_lost, SnapshotsConfig(), start, 1000, Clock())
    complete, under_way, waits = start, start, 0
    for step in range(start + 1, start + 61):
        if schedule.outruns(step):
            waits += under_way != complete
            complete = under_way  # as late as can be
        due = schedule.is_due(step)
        assert step - complete <= most_lost, "were the process to die now"
        if due:
            complete = under_way  # one at a time
            schedule.saved(step)
            under_way = step
    assert waits <= 60 // max(1, most_lost - 1)
    assert not Schedule.of_memory("auto", SnapshotsConfig(), start, 1000, Clock()).outruns(start + 1000), "of which nothing was promised"


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"), [(1, 4, [1, 2, 3, 4]), (3, 7, [3, 6, 7]), (2, 4, [2, 4]), (10, 3, [3]), (5, 1, [1])]
)
def test_checkpoints_are_due_at_the_interval_and_after_the_last_epoch(interval: int, epochs: int, expected: list[int]) -> None:
    """Loss: the result of the last epochs is thrown away because they do not fill an interval."""
    training = TrainingConfig.model_validate({"epochs": epochs, "checkpoint_interval": interval})
    assert [epoch for epoch in range(1, epochs + 1) if asks_for(training, epoch)] == expected


# --- by seconds ------------------------------------------------------------------------------------------------------------


def test_seconds_count_from_the_last_save_whatever_the_step() -> None:
    """Loss: slow steps are saved too seldom, because it is steps that were counted."""
    clock = Clock()
    cadence = cadence_of(clock, interval_seconds=30.0)
    assert cadence.interval_seconds == 30.0
    clock.now += 29.9
    assert not cadence.is_due(10_000)
    clock.now += 0.2
    assert cadence.is_due(0) and cadence.is_due(1)
    cadence.saved(1)
    assert not cadence.is_due(2)
    assert due_after(cadence, clock) == pytest.approx(30.0, rel=1e-3)
    cadence.measured(Cost(write=500.0, stall=9.0, cpu=9.0))
    assert cadence.interval_seconds == 30.0, "what was asked for, whatever it costs"


def test_null_is_never() -> None:
    """Loss: somebody turns snapshots off and still pays for them."""
    clock = Clock()
    cadence = cadence_of(clock, interval_seconds=None)
    clock.now += 1e9
    cadence.measured(Cost(0.1, 0.0, 0.0))
    assert cadence.interval_seconds is None
    assert not any(cadence.is_due(step) for step in (1, 10**9))


# --- automatic -------------------------------------------------------------------------------------------------------------


def test_automatic_takes_its_first_snapshot_soon_to_measure_the_disk() -> None:
    """Loss: a guess from the size of the model decides for hours, on a disk that is ten times as fast."""
    clock = Clock()
    assert due_after(cadence_of(clock), clock) == pytest.approx(FIRST_AFTER, rel=1e-3)
    assert due_after(cadence_of(clock, expected_bytes=10**10), clock) == pytest.approx(FIRST_AFTER, rel=1e-3)
    assert FIRST_AFTER <= 60


def test_automatic_reckons_with_what_was_measured() -> None:
    """Loss: the interval of Young and Daly for a cost that nobody has measured."""
    clock = Clock()
    cadence = cadence_of(clock, hours_between_failures=2.0, max_overhead=0.5)
    cadence.measured(Cost(write=4.0, stall=0.0, cpu=0.0))
    assert cadence.interval_seconds == pytest.approx(math.sqrt(2 * 4 * 7200) - 4), "the guess before counts no more"
    cadence.saved(9)
    assert due_after(cadence, clock) == pytest.approx(236, rel=1e-3)
    cadence.measured(Cost(write=8.0, stall=0.0, cpu=0.0))
    assert cadence.interval_seconds == pytest.approx(young_daly(6.0, 7200)), "the mean of old and new"
    for _ in range(30):
        cadence.measured(Cost(write=1.0, stall=0.0, cpu=0.0))
    assert cadence.interval_seconds == pytest.approx(young_daly(1.0, 7200)), "and follows the disk"


def test_automatic_slows_training_down_by_no_more_than_was_allowed() -> None:
    """Loss: snapshots take a tenth of the time on a machine with two cores, where the writer takes them from training."""
    clock = Clock()
    cadence = cadence_of(clock, max_overhead=0.01, hours_between_failures=0.1)
    cadence.measured(Cost(write=1.0, stall=0.5, cpu=1.5))
    assert cadence.interval_seconds == pytest.approx(200.0)
    assert due_after(cadence, clock) == pytest.approx(200.0, rel=1e-3)


SECONDS = st.floats(0.0, 1e5)


@settings(deadline=None)
@given(SECONDS, SECONDS, SECONDS, st.floats(1.0, 1e7), st.floats(1e-4, 1.0))
def test_automatic_interval_keeps_its_bounds(write: float, stall: float, cpu: float, between: float, max_overhead: float) -> None:
    """Loss: writes pile up behind a slow disk, or training waits more than was allowed."""
    interval = automatic_interval(Cost(write, stall, cpu), between, max_overhead)
    assert math.isfinite(interval)
    assert interval >= write, "one on its way at a time"
    assert stall + cpu <= max_overhead * interval * (1 + 1e-9)
    assert interval >= young_daly(write, between)
    assert any(math.isclose(interval, bound) for bound in (write, (stall + cpu) / max_overhead, young_daly(write, between)))


# --- Young and Daly --------------------------------------------------------------------------------------------------------


def expected_seconds(interval: np.ndarray, write: float, between: float) -> np.ndarray:
    """Expected seconds for a second of work, exactly, if failures come at random (Daly 2006, equation 13, restart for free)."""
    return np.asarray(between * np.expm1((interval + write) / between) / interval)


@pytest.mark.parametrize("between", [600.0, 3 * HOUR, 300 * HOUR])
@pytest.mark.parametrize("ratio", [1e-6, 1e-4, 1e-3, 2e-3])
def test_young_daly_is_the_interval_that_loses_least(ratio: float, between: float) -> None:
    """Loss: work repeated after each interruption, or time spent on snapshots, more than need be."""
    write = ratio * between
    intervals = between * np.geomspace(1e-5, 10, 200_000)
    chosen = young_daly(write, between)
    simple = write / intervals + intervals / (2 * between)
    assert chosen == pytest.approx(intervals[simple.argmin()], rel=0.04)
    assert write / chosen + chosen / (2 * between) <= 1.001 * simple.min()
    exact = expected_seconds(intervals, write, between)
    assert chosen == pytest.approx(intervals[exact.argmin()], rel=0.02)
    assert expected_seconds(np.array(chosen), write, between) <= 1.0001 * exact.min()


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.499, 0.5, 0.501, 1.0, 3.0, 10.0])
def test_young_daly_is_not_far_off_where_writing_takes_as_long_as_machines_live(ratio: float) -> None:
    """Loss: on a very slow disk a formula for fast ones gives an interval of zero, or of a day."""
    intervals = np.geomspace(1e-3, 100, 200_000)
    best = expected_seconds(intervals, ratio, 1.0).min()
    assert expected_seconds(np.array(young_daly(ratio, 1.0)), ratio, 1.0) <= 1.06 * best


@settings(deadline=None)
@given(st.floats(0.0, 1e6), st.floats(1.0, 1e7))
def test_young_daly_lies_between_nothing_and_the_life_of_a_machine(write: float, between: float) -> None:
    """Loss: a negative interval: a snapshot after every step."""
    assert 0 <= young_daly(write, between) <= between
    assert (young_daly(write, between) == 0) == (write == 0)
