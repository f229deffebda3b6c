"""The simulation of many nodes, and of measured runs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale import OTHERS, RATES, main, others_costs, read_costs, slower
from benchmarks.simulation import Costs, Job, Policy, Rate, Restart, Restarts, Strike, own_policy, replay, simulate
from benchmarks.traces import kind_of, measure, schedule_of
from gai_yolo.checkpointing.schedule import Cost, Schedule
from gai_yolo.errors import Ending, Refusal
from gai_yolo.goodput.causes import KILLED
from gai_yolo.goodput.record import Phase, pack, plain
from gai_yolo.goodput.report import Interruption, as_json, report
from gai_yolo.sections import SnapshotsConfig
from tests.starts import Node

MIXED = Rate("mixed", 1.0, "", {"worker": 0.3, "node": 0.3, "notice": 0.2, "hang": 0.1, "all": 0.1}, at_once=2.0)
PLAIN = Restart(detection=1.0, rendezvous=4.0, imports=3.0, load=2.0, first_step=1.5)
EVEN = Costs(
    step=1.0,
    first_batch=0.5,
    stall=0.0,
    memory_stall=0.0,
    closing=0.5,
    patience=20.0,
    restart=Restarts(worker=PLAIN, node=PLAIN, notice=PLAIN, join=PLAIN, hang=PLAIN, all=PLAIN),
)
"""Every start takes 3 + 2 + 0.5 s to its first step, after 1 + 4 s of an interruption."""
QUIET = Policy("quiet", math.inf)


def parts(seconds: dict[str, float]) -> dict[str, float]:
    """What took time."""
    return {part: value for part, value in seconds.items() if value > 1e-9}


# --- one job ---------------------------------------------------------------------------------------------------------------


def test_start_up_is_paid_for_once() -> None:
    """Loss: ten seconds of launchers and agents that every restart is charged, or none."""
    strikes = [Strike(29.0, "worker", 4)]
    with_it, without = (replay(strikes, 60.0, replace(EVEN, start_up=start_up), QUIET, 4, finished=False) for start_up in (7.0, 0.0))
    assert with_it.seconds["import"] - without.seconds["import"] == pytest.approx(7.0)
    assert with_it.seconds["downtime"] == pytest.approx(without.seconds["downtime"])


def test_schedule_that_was_computed_by_hand() -> None:
    """Loss: a table for ten thousand nodes that is wrong in the same way everywhere, and looks right."""
    # Exec 0, first batch at 5.5; ten steps to 15.5, 0.4 s of the next are lost; survivors are ready at 16.9, exec at 20.9, first
    # batch at 26.4; half as many nodes: steps of 2 s, the notice at 33.4 ends the fourth; exec at 38.4, first batch at 43.9.
    strikes = [Strike(15.9, "node", 2), Strike(33.4, "join", 4)]
    outcome = replay(strikes, 60.0, EVEN, QUIET, 4, finished=True)
    assert outcome.wall == pytest.approx(60.0)
    assert parts(outcome.seconds) == pytest.approx(
        {
            "useful": 10.0 + 7.0 + 15.6,
            "lost": 0.4 + 1.0,
            "data": 3 * 0.5,
            "import": 9.0,
            "load": 6.0,
            "closing": 1.0 + 0.5,
            "downtime": 8.0,
        }
    )
    assert outcome.progress == pytest.approx((10 + 3.5 + 15.6) / 60.0)
    assert outcome.goodput == pytest.approx(32.6 / 60.0)


def test_loss_of_all_nodes_goes_back_to_the_disk() -> None:
    """Loss: the simulated job keeps in memory what has died with every node, and durable snapshots seem useless."""
    # Steps from 5.5 on; snapshots 10, 20, 30 s later; the third, 2 s long, is not complete yet when all is lost after 31.25 s.
    policy = Policy("disk", 10.0)
    job = Job(replace(EVEN, write=2.0), policy, 4)
    job.run_until(36.75)
    job.strike("all", 4, wait=100.0)
    kept = 31 * 20 / 31.25
    assert job.steps == pytest.approx(kept)
    job.run_until(36.75 + 1.0 + 104.0 + 5.5 + 20.0)
    assert parts(job.seconds)["downtime"] == pytest.approx(104.0)
    assert parts(job.seconds)["replayed"] == pytest.approx(31 - kept)
    assert job.seconds["useful"] == pytest.approx(31 + 20 - (31 - kept))


@pytest.mark.parametrize("kind", ["worker", "node", "hang", "notice"])
def test_survivors_lose_no_completed_step(kind: Any) -> None:
    """Loss: the model makes the job repeat steps that it does not repeat."""
    job = Job(EVEN, QUIET, 4)
    job.run_until(30.0, graceful=kind == "notice")
    before = job.steps
    job.strike(kind, 3)
    assert job.steps == before >= 24
    assert job.seconds["lost"] >= (20.0 if kind == "hang" else 0.0)


def test_job_that_keeps_nothing_in_memory_does_its_steps_again() -> None:
    """Loss: the comparison flatters a job that has only its last snapshot."""
    job = Job(EVEN, replace(OTHERS, interval=10.0), 4)
    job.run_until(5.5 + 19.0)
    job.strike("node", 4, 60.0)
    assert job.steps == pytest.approx(10.0)
    assert job.highest == pytest.approx(19.0)


def test_snapshots_stall_as_often_as_their_intervals_say() -> None:
    """Loss: a cost that grows with the number of snapshots is counted once."""
    costs = replace(EVEN, stall=0.5, memory_stall=0.25)
    job = Job(costs, Policy("both", 20.0, memory_interval=30.0, first=10.0), 4)
    job.run_until(5.5 + 60.0)
    # On the disk after 10, 30.5, 51 s, in memory after 30 s.
    assert job.seconds["snapshot"] == pytest.approx(3 * 0.5 + 0.25)


def test_first_step_is_slower_and_lost_if_it_is_not_reached() -> None:
    """Loss: a job that is killed at every first step seems to get on."""
    slow = replace(EVEN, restart=Restarts(worker=replace(PLAIN, first_step=4.5)))
    outcomes = [replay([Strike(time, "worker", 4)], time + 1.0, slow, QUIET, 4, finished=False) for time in (5.5 + 3.9, 5.5 + 4.1)]
    assert [outcome.seconds["useful"] for outcome in outcomes] == pytest.approx([0.0, 4.0])
    assert [outcome.seconds["lost"] for outcome in outcomes] == pytest.approx([3.9 + 1.0, 0.1 + 1.0])


def test_nodes_that_come_while_the_others_meet_cost_nothing() -> None:
    """Loss: a node that returns during a restart is charged with another one."""
    job = Job(EVEN, QUIET, 4)
    assert not job.is_meeting
    job.run_until(30.0)
    job.strike("node", 3)
    assert job.is_meeting
    job.run_until(31.0 + 4.5)
    assert not job.is_meeting


def test_nodes_come_back_with_one_restart_or_while_the_others_meet() -> None:
    """Loss: a fleet that only shrinks, or one whose returns are free."""
    rate = Rate("nodes", 1.0, "", {"node": 1.0})
    soon, later, never = (simulate(rate, 50, replace(EVEN, replacement=seconds), QUIET, 40) for seconds in (1.0, 30.0, 1e9))
    assert (soon.strikes, later.strikes, never.strikes) == (40, 79, 40)  # the last one is not waited for
    assert soon.progress > later.progress > 1.5 * never.progress


def test_losses_of_several_nodes_are_rarer() -> None:
    """Loss: a batch of reclaimed machines is counted as many interruptions, and takes one machine."""
    assert Rate("", 2.0, "", at_once=4.0).between(10) == pytest.approx(86400 * 4 / 20)
    never = slower(replace(EVEN, replacement=1e9), 0.0)
    alone, four = (simulate(Rate("x", 1.0, "", {"node": 1.0}, at_once), 4000, never, QUIET, 200).progress for at_once in (1.0, 4.0))
    assert four < 0.95 * alone


# --- many jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 8, 1000])
def test_job_that_nothing_happens_to_is_all_useful(nodes: int) -> None:
    """Loss: the simulation has a cost of its own that no measurement explains."""
    rate = Rate("never", 1e-7, "")
    outcome = simulate(rate, nodes, Costs(), own_policy(Costs(), rate.between(nodes)), strikes=1)
    assert outcome.goodput > 0.999
    assert simulate(rate, nodes, EVEN, QUIET, strikes=1).goodput > 0.999999


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.floats(1e-4, 1e3), st.integers(1, 10_000), st.sampled_from([OTHERS, QUIET, own_policy(Costs(), 600.0)]), st.floats(0.0, 100.0))
def test_every_second_is_in_one_part(per_node_day: float, nodes: int, policy: Policy, factor: float) -> None:
    """Loss: shares that do not add up to the wall time, so that goodput is anything."""
    outcome = simulate(replace(MIXED, per_node_day=per_node_day), nodes, slower(Costs(), factor), policy, strikes=50)
    assert math.fsum(outcome.seconds.values()) == pytest.approx(outcome.wall, rel=1e-9)
    assert min(outcome.seconds.values()) >= 0.0
    assert 0.0 <= outcome.progress <= outcome.goodput + 1e-9 <= 1.0 + 1e-8


@pytest.mark.parametrize("policy", [OTHERS, own_policy(Costs(), 3600.0)])
def test_more_failures_never_help(policy: Policy) -> None:
    """Loss: a table in which worse machines look better."""
    costs = others_costs(Costs()) if policy is OTHERS else Costs()
    shares = [simulate(replace(MIXED, per_node_day=rate), 200, costs, policy, 500).goodput for rate in (0.001, 0.01, 0.1, 1.0, 10.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9 > shares[-1]


def test_slower_restarts_never_help() -> None:
    """Loss: the sensitivity table says nothing."""
    shares = [simulate(MIXED, 100, slower(Costs(), factor), own_policy(Costs(), 600.0), 500).goodput for factor in (1, 3, 10)]
    assert shares == sorted(shares, reverse=True)


def test_a_seed_reproduces_a_job_and_another_does_not() -> None:
    """Loss: numbers in the docs that nobody can print again."""
    policy = own_policy(Costs(), 600.0)
    assert simulate(MIXED, 64, Costs(), policy, 200, seed=3) == simulate(MIXED, 64, Costs(), policy, 200, seed=3)
    assert simulate(MIXED, 64, Costs(), policy, 200, seed=3) != simulate(MIXED, 64, Costs(), policy, 200, seed=4)


@pytest.mark.parametrize("hours", [0.01, 1.0, 3.0, 500.0])
def test_interval_is_the_one_that_the_job_would_choose(hours: float) -> None:
    """Loss: a simulation of a policy that the project does not have."""
    costs = Costs()
    cadence = Schedule.of_disk(SnapshotsConfig(hours_between_failures=hours), 0, 1)
    cadence.measured(Cost(costs.write, costs.stall, costs.cpu))
    assert own_policy(costs, 3600 * hours).interval == cadence.interval_seconds


def test_rates_are_those_that_were_published() -> None:
    """Loss: a slip of a unit makes machines die a thousand times as often."""
    per_thousand = {rate.name: 1000 * rate.per_node_day for rate in RATES}
    assert per_thousand["Llama 3"] == pytest.approx(3.79, abs=0.01)
    llama, jobs = (next(rate for rate in RATES if rate.name == name) for name in ("Llama 3", "RSC-1, jobs of 1024"))
    assert llama.between(2048) / 3600 == pytest.approx(3.1, abs=0.1)  # "one every three hours"
    assert jobs.between(128) / 3600 == pytest.approx(7.9)
    assert all(sum(rate.kinds.values()) == pytest.approx(1.0) and rate.source for rate in RATES)


# --- measured runs ---------------------------------------------------------------------------------------------------------


def measured_run(folder: Path, lives: list[float], step: float = 0.75, imports: float = 4.0) -> Path:
    """A run of three nodes whose starts train for so long; a node is killed and comes back by turns."""
    began, done, records = 0.0, 0, []
    for number, life in enumerate(lives, 1):
        node = Node(began, number, world_size=3 if number % 2 else 2)
        for phase, seconds in ((Phase.IMPORT, imports), (Phase.RENDEZVOUS, 0.25), (Phase.LOAD, 1.0)):
            node.spend(phase, seconds)
        node.recorder.started_from(done, 1, "memory", done, 10_000, 10)
        node.spend(Phase.DATA, 0.5)
        for _ in range(round(life / (step + 0.125))):
            done += 1
            node.spend(Phase.STEP, step)
            node.recorder.step_done(done, 1)
            node.spend(Phase.SNAPSHOT, 0.125)
        last = number == len(lives)
        if number % 2 and not last:
            node.spend(Phase.STEP, step / 2)  # killed
            records.append(node.end())
        else:
            node.spend(Phase.CLOSING, 0.5)
            records.append(node.end(*((Ending.FINISHED,) if last else (Ending.LEFT, f"SIGTERM: left after step {done}"))))
        began += node.clock.now - node.recorder.record().began + (8.5 if number % 2 else 1.5)
    (folder / "goodput").mkdir(parents=True)
    for one in records:
        (folder / "goodput" / f"{one.number}.json").write_bytes(pack(plain(one)))
    (folder / "goodput.json").write_text(as_json(report(records)))
    return folder


def test_measured_run_is_reproduced_with_the_costs_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a simulation that was never held against a clock."""
    other = measured_run(tmp_path / "other", [40.0, 70.0, 20.0, 55.0, 90.0])
    trace = measured_run(tmp_path / "trace", [100.0, 10.0, 60.0, 35.0, 80.0, 45.0, 120.0])
    costs = tmp_path / "costs.json"
    assert main(["--measure", str(other)]) == 0
    costs.write_text(capsys.readouterr().out)
    assert main(["--trace", str(trace), str(trace / "goodput.json"), "--costs", str(costs)]) == 0
    assert "within 3 points" in capsys.readouterr().out


def test_costs_that_are_wrong_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the comparison is satisfied with anything, because it looks at the trace's own totals."""
    other = measured_run(tmp_path / "other", [40.0, 70.0, 20.0, 55.0, 90.0], imports=10.0)
    trace = measured_run(tmp_path / "trace", [100.0, 10.0, 60.0, 35.0, 80.0, 45.0, 120.0])
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(asdict(measure(other))))
    assert main(["--trace", str(trace), "--costs", str(costs)]) == 1
    assert "off by more than 3 points" in capsys.readouterr().out


def test_run_is_not_reproduced_with_its_own_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a proof that proves only that division undoes multiplication."""
    trace = measured_run(tmp_path / "trace", [100.0, 10.0, 60.0])
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(asdict(measure(trace))))
    assert main(["--trace", str(trace), "--costs", str(costs)]) == 2
    assert "this very run" in capsys.readouterr().err


def test_measured_costs_are_those_that_the_run_had(tmp_path: Path) -> None:
    """Loss: steps that pay for restarts, or the reverse."""
    costs = measure(measured_run(tmp_path / "run", [40.0, 70.0, 20.0, 55.0, 90.0]))
    assert costs.step == pytest.approx(0.75)
    assert [costs.first_batch, costs.snapshot] == pytest.approx([0.5, 0.125])
    assert asdict(costs.restart.node) == pytest.approx(
        {"detection": 0.0, "rendezvous": 8.75, "imports": 4.0, "load": 1.0, "first_step": 1.25}
    )
    assert [costs.restart.join.detection, costs.restart.join.rendezvous] == pytest.approx([0.5, 1.75])


def test_schedule_says_when_it_struck_not_when_the_last_survivor_ended() -> None:
    """Loss: the minute in which a hang was noticed is simulated twice, once as training."""
    account = report([Node(0.0).end(Ending.FINISHED)])
    hung = Interruption(account.began + 90.0, 1, "step hung: none for 20 s", "a", Phase.STEP, 7, 7, "memory", 0, 20.0, 5.0, 3, 2)
    left = replace(hung, time=account.began + 100.0, cause="SIGTERM: left after step 7", world_before=2, world_after=None)
    strikes = schedule_of(replace(account, interruptions=(hung, left)), EVEN)
    assert strikes == [Strike(90.0 - 20.0 - 1.0, "hang", 2), Strike(99.0, "notice", 2)]


@pytest.mark.parametrize(
    ("cause", "node", "before", "after", "kind"),
    [
        (KILLED, "a", 3, 2, "node"),
        (KILLED, "a", 3, 3, "worker"),
        (KILLED, None, 3, 3, "all"),
        ("peer lost: Connection closed by peer", None, 3, 2, "node"),
        ("SIGTERM: left after step 7", None, 2, 3, "join"),
        ("GCP: preempted: left after step 7", "a", 3, 2, "notice"),
        ("SIGTERM: this process leaves; the last step's state is saved", "a", 3, None, "notice"),
        ("step hung: none for 60 s, see the stacks above", "a", 3, 2, "hang"),
        ("evaluation hung: no batch for 89 s, see the stacks above", "a", 3, 2, "hang"),
    ],
)
def test_cause_tells_the_kind(cause: str, node: str | None, before: int, after: int | None, kind: str) -> None:
    """Loss: a hang of a minute is simulated as a death that is noticed at once."""
    one = Interruption(0.0, 1, cause, node, Phase.STEP, 7, 7, "memory", 0, 0.0, 0.0, before, after)
    assert kind_of(one) == kind


# --- what people see -------------------------------------------------------------------------------------------------------


def test_costs_from_a_file_take_the_place_of_the_defaults(tmp_path: Path) -> None:
    """Loss: a measurement that changes nothing."""
    path = tmp_path / "costs.json"
    path.write_text('{"step": 0.5, "restart": {"node": {"rendezvous": 7.5}}}')
    costs = read_costs(path)
    assert (costs.step, costs.restart.node.rendezvous, costs.write) == (0.5, 7.5, Costs().write)


@pytest.mark.parametrize(
    ("text", "names"), [('{"restart": {"node": {"imports": -1}}}', "restart.node.imports"), ('{"stpe": 1}', "stpe"), ("no", "costs.json")]
)
def test_costs_that_make_no_sense_are_refused_by_name(tmp_path: Path, text: str, names: str) -> None:
    """Loss: a misspelt field is ignored, and the default is taken for a measurement."""
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(Refusal, match=names):
        read_costs(path)
    assert main(["--costs", str(path)]) == 2


@pytest.mark.parametrize("content", [None, "{}"])
def test_trace_that_is_none_is_refused(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback in place of the name of the file."""
    path = tmp_path / "goodput.json"
    if content is not None:
        path.write_text(content)
    assert main(["--trace", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_tables_have_a_line_for_each_number_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the command that the docs name ends with a traceback."""
    assert main(["--nodes", "8", "10000", "--losses", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for rate in RATES:
        at = next(place for place, line in enumerate(lines) if line.startswith(f"{rate.name}: "))
        assert [line.split()[0] for line in lines[at + 3 : at + 5]] == ["8", "10,000"]
