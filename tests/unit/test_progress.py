"""When there is no hope in starting again, and when a start only waits."""

from __future__ import annotations

import pytest

from gai_yolo.errors import NO_PROGRESS, Ending, NoProgress
from gai_yolo.goodput.progress import LEAST_SECONDS, MOST_IN_VAIN, Delay, judge_progress
from gai_yolo.goodput.record import Phase, Record, parse_records, plain

APART = 25.0
"""Seconds from one start to the next."""
LASTS = 20.0
"""Seconds of each."""


def start(
    number: int, ending: Ending | None, origin: int | None = 40, highest: int = 40, node: str = "a", rank: int = 0, apart: float = APART
) -> Record:
    """What one process says of a start; only the first of its node says anything if it is killed."""
    record = Record(1e9 + number * apart, id=f"{node}{rank}-{number}", number=number, origin=origin, highest=highest, node=node)
    record.local_rank, record.seconds = rank, {Phase.LOAD: min(LASTS, 0.8 * apart)}
    record.ending, record.outcome, record.ended = ending, ending and str(ending), record.end if ending else None
    return record


@pytest.mark.parametrize("ending", [Ending.FAILED, Ending.HUNG, Ending.HARDWARE])
def test_three_failures_from_one_step_are_enough(ending: Ending) -> None:
    """Loss: a job that crashes at the same step for ever, on machines that somebody pays for."""
    in_vain = [start(number, ending) for number in range(1, MOST_IN_VAIN + 1)]
    assert judge_progress([], 40) == judge_progress(in_vain[1:], 40) == Delay()
    with pytest.raises(NoProgress, match=rf"no progress: the last 3 starts that failed .* step 40 .* the last one: {ending}") as refusal:
        judge_progress(in_vain, 40)
    assert refusal.value.exit_code == NO_PROGRESS


def test_three_quick_failures_slow_the_job_down_first() -> None:
    """Loss: a share that had a bad moment of ten seconds ends the job for good."""
    quick = [start(number, Ending.FAILED, apart=4.0) for number in range(1, 40)]
    assert [judge_progress(quick[:count], 40).seconds for count in (2, 3, 4, 5, 8)] == [0, 1, 2, 4, 32]
    assert "3 starts from step 40 have ended before a new step was made: going on in 1 s" in judge_progress(quick[:3], 40).reason
    enough = int(LEAST_SECONDS // 4.0) + 1
    assert judge_progress(quick[: enough - 1], 40).seconds == 60
    with pytest.raises(NoProgress):
        judge_progress(quick[:enough], 40)


@pytest.mark.parametrize("ending", [None, Ending.PEER_LOST, Ending.AGENT_GONE, Ending.UNKNOWN])
def test_sudden_deaths_never_end_a_job(ending: Ending | None) -> None:
    """Loss: `kill -9` three times during the start, by a kernel that is short of memory, and the job is over for good."""
    deaths = [start(number, ending) for number in range(1, 101)]
    assert [judge_progress(deaths[:count], 40).seconds for count in (2, 3, 4, 9, 100)] == [0, 1, 2, 60, 60]


@pytest.mark.parametrize("ending", [Ending.LEFT, Ending.PEER_LEFT, Ending.WAITING])
def test_what_was_asked_to_leave_or_waits_for_a_disk_does_not_count(ending: Ending) -> None:
    """Loss: a node that is preempted again and again while it starts is given up, or put to sleep."""
    assert judge_progress([start(number, ending) for number in range(1, 50)], 40) == Delay()
    failed = [start(number, Ending.FAILED) for number in (1, 3, 5)]
    assert judge_progress([*failed[:2], start(2, ending), start(4, ending)], 40) == Delay()
    with pytest.raises(NoProgress):
        judge_progress([*failed, start(2, ending), start(4, ending)], 40)


@pytest.mark.parametrize("of_the_first", [Ending.PEER_LOST, Ending.LEFT])
def test_a_fault_that_another_process_of_the_node_saw_first_counts(of_the_first: Ending) -> None:
    """Loss: a bug in the second process is taken for the loss of a peer, or for a notice, and the job is started again for ever."""
    records = [start(number, Ending.FAILED, rank=1) for number in (1, 2, 3)]
    for record in records:
        assert record.ended is not None
        record.ended -= 0.5
    firsts = [start(number, of_the_first) for number in (1, 2, 3)]
    assert judge_progress(firsts, 40) == Delay(1.0 if of_the_first == Ending.PEER_LOST else 0.0, judge_progress(firsts, 40).reason)
    with pytest.raises(NoProgress, match="the last one: failed"):
        judge_progress([*records, *firsts], 40)


@pytest.mark.parametrize(
    "middle",
    [
        start(3, Ending.FAILED, highest=41),
        start(3, Ending.FAILED, origin=30),
        *(start(3, ending) for ending in (Ending.NO_PROGRESS, Ending.INTERRUPTED, Ending.REFUSED, Ending.DIVERGED, Ending.FINISHED)),
    ],
    ids=["a step that was lost again", "a start from further back", "given up", "interrupted", "refused", "diverged", "finished"],
)
def test_progress_or_a_person_in_between_breaks_the_row(middle: Record) -> None:
    """Loss: a job that gets on between faults is stopped; or who has mended it cannot start it."""
    in_vain = [start(number, Ending.FAILED) for number in (1, 2, 4, 5)]
    assert judge_progress([*in_vain, middle], 40) == Delay()
    with pytest.raises(NoProgress):
        judge_progress([*in_vain, middle, start(6, Ending.FAILED)], 40)


def test_the_same_steps_again_up_to_the_same_fault_are_no_progress() -> None:
    """Loss: an image that no machine has the memory for, seven steps after each snapshot, is run into for ever at full speed."""
    replays = [start(number, Ending.FAILED, highest=47) for number in range(1, 5)]
    assert judge_progress(replays[:3], 40) == Delay(), "the first one had made steps that were new"
    with pytest.raises(NoProgress):
        judge_progress(replays, 40)


def test_a_finished_run_may_be_started_as_often_as_one_likes() -> None:
    """Loss: the fifth look at a finished run is called a failure, and exits with another code than the four before."""
    assert judge_progress([start(number, Ending.FINISHED, 100, 100) for number in range(1, 9)], 100) == Delay()


def test_going_on_from_elsewhere_is_another_matter() -> None:
    """Loss: the newest state is gone, and the one before it is not even tried."""
    assert judge_progress([start(number, Ending.FAILED) for number in (1, 2, 3)], 30) == Delay()


def test_a_start_is_what_all_its_nodes_say_of_it() -> None:
    """Loss: one node that saw the step end is not heard; or three nodes of one start are taken for three starts."""
    assert judge_progress([start(1, Ending.FAILED, node=node) for node in "abc"], 40) == Delay()
    several = [start(number, Ending.FAILED, node=node) for number in (1, 2, 3) for node in "ab"]
    with pytest.raises(NoProgress):
        judge_progress(several, 40)
    assert judge_progress([*several[:-1], start(3, Ending.FAILED, highest=41, node="b")], 40) == Delay()


def test_records_of_older_and_later_versions_are_read() -> None:
    """Loss: an update in the middle of a run ends every start, or forgets its accounts; or words of people decide again."""
    old = plain(start(1, None))
    old |= {"outcome": "failed: KeyError", "ended": 1e9 + 30.0}
    del old["ending"], old["local_rank"]
    later = {**plain(start(1, Ending.FAILED)), "ending": "abducted", "format": 1}
    foreign = [{"format": 7}, {}]
    for one in (old, later):
        copies = [{**one, "id": str(number), "number": number, "began": one["began"] + 30 * number} for number in (1, 2, 3)]
        assert judge_progress(parse_records([*foreign, *copies]), 40).seconds == 1.0
