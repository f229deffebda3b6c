"""The account of a job's time over all its starts."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gai_yolo.errors import Ending
from gai_yolo.goodput.causes import KILLED
from gai_yolo.goodput.record import Phase, Record, parse_records
from gai_yolo.goodput.report import SILENCE, as_json, from_json, report, scalars
from gai_yolo.goodput.timeline import TIME_PARTS
from tests.starts import EPOCH, TICK, Node

thorough = settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
ticks = st.integers(0, 640).map(lambda count: count * TICK)


@dataclass
class Job:
    """A simulated job, and what happened in it, counted beside the recorder."""

    choose: Callable[[Any], Any]
    now: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    records: list[Record] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """In the order in which they were completed."""
    position: int = 0
    went_back: int = 0
    fired: Counter[str] = field(default_factory=Counter)

    def start(self, number: int, finishes: bool) -> None:
        """One start up to its end."""
        node = Node(self.now, number, world_size=self.choose(st.integers(1, 4)))
        pending = self.live(node)
        self.parts["closing" if finishes else "lost"] += pending
        ending = Ending.FINISHED if finishes else self.choose(st.sampled_from([None, Ending.LEFT]))
        record = node.end(ending)
        self.records.append(record)
        for number_of_node in range(self.choose(st.integers(0, 2))):  # nodes whose last entry is a little older
            self.records.append(replace(record, node=f"b{number_of_node}", id=f"{number} {number_of_node}", pending_seconds=0.0))
        self.now = node.clock.now - EPOCH

    def live(self, node: Node) -> float:
        """Go through the phases until the death; returns the seconds in a step that was not completed."""
        recorder = node.recorder
        for phase in (Phase.IMPORT, Phase.RENDEZVOUS, Phase.LOAD):
            self.spend(node, phase)
            if self.dies():
                self.fired["died before training"] += 1
                return 0.0
        origin = max(0, self.position - self.choose(st.integers(0, 3)))
        self.went_back += self.position - origin
        self.fired["went back"] += origin < self.position
        self.position = origin
        recorder.started_from(origin, 1, "durable", max(self.steps, default=0), 1000, 10)
        for step in range(origin + 1, origin + 1 + self.choose(st.integers(0, 6))):
            self.spend(node, Phase.DATA)
            recorder.enter(Phase.STEP)
            before, after = self.seconds(), self.seconds()
            node.clock.now += before
            self.spend(node, Phase.SNAPSHOT)
            recorder.enter(Phase.STEP)
            node.clock.now += after
            if self.dies():
                self.fired["died in a step"] += 1
                return before + after
            recorder.step_done(step, 1)
            self.parts["replayed" if step in self.steps else "useful"] += before + after
            self.steps.append(step)
            self.position = step
            self.spend(node, Phase.EVALUATION if step % 3 == 0 else Phase.REPORTING)
        return 0.0

    def spend(self, node: Node, phase: Phase) -> None:
        """Stay in a phase for some time."""
        seconds = self.seconds()
        node.spend(phase, seconds)
        self.parts[phase] += seconds

    def seconds(self) -> float:
        """Some time."""
        return float(self.choose(ticks))

    def dies(self) -> bool:
        """Whether it is now."""
        return bool(self.choose(st.integers(0, 7)) == 0)

    def rest(self) -> None:
        """Nobody is alive."""
        seconds = self.choose(ticks.filter(bool))
        self.parts["downtime"] += seconds
        self.now += seconds


def test_any_schedule_of_deaths_is_accounted_for_to_the_last_second(figure: Callable[[str], None]) -> None:
    """Loss: an account that does not add up, or that forgets what a death has cost."""
    fired: Counter[str] = Counter()

    @thorough
    @given(st.data())
    def check(data: st.DataObject) -> None:
        job, count = Job(data.draw), data.draw(st.integers(1, 6))
        finishes = data.draw(st.booleans())
        for number in range(1, count + 1):
            if number > 1:
                job.rest()
            job.start(number, finishes and number == count)
        random.Random(0).shuffle(job.records)
        found = report(job.records)
        assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-6)
        assert found.wall == pytest.approx(job.now, abs=1e-6)
        assert found.seconds == pytest.approx({part: job.parts[part] for part in TIME_PARTS}, abs=1e-6)
        assert found.useful_steps == len(set(job.steps))
        assert found.replayed_steps == len(job.steps) - len(set(job.steps))
        assert found.lost_steps == job.went_back
        assert len(found.interruptions) == count - finishes == found.starts - finishes
        assert sum(one.downtime for one in found.interruptions) == pytest.approx(job.parts["downtime"], abs=1e-6)
        assert sum(one.lost_seconds for one in found.interruptions) == pytest.approx(job.parts["lost"], abs=1e-6)
        assert (found.step, found.counted_once, found.paused) == (job.position, 0.0, 0.0)
        assert report([*job.records[::-1], *job.records]) == found == from_json(as_json(found))
        fired.update(job.fired + Counter(schedules=1, finished=int(finishes), replayed=int(found.replayed_steps > 0)))

    check()
    figure(f"accounts of random schedules: {dict(fired)}")
    assert all(fired[kind] >= 20 for kind in ("died before training", "died in a step", "went back", "replayed", "finished"))


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    """What some process may have left behind, whenever it lived."""
    node = Node(
        draw(st.integers(0, 100 * 64)) * TICK, draw(st.integers(1, 5)), draw(st.sampled_from("abc")), start=draw(st.sampled_from("xyzuvw"))
    )
    origin = draw(st.integers(0, 5))
    if draw(st.booleans()):
        node.load(origin, known=draw(st.integers(0, 9)))
        node.steps(origin + 1, origin + draw(st.integers(0, 5)), draw(ticks))
    for phase in draw(st.lists(st.sampled_from(list(Phase)), max_size=4)):
        node.spend(phase, draw(ticks))
    return node.end(draw(st.sampled_from([None, None, Ending.PEER_LOST, Ending.FINISHED])))


def test_no_second_is_counted_twice_whatever_overlaps(figure: Callable[[str], None]) -> None:
    """Loss: a node that was cut off and trained on makes the account longer than the time."""
    overlapping = 0

    @thorough
    @given(st.lists(any_record(), min_size=1, max_size=8), st.none() | st.integers(0, 200).map(lambda late: EPOCH + late))
    def check(records: list[Record], now: float | None) -> None:
        nonlocal overlapping
        found = report(records, now)
        assert sum(found.seconds.values()) == pytest.approx(found.wall, abs=1e-6)
        assert found.wall + found.paused == pytest.approx(found.as_of - found.began, abs=1e-6)
        assert all(seconds >= 0 for seconds in found.seconds.values())
        assert from_json(as_json(found)) == found
        overlapping += found.counted_once > 0

    check()
    figure(f"accounts of overlapping records: {overlapping}")
    assert overlapping >= 50


def test_a_node_that_was_cut_off_and_hung_takes_no_time_from_the_others() -> None:
    """Loss: useful steps of the many give way to the hanging step of the one."""
    cut_off = Node(0.0, 1, "b", 2)
    cut_off.load(0)
    cut_off.steps(1, 10)
    cut_off.spend(Phase.STEP, 60.0)
    others = Node(24.0, 2, "a")
    others.load(8, known=10)
    others.steps(9, 30)
    found = report([cut_off.end(Ending.HUNG), others.end()])
    assert found.wall == 50.0 and found.counted_once == 74.0 - 24.0
    assert (found.seconds["useful"], found.seconds["replayed"], found.seconds["lost"], found.seconds["downtime"]) == (30.0, 2.0, 10.0, 0.0)
    assert (found.interruptions[0].lost_steps, found.interruptions[0].lost_seconds) == (2, 10.0)


def test_of_two_halves_that_train_on_apart_the_one_that_got_further_counts() -> None:
    """Loss: the steps of a cut-off half, which nobody keeps, are called progress."""
    many, few, later = Node(0.0, 1, "a", 2, "many"), Node(10.0, 1, "b", 1, "few"), Node(120.0, 2, "a", 3)
    many.load(0)
    many.steps(1, 96)
    few.load(0)
    few.steps(1, 40)
    later.load(96, known=96)
    later.steps(97, 100)
    found = report([one.end() for one in (few, many, later)])
    assert (found.wall, found.useful_steps, found.seconds["useful"], found.seconds["downtime"]) == (128.0, 100, 100.0, 20.0)
    assert [(one.step, one.resumed_from, one.world_after) for one in found.interruptions[:2]] == [(96, 96, 3), (40, 96, 3)]


def test_a_start_that_did_not_know_of_the_others_is_set_right() -> None:
    """Loss: without common storage a node that comes back calls all its steps useful."""
    first, second = Node(0.0, 1), Node(50.0, 2)
    for node, steps in ((first, 10), (second, 20)):
        node.load(0)
        node.steps(1, steps)
    found = report([first.end(), second.end()])
    assert (found.useful_steps, found.replayed_steps) == (20, 10)
    assert (found.seconds["useful"], found.seconds["replayed"]) == (20.0, 10.0)


def finished_run(began: float, number: int, origin: int, last: int) -> Record:
    """A start that reached the end."""
    node = Node(began, number)
    node.load(origin, known=origin)
    node.steps(origin + 1, last)
    return node.end(Ending.FINISHED)


def test_the_night_after_a_finished_run_is_no_downtime() -> None:
    """Loss: who adds epochs the next day reads a goodput of five percent."""
    found = report([finished_run(0.0, 1, 0, 10), finished_run(50_000.0, 2, 10, 20)])
    assert (found.wall, found.paused, found.seconds["downtime"]) == (28.0, 50_000.0 - 14.0, 0.0)
    assert found.interruptions == () and found.outcome == "finished"
    assert found.goodput == 20 / 28


def test_a_running_job_is_counted_up_to_now_and_a_silent_one_is_not() -> None:
    """Loss: a job that died an hour ago is called running, and the hour is called training."""
    node = Node(0.0)
    node.load(0)
    node.steps(1, 10)
    record, now = node.record(), node.clock.now
    running, dead = report([record], now + 3.0), report([record], now + SILENCE + 1)
    assert running.running and running.interruptions == () and running.wall == 17.0 and running.seconds["useful"] == 13.0
    assert not dead.running and dead.wall == 14.0 and dead.silence == SILENCE + 1
    assert [(one.cause, one.step, one.resumed_from, one.world_after) for one in dead.interruptions] == [(KILLED, 10, None, None)]
    ended = node.end(Ending.LEFT, "SIGTERM: left")
    assert not report([ended], now + 1.0).running
    assert report([ended], now + 1.0).outcome == "SIGTERM: left"


def test_time_left_counts_evaluations_at_their_average() -> None:
    """Loss: an ETA that forgets the half of the time that is not steps."""
    node = Node(0.0)
    node.load(0, total_steps=100)
    assert report([node.record()], node.clock.now).eta is None
    node.steps(1, 10, 2.0)
    node.spend(Phase.EVALUATION, 5.0)
    found = report([node.record()], node.clock.now)
    assert (found.pace, found.eta, found.total_steps, found.epochs) == (2.0, 90 * 2.5, 100, 1)
    restarted = Node(60.0, 2)
    restarted.spend(Phase.IMPORT, 1.0)
    found = report([node.end(), restarted.record()], restarted.clock.now)
    assert (found.step, found.pace, found.eta) == (10, 2.0, 90 * 2.5)
    assert report([finished_run(0.0, 1, 990, 1000)]).eta == 0.0


def test_lost_steps_of_a_death_are_known_also_when_the_next_start_dies_before_training() -> None:
    """Loss: a crash loop hides what the first crash has cost."""
    first, second, third = Node(0.0, 1), Node(20.0, 2, world_size=2), Node(30.0, 3)
    first.load(0)
    first.steps(1, 12)
    second.spend(Phase.IMPORT, 1.0)
    third.load(8, "peer", known=12)
    found = report([first.end(), second.end(), third.record()], third.clock.now)
    assert [(one.step, one.resumed_from, one.lost_steps, one.world_after, one.phase, one.source) for one in found.interruptions] == [
        (12, 8, 4, 2, "step", "peer"),
        (None, 8, 0, 1, "import", "peer"),
    ]


CAUSES: list[tuple[str, dict[str, tuple[float, Ending | None]], tuple[str, str | None]]] = [
    ("one process, no word", {"a": (10, None)}, (KILLED, "a")),
    ("all at once, no word", {"a": (10, None), "b": (10, None)}, (KILLED, None)),
    ("one is killed, the others miss it", {"a": (10.2, Ending.PEER_LOST), "b": (10.1, None), "c": (10.3, Ending.PEER_LOST)}, (KILLED, "b")),
    ("two are silent, one first", {"a": (10, None), "b": (9, None), "c": (10, Ending.PEER_LOST)}, (KILLED, "b")),
    ("the silent one has no record here", {"a": (10, Ending.PEER_LOST), "c": (10, Ending.PEER_LOST)}, (Ending.PEER_LOST, None)),
    ("a notice, and the others miss it", {"a": (10.2, Ending.PEER_LEFT), "b": (10, Ending.LEFT)}, (Ending.LEFT, "b")),
    ("a notice to all", {"a": (10.2, Ending.LEFT), "b": (10, Ending.LEFT)}, (Ending.LEFT, None)),
    ("the agents end what is left", {"a": (10, Ending.PEER_LOST), "b": (10, None), "c": (15, Ending.LEFT)}, (KILLED, "b")),
    ("a node falls silent, the others hang", {"a": (70, Ending.HUNG), "b": (10, None), "c": (70, Ending.HUNG)}, (KILLED, "b")),
    ("all hang, one is ended by its agent", {"a": (70, Ending.HUNG), "b": (70.5, None)}, (Ending.HUNG, "a")),
    ("a refusal", {"a": (3, Ending.REFUSED)}, (Ending.REFUSED, "a")),
    ("another process of the node saw it first", {"a": (10.2, Ending.PEER_LOST), "a 1": (10, Ending.FAILED)}, (Ending.FAILED, "a")),
    ("the agent ends the first process for it", {"a": (10.5, Ending.LEFT), "a 1": (10, Ending.FAILED)}, (Ending.FAILED, "a")),
]


@pytest.mark.parametrize(("ends", "expected"), [case[1:] for case in CAUSES], ids=[case[0] for case in CAUSES])
def test_causes(ends: dict[str, tuple[float, Ending | None]], expected: tuple[str, str | None]) -> None:
    """Loss: the node that keeps dying is not found, or the innocent one is replaced."""
    records = []
    for name, (end, ending) in ends.items():
        node = Node(0.0, 1, name.partition(" ")[0], len(ends))
        node.spend(Phase.STEP, float(end))
        records.append(replace(node.end(ending), local_rank=int(name.partition(" ")[2] or 0)))
    for order in itertools.permutations(records):
        (interruption,) = report(order).interruptions
        assert (interruption.cause, interruption.node) == expected


def test_shares_for_tensorboard_are_percent_and_add_up() -> None:
    """Loss: curves that nobody can read."""
    values = scalars(report([finished_run(0.0, 1, 0, 12)]))
    assert sum(values[f"Goodput/{part}"] for part in TIME_PARTS) == pytest.approx(100)
    assert (values["Goodput/useful"], values["Goodput/replayed_steps"], values["Goodput/interruptions"]) == (75.0, 0, 0)


def test_no_records_and_foreign_accounts_are_errors() -> None:
    """Loss: an account of nothing that says all is well."""
    assert parse_records([{"format": 2}]) == []
    with pytest.raises(ValueError, match="no start"):
        report([])
    for text in ("", "[]", "{}", as_json(report([finished_run(0.0, 1, 0, 1)]))[:-20]):
        with pytest.raises(ValueError, match=r"."):
            from_json(text)


def many_starts(count: int) -> list[Record]:
    """Records of starts that overlap a little, went back a little, and of which some died before they knew their step."""
    records = []
    for number in range(1, count + 1):
        node = Node(9.0 * number, number)
        if number % 5:
            node.load(4 * number, known=4 * number + 2)
            node.steps(4 * number + 1, 4 * number + 6)
        else:
            node.spend(Phase.IMPORT, 2.0)
        records.append(node.end(Ending.FAILED if number % 3 else None))
    return records


def test_the_work_of_an_account_grows_with_the_number_of_starts_and_no_faster() -> None:
    """Loss: on machines that die often the account takes seconds, at every epoch's end and in the seconds of grace."""

    def calls(records: list[Record]) -> int:
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            del frame, argument
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            report(records)
        finally:
            sys.setprofile(None)
        return count

    few, many = calls(many_starts(100)), calls(many_starts(400))
    assert many < 4.5 * few


def test_what_starts_have_in_common_is_found_as_by_looking_at_each_pair() -> None:
    """Loss: an account that is quick and wrong."""
    records = many_starts(60)
    found = report(records)
    starts = {one.number: one for one in records}
    for interruption in found.interruptions:
        later = [starts[number] for number in range(interruption.number + 1, 61)]
        assert interruption.world_after == (later[0].world_size if later else None)
        assert interruption.resumed_from == next((one.origin for one in later if one.origin is not None), None)
        assert interruption.time == min([starts[interruption.number].end, *(one.began for one in later)])
    covered = 0.0
    spans = sorted(
        (one.began, min([one.end, *(other.began for other in starts.values() if other.number > one.number)])) for one in starts.values()
    )
    reached = spans[0][0]
    for began, end in spans:
        covered += max(0.0, end - max(began, reached))
        reached = max(reached, end)
    assert math.fsum(found.seconds.values()) - found.seconds["downtime"] == pytest.approx(covered)
