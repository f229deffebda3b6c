"""What may be removed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.retention import BEST, EVERY_EPOCH, LAST, NOT_BEST, Decision, Policy, best_of, decide

STEPS = 10
"""Of an epoch, in the tables."""


def manifest(kind: Literal["epoch", "step"], position: Position, metric: float | None = None, due: bool = True) -> Manifest:
    return Manifest(kind, position, 1, "0" * 64, 1, "f", "t", "2026-01-01T00:00:00Z", metric, due)


def epoch(number: int, metric: float | None = None, due: bool = True) -> Manifest:
    return manifest("epoch", Position(STEPS * number, number, 8 * STEPS * number), metric, due)


def step(number: int) -> Manifest:
    """In the middle of an epoch, or right after its last step and before its evaluation."""
    return manifest("step", Position(number, (number - 1) // STEPS, 8 * number))


def kept(decisions: Sequence[Decision]) -> list[Manifest]:
    return [decision.manifest for decision in decisions if decision.keep]


def reasons(verified: Sequence[Manifest], policy: Policy) -> list[str]:
    """One line for each: the name, `+` or `-`, the reason."""
    return [f"{one.manifest.stem} {'+' if one.keep else '-'} {one.reason}" for one in decide(verified, policy)]


# --- each reason -----------------------------------------------------------------------------------------------------------


def test_nothing_is_decided_about_nothing() -> None:
    """Loss: the first write of a run ends in an error because there is no newest checkpoint yet."""
    assert decide([], Policy()) == []
    assert best_of([]) is None


@pytest.mark.parametrize("only", [step(3), epoch(1), epoch(1, due=False), epoch(1, metric=0.0, due=False)])
def test_the_only_checkpoint_stays_whatever_it_is(only: Manifest) -> None:
    """Loss: the only checkpoint of a run is removed."""
    assert decide([only], Policy(keep_steps=1, keep_epochs=1)) == [Decision(only, True, LAST)]


def test_snapshots_go_when_enough_newer_ones_are_complete() -> None:
    """Loss: a disk full of snapshots; or none left that is older than a damaged newest one."""
    verified = [step(number) for number in (3, 6, 9, 12, 15)]
    assert reasons(verified, Policy(keep_steps=2)) == [
        "step_00000003 - older than the newest 2 snapshots",
        "step_00000006 - older than the newest 2 snapshots",
        "step_00000009 - older than the newest 2 snapshots",
        "step_00000012 + among the newest 2 snapshots",
        f"step_00000015 + {LAST}",
    ]
    assert kept(decide(verified, Policy(keep_steps=1))) == verified[-1:]
    assert kept(decide(verified, Policy(keep_steps=9))) == verified


def test_snapshots_stay_when_a_newer_epoch_checkpoint_is_there() -> None:
    """Loss: the epoch checkpoint is damaged, and the one to go back to is a whole epoch older."""
    verified = [step(3), step(6), step(10), epoch(1), epoch(2)]
    assert reasons(verified, Policy(keep_steps=2)) == [
        "step_00000003 - older than the newest 2 snapshots",
        "step_00000006 + among the newest 2 snapshots",
        "step_00000010 + among the newest 2 snapshots",
        f"epoch_001 + {EVERY_EPOCH}",
        f"epoch_002 + {LAST}",
    ]


def test_epochs_all_stay_unless_a_number_is_asked_for() -> None:
    """Loss: somebody wanted every epoch and finds ten; or wanted two and finds a full disk."""
    verified = [epoch(number) for number in range(1, 6)]
    assert reasons(verified, Policy()) == [*(f"epoch_00{number} + {EVERY_EPOCH}" for number in range(1, 5)), f"epoch_005 + {LAST}"]
    assert reasons(verified, Policy(keep_epochs=2)) == [
        *(f"epoch_00{number} - older than the newest 2 epoch checkpoints" for number in range(1, 4)),
        "epoch_004 + among the newest 2 epoch checkpoints",
        f"epoch_005 + {LAST}",
    ]


def test_every_so_many_epochs_one_stays_for_ever() -> None:
    """Loss: the checkpoints that were meant for an ablation over the whole run are gone."""
    verified = [epoch(number) for number in range(1, 10)]
    policy = Policy(keep_epochs=1, keep_every=3)
    assert [one.stem for one in kept(decide(verified, policy))] == ["epoch_003", "epoch_006", "epoch_009"]
    assert reasons(verified, policy)[2] == "epoch_003 + every 3 epochs one is kept"


def test_the_best_stays_however_old_and_not_due() -> None:
    """Loss: the result of the run, its best epoch, is removed to make room."""
    verified = [epoch(1, 0.1, due=False), epoch(2, 0.5, due=False), epoch(3, 0.3), epoch(4, 0.4), epoch(5)]
    assert reasons(verified, Policy(keep_epochs=1)) == [
        f"epoch_001 - {NOT_BEST}",
        f"epoch_002 + {BEST}",
        "epoch_003 - older than the newest 1 epoch checkpoints",
        "epoch_004 - older than the newest 1 epoch checkpoints",
        f"epoch_005 + {LAST}",
    ]
    assert reasons(verified, Policy())[0] == f"epoch_001 - {NOT_BEST}", "also where every epoch is kept"


def test_checkpoints_that_were_not_due_do_not_count_among_the_newest() -> None:
    """Loss: a run that improves with every epoch pushes out the ones that the interval asked for."""
    verified = [epoch(4), epoch(5, 0.1, due=False), epoch(6, 0.2, due=False), epoch(7, 0.3, due=False)]
    assert kept(decide(verified, Policy(keep_epochs=1))) == [verified[0], verified[3]]


def test_the_earliest_of_equally_good_epochs_is_the_best() -> None:
    """Loss: `best.pt` is written anew with every epoch of a run that does not improve."""
    verified = [epoch(4, 0.5), epoch(2, 0.5), epoch(3, 0.5), epoch(1, 0.25), epoch(5, None)]
    assert best_of(verified) == epoch(2, 0.5)
    assert best_of([epoch(1), epoch(2), step(25)]) is None
    assert best_of([epoch(1, 0.0), epoch(2)]) == epoch(1, 0.0), "0.0 is a metric"


# --- laws ------------------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn, least: int = 0) -> list[Manifest]:
    """Complete checkpoints that one run can have, in any order; some were lost or damaged on the way."""
    manifests: list[Manifest] = []
    steps = epochs = 0
    for _ in range(draw(st.integers(least, 14))):
        kind: Literal["epoch", "step"] = "epoch" if draw(st.booleans()) else "step"
        steps += draw(st.integers(0 if kind == "epoch" else 1, 3))
        if kind == "epoch":
            epochs += draw(st.integers(1, 2))
            metric = draw(st.none() | st.sampled_from([0.0, 0.1, 0.2, 0.3]))
            manifests.append(manifest("epoch", Position(steps, epochs, 8 * steps), metric, draw(st.booleans())))
        else:
            manifests.append(manifest("step", Position(steps, epochs, 8 * steps)))
    return draw(st.permutations(manifests))


POLICIES = st.builds(
    Policy, keep_steps=st.integers(1, 4), keep_epochs=st.just("all") | st.integers(1, 4), keep_every=st.none() | st.integers(1, 4)
)


@settings(deadline=None)
@given(runs(), POLICIES)
def test_each_has_one_decision_with_a_reason_in_the_order_given(verified: list[Manifest], policy: Policy) -> None:
    """Loss: a removal that nobody can explain, or a checkpoint that is decided upon in the place of another."""
    decisions = decide(verified, policy)
    assert [decision.manifest for decision in decisions] == verified
    assert all(decision.reason for decision in decisions)
    removed = {decision.reason for decision in decisions if not decision.keep}
    assert all(reason == NOT_BEST or reason.startswith("older than the newest") for reason in removed)


@settings(deadline=None)
@given(runs(least=1), POLICIES)
def test_the_newest_is_always_kept(verified: list[Manifest], policy: Policy) -> None:
    """Loss: training goes back further than it had to."""
    assert max(verified, key=lambda one: one.position) in kept(decide(verified, policy))


@settings(deadline=None)
@given(runs(), POLICIES)
def test_the_best_is_always_kept(verified: list[Manifest], policy: Policy) -> None:
    """Loss: the best weights of the run."""
    evaluated = [one for one in verified if one.kind == "epoch" and one.metric is not None]
    highest = max((one.metric or 0.0 for one in evaluated), default=None)
    best = best_of(verified)
    assert (best is None) == (highest is None)
    if best is not None:
        assert best.metric == highest and best in kept(decide(verified, policy))


@settings(deadline=None)
@given(runs(), POLICIES)
def test_no_more_is_kept_than_was_asked_for(verified: list[Manifest], policy: Policy) -> None:
    """Loss: the disk fills up in the night."""
    after = kept(decide(verified, policy))
    assert sum(one.kind == "step" for one in after) <= policy.keep_steps + 1
    if policy.keep_epochs != "all":
        for_ever = [one for one in after if policy.keep_every and one.position.epoch % policy.keep_every == 0]
        others = [one for one in after if one.kind == "epoch" and one not in for_ever]
        assert len(others) <= policy.keep_epochs + 2, "the best and the newest beside them"


@settings(deadline=None)
@given(runs(), POLICIES)
def test_no_less_is_kept_than_was_asked_for(verified: list[Manifest], policy: Policy) -> None:
    """Loss: a second damaged checkpoint, and nothing older is there any more."""
    after = kept(decide(verified, policy))
    for kind, count in (("step", policy.keep_steps), ("epoch", policy.keep_epochs)):
        due = sorted((one for one in verified if one.kind == kind and one.due), key=lambda one: one.position, reverse=True)
        assert all(one in after for one in (due if count == "all" else due[:count]))


@settings(deadline=None)
@given(runs(), POLICIES)
def test_deciding_again_on_what_was_kept_removes_nothing(verified: list[Manifest], policy: Policy) -> None:
    """Loss: each start of a run that saves nothing eats one more of its checkpoints."""
    after = kept(decide(verified, policy))
    assert kept(decide(after, policy)) == after


@settings(deadline=None)
@given(runs(), POLICIES, st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_the_order_of_a_listing(verified: list[Manifest], policy: Policy, random: Random) -> None:
    """Loss: another file system lists in another order, and other checkpoints go."""
    shuffled = random.sample(verified, len(verified))
    by_name = {one.manifest.stem: one for one in decide(verified, policy)}
    assert {one.manifest.stem: one for one in decide(shuffled, policy)} == by_name


@settings(deadline=None)
@given(runs(least=2), POLICIES, st.data())
def test_an_older_entry_never_makes_a_newer_snapshot_go(verified: list[Manifest], policy: Policy, data: st.DataObject) -> None:
    """Loss: an old checkpoint that somebody copied back pushes out a newer one."""
    older = data.draw(st.sampled_from(verified))
    without = kept(decide([one for one in verified if one is not older], policy))
    newer = [one for one in without if one.kind == "step" and one.position > older.position]
    with_it = kept(decide(verified, policy))
    assert [one.stem for one in newer if one not in with_it] == []
