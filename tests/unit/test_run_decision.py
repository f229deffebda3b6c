"""Whose run it is, decided from what the nodes hold and from nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.errors import Refusal
from gai_yolo.membership.decision import KEPT, Claim, Fate, decide, is_open, turns_after
from gai_yolo.store.manifest import Position
from gai_yolo.store.run_record import START, RunRecord, Settled, Turn

SETTINGS: dict[str, Any] = {"training.batch_size": 16, "loss.box": 7.5, "data": "d" * 64}
OTHER = SETTINGS | {"training.batch_size": 8}


def at(step: int) -> Position:
    return Position(step, step // 10, 16 * step)


def turn(step: int = 0, settings: dict[str, Any] = SETTINGS, rollback: str = "") -> Turn:
    return Turn(at(step), settings, rollback)


def claim(node: str, run_id: str, step: int | None, *turns: Turn, tier: Literal["disk", "memory"] = "disk", anchored: bool = True) -> Claim:
    record = RunRecord(run_id, turns or (turn(),), {"threads": Settled(len(run_id), {})}, anchored)
    return Claim(f"{node}:/{tier}", tier, record, None if step is None else at(step))


def decided(*claims: Claim, exact: bool = True) -> tuple[RunRecord, dict[str, Fate]]:
    """The decision, which no order of the claims may change."""
    outcomes = []
    for order in itertools.permutations(claims):
        record, fates = decide(order, started_over=False, exact=exact, name="new")
        outcomes.append((record, {one.place: fate for one, fate in zip(order, fates, strict=True)}))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]


def refused(*claims: Claim) -> str:
    """The sentence, which no order of the claims may change."""
    said = set()
    for order in itertools.permutations(claims):
        with pytest.raises(Refusal) as refusal:
            decide(order, started_over=False, exact=True, name="new")
        assert refusal.value.exit_code == 2
        said.add(str(refusal.value))
    (sentence,) = said
    return sentence


def test_nobody_holds_anything() -> None:
    """Loss: the first start has no name; or one that it will not keep."""
    assert decided() == (RunRecord("1-new"), {})
    record, fates = decided(claim("a", "1-a", None), claim("b", "1-b", None), claim("c", "1-b", None))
    assert record.run_id == "1-b" and set(fates.values()) == {KEPT}


def test_machines_of_one_name_are_no_reason_to_decide_by_the_rank() -> None:
    """Loss: ranks that write down different settings of one run."""
    unsaid = replace(claim("a", "1-b", None), record=RunRecord("1-b"))
    record, _ = decided(unsaid, claim("a", "1-b", None, turn(settings=OTHER)), claim("a", "1-b", None))
    assert record.turns in ((turn(),), (turn(settings=OTHER),))


def test_of_one_trajectory_the_most_progress_wins_whatever_the_rank() -> None:
    """Loss: a new node that booted first, and trained one epoch, beats the node with the work."""
    record, fates = decided(claim("new", "1-a", 10), claim("old", "1-b", 45), claim("empty", "1-c", None))
    assert record.run_id == "1-b" and set(fates.values()) == {KEPT}
    record, _ = decided(claim("new", "1-a", 10), claim("new", "1-a", 10, tier="memory"), claim("new2", "1-a", 9), claim("old", "1-b", 45))
    assert record.run_id == "1-b", "the others are more"


@pytest.mark.parametrize("tier", ["disk", "memory"])
def test_progress_counts_on_whatever_tier(tier: Literal["disk", "memory"]) -> None:
    """Loss: what only a node's memory holds is given up for less on another one's disk."""
    record, fates = decided(claim("a", "1-a", 30), claim("b", "1-b", None if tier == "memory" else 31), claim("b", "1-b", 31, tier=tier))
    assert record.run_id == "1-b" and set(fates.values()) == {KEPT}


def test_many_empty_nodes_do_not_outvote_one_that_has_trained() -> None:
    """Loss: as above, by the number of machines."""
    record, _ = decided(*(claim(node, "1-a", None) for node in "abc"), claim("old", "1-b", 5))
    assert record.run_id == "1-b"


def test_memory_of_a_run_that_no_folder_knows_is_moved_aside() -> None:
    """Loss: a run that somebody deleted comes back from memory; or is deleted there, where nobody has looked yet."""
    record, fates = decided(claim("a", "1-a", 3), claim("a", "1-gone", 50, tier="memory"))
    assert record.run_id == "1-a" and fates["a:/memory"].aside and fates["a:/disk"] == KEPT
    _, fates = decided(claim("a", "1-gone", 50, tier="memory"))
    assert fates["a:/memory"].aside
    record, fates = decided(claim("a", "1-a", 3), claim("b", "2-gone", 50, tier="memory"))
    assert record.run_id == "1-a" and fates["a:/disk"] == KEPT, "it does not start anybody over either"


def test_memory_counts_alone_if_the_folder_was_never_told() -> None:
    """Loss: the disk was full from the beginning, and what memory holds is taken for that of a deleted run."""
    record, fates = decided(claim("a", "1-a", 50, tier="memory", anchored=False))
    assert record.run_id == "1-a" and fates["a:/memory"] == KEPT


def test_who_was_away_when_the_run_was_started_over_follows() -> None:
    """Loss: machines come back with the old run, which has more progress, and it goes on in place of the one that somebody wanted."""
    record, fates = decided(claim("a", "2-new", 5), claim("b", "1-old", 90), claim("b", "1-old", 95, tier="memory"))
    assert record.run_id == "2-new"
    assert fates["b:/disk"].aside and fates["b:/memory"].aside and fates["a:/disk"] == KEPT


def test_starting_over_moves_everything_aside() -> None:
    """Loss: the old run comes back, or is gone."""
    record, fates = decide([claim("a", "3-x", 5), claim("b", "1-y", 9, tier="memory")], started_over=True, exact=True, name="new")
    assert record == RunRecord("4-new") and all(fate.aside for fate in fates)


@pytest.mark.parametrize("old", [1, 2])
def test_the_nodes_of_a_job_that_started_over_belong_together_whoever_comes_later(old: int) -> None:
    """Loss: --fresh on an empty node beside one with the old run: the old one goes on, or its more restarts outdate the new one."""
    begun = replace(claim("a", "2-new", 5), record=RunRecord("2-new", (turn(),), launch="job"))
    stale = claim("b", f"{old}-old", 90)
    record, fates = decide([stale, begun], started_over=False, exact=True, name="x", launch="job")
    assert (record.run_id, record.launch) == ("2-new", "job")
    assert fates[0].aside and fates[1] == KEPT
    record, _ = decide([stale, begun], started_over=False, exact=True, name="x")
    record, _ = decide([stale, begun], started_over=False, exact=True, name="x", launch="another")
    assert record.run_id == ("2-old" if old == 2 else "2-new"), "which has not asked for it"


def test_a_job_that_started_over_does_not_guess_whether_somebody_did_so_again_elsewhere() -> None:
    """Loss: --fresh on an empty node, whose work then follows an old run that was started over more often; or the other way round."""
    begun = replace(claim("a", "1-new", 5), record=RunRecord("1-new", (turn(),), launch="job"))
    with pytest.raises(Refusal, match=r"b:/disk .* and a:/disk .* hold different runs"):
        decide([begun, claim("b", "2-old", 90)], started_over=False, exact=True, name="x", launch="job")


def test_what_a_job_has_started_over_is_marked_as_its_own() -> None:
    """Loss: the rule above never applies."""
    record, _ = decide([claim("a", "1-old", 5)], started_over=True, exact=True, name="new", launch="job")
    assert record == RunRecord("2-new", launch="job")
    record, fates = decide([Claim("a:/disk", "disk", record)], started_over=False, exact=True, name="new", launch="job")
    assert (record.run_id, record.launch, fates) == ("2-new", "job", [KEPT])


def test_different_runs_are_refused_with_both_named() -> None:
    """Loss: work of weeks is moved aside for that of an hour, and nobody has decided it."""
    sentence = refused(claim("a", "1-a", 10, turn(settings=OTHER)), claim("b", "1-b", 45), claim("c", "1-c", None, turn(settings=OTHER)))
    assert sentence.startswith(
        "b:/disk (epoch 4, step 45) and a:/disk (epoch 1, step 10) hold different runs (training.batch_size is 16 and 8)"
    )
    assert "move the folder that is not wanted aside" in sentence and "--fresh" in sentence and "experiment.name" in sentence


def test_what_differs_is_told_in_short() -> None:
    """Loss: a sentence of a page, in which nobody finds what matters."""
    many = [SETTINGS | {f"augment.{letter}": value for letter in "abcdef"} for value in (0, 1)]
    sentence = refused(claim("a", "1-a", 10, turn(settings=many[1])), claim("b", "1-b", 45, turn(settings=many[0])))
    assert "augment.a is 0 and 1, augment.b is 0 and 1, augment.c is 0 and 1, and 3 more keys differ" in sentence


def test_a_key_that_another_version_does_not_know_makes_no_other_run() -> None:
    """Loss: after an update with a new setting, a node that was away is refused."""
    newer = turn(settings=SETTINGS | {"training.new": 3})
    record, fates = decided(claim("a", "1-a", 10, newer), claim("b", "1-b", 45))
    assert record.run_id == "1-b" and set(fates.values()) == {KEPT}
    assert turns_after(record, at(45), newer.settings) == record.turns


def test_a_run_of_an_older_version_whose_settings_are_unknown_is_not_mixed_with_another() -> None:
    """Loss: as above, because nothing was written down."""
    unknown = replace(claim("a", "1-a", 45), record=RunRecord("1-a"))
    assert "hold different runs: nothing" in refused(unknown, claim("b", "1-b", 10))
    record, fates = decided(unknown, claim("b", "1-a", 10))
    assert record.run_id == "1-a" and record.turns == (turn(),) and set(fates.values()) == {KEPT}, "of one name"


def test_a_folder_without_a_name_joins_and_is_joined() -> None:
    """Loss: a run of an older version is given up for an empty folder that has a name."""
    record, fates = decided(claim("a", "", 45), claim("b", "1-b", 10))
    assert record.run_id == "1-new" and set(fates.values()) == {KEPT}
    assert decided(claim("a", "", 5), claim("b", "1-b", 10))[0].run_id == "1-b"
    assert decided(claim("a", "", 5), claim("b", "", 5))[0].run_id == "1-new"


def test_without_exact_sums_runs_do_not_join() -> None:
    """Loss: states that are called equal because their step is; half of the job goes on from the one and half from the other."""
    record, fates = decided(claim("a", "1-a", 10), claim("b", "1-b", 45), claim("c", "1-c", None), exact=False)
    assert record.run_id == "1-b"
    assert fates["a:/disk"].aside and "less progress than b:/disk" in fates["a:/disk"].why and fates["c:/disk"] == KEPT


def test_changed_settings_are_part_of_the_way() -> None:
    """Loss: a node trains on with other settings, the other without, and at an equal step both call theirs the state of the run."""
    changed = (turn(), turn(40, SETTINGS | {"loss.box": 15}))
    record, fates = decided(claim("a", "1-a", 50, *changed), claim("b", "1-a", 45))
    assert record.turns == changed and fates["b:/disk"].beyond == at(40)
    record, fates = decided(claim("a", "1-a", 45, *changed), claim("b", "1-a", 50))
    assert record.turns == (turn(),) and fates["a:/disk"].beyond == at(40), "the most progress of one run counts"
    assert decided(claim("a", "1-a", 50, *changed), claim("b", "1-a", 40))[1]["b:/disk"] == KEPT
    assert decided(claim("a", "1-a", 50, *changed), claim("b", "1-b", 40))[1]["b:/disk"] == KEPT, "up to there they are one"
    assert "(loss.box is 15 and 7.5)" in refused(claim("a", "1-a", 50, *changed), claim("b", "1-b", 45))
    back = (turn(), turn(20, rollback="r"))
    assert "(somebody has gone back in one of them)" in refused(claim("a", "1-a", 50), claim("b", "1-b", 45, *back))
    assert "loss.box is 15 and 30" in refused(
        claim("a", "1-a", 50, *changed), claim("b", "1-b", 45, turn(), turn(30, SETTINGS | {"loss.box": 30}))
    )


def test_who_has_gone_back_is_followed_and_what_is_newer_elsewhere_moved_aside() -> None:
    """Loss: a person goes back to epoch 2, and another node's memory or disk undoes it."""
    back = (turn(), turn(20, rollback="r1"))
    claims = [claim("a", "1-a", 20, *back), claim("b", "1-a", 60), claim("c", "1-a", 65, tier="memory"), claim("d", "1-a", 15)]
    record, fates = decided(*claims)
    assert record.turns == back
    assert [fates[one.place].beyond for one in claims] == [None, at(20), at(20), None]
    assert fates["b:/disk"].why == "a person has gone back"
    twice = (*back, turn(10, rollback="r2"))
    record, fates = decided(claim("a", "1-a", 12, *twice), claim("b", "1-a", 60, *back))
    assert record.turns == twice and fates["b:/disk"].beyond == at(10)


@pytest.mark.parametrize(
    "first", [turn(50, rollback="r1"), turn(40, SETTINGS | {"training.epochs": 9})], ids=["further back", "after a turn"]
)
def test_who_has_gone_back_twice_is_followed_by_who_was_away_all_the_time(first: Turn) -> None:
    """Loss: a person goes back to epoch 5, then to epoch 2; a node that was away the whole time brings epoch 5 back."""
    back = (turn(), first, turn(20, rollback="r2"))
    claims = [claim("a", "1-a", 20, *back), claim("b", "1-a", 80), claim("c", "1-a", 40, tier="memory"), claim("d", "1-a", 15)]
    record, fates = decided(*claims)
    assert record.turns == back
    assert [fates[one.place].beyond for one in claims] == [None, at(20), at(20), None]


def test_only_what_differs_takes_a_look_at_the_states() -> None:
    """Loss: each start reads every node's newest state twice."""
    assert not is_open([])
    assert not is_open([claim("a", "1-a", None), claim("b", "1-a", None), claim("b", "1-a", None, tier="memory")])
    assert is_open([claim("a", "1-a", None), claim("b", "1-b", None)])
    assert is_open([claim("a", "1-a", None), claim("b", "1-a", None, turn(), turn(20, rollback="r"))])


def test_turns_follow_the_settings() -> None:
    """Loss: a run that went on with other settings is taken for the one that did not."""
    begun = RunRecord("1-a", turns_after(RunRecord("1-a"), None, SETTINGS))
    assert begun.turns == (Turn(START, SETTINGS),)
    assert turns_after(begun, at(20), SETTINGS) == begun.turns
    assert turns_after(begun, at(20), OTHER) == (*begun.turns, Turn(at(20), OTHER))
    assert turns_after(begun, None, OTHER) == (Turn(START, OTHER),), "nothing was saved: nothing is bound"
    weights = SETTINGS | {"model.weights": "a.pt"}
    tuned = RunRecord("1-a", turns_after(RunRecord("1-a"), None, weights))
    assert turns_after(tuned, at(20), SETTINGS | {"model.weights": None}) == tuned.turns, "they play no part after the beginning"


WAYS = [
    (turn(),),
    (turn(), turn(20, SETTINGS | {"loss.box": 15})),
    (turn(), turn(20, rollback="r1")),
    (turn(), turn(50, rollback="r2"), turn(30, rollback="r3")),
    (turn(settings=OTHER),),
    (),
]
CLAIMS = st.builds(
    lambda node, run, step, way, tier, anchored: replace(
        claim(node, run, step, tier=tier), record=RunRecord(run, WAYS[way], {}, anchored or tier == "disk")
    ),
    st.sampled_from("abcd"),
    st.sampled_from(["1-a", "1-b", "2-c", ""]),
    st.one_of(st.none(), st.integers(1, 60)),
    st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5]),
    st.sampled_from(["disk", "disk", "memory"]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CLAIMS, max_size=5, unique_by=lambda one: (one.place, one.tier)), st.randoms(use_true_random=False), st.booleans())
def test_whatever_the_nodes_hold_all_decide_alike_and_no_progress_is_passed_over(claims: list[Claim], rng: Random, exact: bool) -> None:
    """Loss: ranks that disagree, and wait for each other; or states that are moved aside for older ones."""

    def outcome(order: Sequence[Claim]) -> tuple[RunRecord, dict[str, Fate]] | str:
        try:
            record, fates = decide(order, started_over=False, exact=exact, name="new")
        except Refusal as refusal:
            return str(refusal)
        return record, {one.place: fate for one, fate in zip(order, fates, strict=True)}

    decision = outcome(claims)
    assert outcome(rng.sample(claims, len(claims))) == decision
    if isinstance(decision, str):
        assert sum(one.progress is not None for one in claims) > 1, "an empty folder refuses nobody"
        return
    record, fates = decision

    def kept(one: Claim) -> int:
        """The step that is still gone on from."""
        if one.progress is None or fates[one.place].aside:
            return 0
        beyond = fates[one.place].beyond
        return one.progress.step if beyond is None else min(one.progress.step, beyond.step)

    followed = max((one.record.rollbacks for one in claims if kept(one)), default=0)
    known = {one.record.run_id for one in claims if one.tier == "disk"}
    counting = [one for one in claims if one.tier == "disk" or not one.record.anchored or one.record.run_id in known]
    newest = max((one.record.generation for one in counting), default=1)
    for one in counting:
        if one.progress is None or one.record.generation < newest or one.record.rollbacks < followed:
            continue
        assert one.progress.step <= max(map(kept, claims)), (one, record, fates)
    for one in counting:
        behind = [turn.position.step for turn in record.turns if turn.rollback and turn not in one.record.turns]
        if one.record.turns and one.record.generation == newest and behind:
            assert kept(one) <= min(behind), "what a person has gone back from is gone"
