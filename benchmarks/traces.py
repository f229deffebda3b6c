"""Measured runs beside simulated ones: the schedule in a run's `goodput.json`, and the costs that another run had."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.simulation import GRACEFUL, Costs, Kind, Restart, Restarts, Strike, own_policy, replay
from gai_yolo.errors import Refusal
from gai_yolo.goodput.causes import KILLED
from gai_yolo.goodput.record import Phase, read_records
from gai_yolo.goodput.report import REPORT_FILE, Interruption, Report, from_json
from gai_yolo.goodput.timeline import DOWNTIME, LOST, REPLAYED, TIME_PARTS, USEFUL, Start, share_out, starts_of
from gai_yolo.sections import SnapshotsConfig

MEETING = f"{DOWNTIME} + {Phase.RENDEZVOUS}"
"""One part here: the processes meet partly before and partly after they start."""
LEAVING = ("left after", "this process leaves")
"""What `cause` says of a process that left after a notice."""


@dataclass(frozen=True)
class Trace:
    """A measured run."""

    path: Path
    digest: str
    """SHA-256 of its `goodput.json`."""
    report: Report


@dataclass(frozen=True)
class Comparison:
    """Shares in percent, by part."""

    measured: dict[str, float]
    simulated: dict[str, float]

    @property
    def difference(self) -> float:
        """Points of goodput that the simulation has too much."""
        return self.simulated[USEFUL] - self.measured[USEFUL]


def read_trace(path: Path) -> Trace:
    """The report in a run folder, or at a path.

    Raises:
        Refusal: there is none, or not of one uninterrupted job.
    """
    if path.is_dir():
        path = path / REPORT_FILE
    try:
        data = path.read_bytes()
        report = from_json(data.decode())
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror}); give a run folder or the goodput.json in it.") from None
    except ValueError:
        raise Refusal(f"{path}: is no goodput.json of this version.") from None
    if report.paused > 0:
        raise Refusal(f"{path}: the run was finished and gone on with later; such a pause is in no part, so give a run without one.")
    if report.wall <= 0:
        raise Refusal(f"{path}: the run has taken no time; give one that was trained.")
    return Trace(path, hashlib.sha256(data).hexdigest(), report)


def kind_of(one: Interruption) -> Kind:
    """What kind of interruption a cause tells of."""
    after = one.world_before if one.world_after is None else one.world_after
    if any(words in one.cause for words in LEAVING) or one.cause.startswith("peer left"):
        return "join" if after > one.world_before else "notice"
    if " hung: " in one.cause:
        return "hang"
    if one.cause == KILLED and one.node is None:
        return "all"
    return "node" if after < one.world_before else "worker"


def schedule_of(report: Report, costs: Costs) -> list[Strike]:
    """When each interruption struck. The report says when the start had ended; the costs, how long that took."""
    strikes, last = [], 0.0
    for one in report.interruptions:
        kind = kind_of(one)
        restart: Restart = getattr(costs.restart, kind)
        end = one.time - report.began
        after = one.world_before if one.world_after is None else one.world_after
        strikes.append(Strike(max(last, end - restart.detection - hanging(kind, costs)), kind, after))
        last = max(last, end)
    return strikes


def hanging(kind: Kind, costs: Costs) -> float:
    """Seconds until a hang is taken for one; 0 for other kinds."""
    return max(costs.patience, 10 * costs.step) if kind == "hang" else 0.0


def compare(trace: Trace, costs: Costs) -> Comparison:
    """Simulate the run's schedule. Nothing else of it is used but its length.

    Raises:
        Refusal: the costs are this very run's.
    """
    if costs.source == trace.digest:
        raise Refusal(f"{trace.path}: these costs were measured in this very run, so they would prove nothing; measure another one.")
    report = trace.report
    nodes = max([report.world_size, *(one.world_before for one in report.interruptions)])
    policy = own_policy(costs, 3600 * SnapshotsConfig().hours_between_failures)
    simulated = replay(schedule_of(report, costs), report.wall, costs, policy, nodes, report.finished)
    return Comparison(_shares(report.seconds, report.wall), _shares(simulated.seconds, simulated.wall))


def table(outcome: Comparison) -> str:
    """For people."""
    lines = [f"{'':24}{'measured':>10}{'simulated':>11}{'difference':>12}"]
    for part, share in outcome.measured.items():
        simulated = outcome.simulated[part]
        if max(share, simulated) >= 0.005:
            lines.append(f"{part:24}{share:>8.2f} %{simulated:>9.2f} %{simulated - share:>+12.2f}")
    return "\n".join(lines)


def measure(folder: Path) -> Costs:
    """The costs that a run had. Steps, data and the like are lines through its starts: so much for each start, so much for each step.

    Raises:
        Refusal: it has no records, or no step.
    """
    trace = read_trace(folder)
    starts = starts_of(read_records(trace.path.parent / "goodput")[0])
    trained = [start for start in starts if _num_steps(start)]
    if not trained:
        raise Refusal(f"{trace.path.parent / 'goodput'}: there are no records of a step; give the folder of a run that was trained.")
    share_out(starts)
    slow, step = _line(trained, lambda start: start.parts.get(USEFUL, 0.0) + start.parts.get(REPLAYED, 0.0))
    first_batch, data = _line(trained, lambda start: start.parts.get(Phase.DATA, 0.0))
    steps = sum(_num_steps(start) for start in trained)
    seconds = trace.report.seconds
    imports = statistics.median(start.parts.get(Phase.IMPORT, 0.0) for start in trained)
    common = Restart(imports=imports, load=_mean(trained, Phase.LOAD), first_step=first_batch + slow + step, rendezvous=0.0)
    costs = Costs(
        step=step,
        scaling=0.0,  # it is the mean over what numbers of nodes there were
        data=data,
        reporting=seconds[Phase.REPORTING] / steps,
        evaluation=seconds[Phase.EVALUATION] / steps,
        snapshot=seconds[Phase.SNAPSHOT] / steps,
        first_batch=first_batch,
        start_up=max(0.0, starts[0].parts.get(Phase.IMPORT, 0.0) - imports),  # a job begins with its launcher
        closing=starts[-1].parts.get(Phase.CLOSING, 0.0) if starts[-1].finished else 0.3,
        source=trace.digest,
    )
    return replace(costs, restart=_restarts(trace.report, starts, common, costs))


def _restarts(report: Report, starts: Sequence[Start], common: Restart, costs: Costs) -> Restarts:
    """By kind; what did not happen keeps the default's detection and rendezvous."""
    ended = {start.record.number: start for start in starts}
    inside = _mean([start for start in starts if _num_steps(start)], Phase.RENDEZVOUS)
    measured: dict[str, Restart] = {}
    for kind in get_args(Kind):
        mine = [one for one in report.interruptions if kind_of(one) == kind and one.number in ended]
        default: Restart = getattr(Restarts(), kind)
        measured[kind] = replace(common, detection=default.detection, rendezvous=default.rendezvous)
        if mine:
            rendezvous = statistics.fmean(one.downtime for one in mine) + inside
            died = [ended[one.number] for one in mine]
            step = 0.0 if kind in GRACEFUL else costs.step / 2  # lost with it on average
            detection = _mean(died, Phase.CLOSING) + _mean(died, LOST) - step - hanging(kind, costs)
            measured[kind] = replace(common, detection=max(0.0, detection), rendezvous=rendezvous)
    return Restarts(**measured)


def _num_steps(start: Start) -> int:
    return start.record.useful_steps + start.record.replayed_steps


def _mean(starts: Sequence[Start], part: str) -> float:
    return statistics.fmean(start.parts.get(part, 0.0) for start in starts)


def _line(starts: Sequence[Start], value: Callable[[Start], float]) -> tuple[float, float]:
    """Seconds for each start and for each step; none for the start where the line says less than that, or cannot be drawn."""
    steps, values = [_num_steps(start) for start in starts], [value(start) for start in starts]
    if len(set(steps)) > 2:
        per_step, per_start = statistics.linear_regression(steps, values)
        if per_step >= 0 and per_start >= 0:
            return per_start, per_step
    return 0.0, sum(values) / sum(steps)


def _shares(seconds: Mapping[str, float], wall: float) -> dict[str, float]:
    merged: dict[str, Any] = {part: seconds[part] for part in TIME_PARTS if part not in (DOWNTIME, Phase.RENDEZVOUS)}
    merged[MEETING] = seconds[DOWNTIME] + seconds[Phase.RENDEZVOUS]
    return {part: 100 * value / wall for part, value in merged.items()}
