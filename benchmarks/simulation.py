"""A job through interruptions, in closed form from one to the next: pure, no clock, no disk.

Each second is in one of the parts of `goodput.json`, by the same rules (`gai_yolo.goodput.timeline`): a new step is useful however slow,
the step that a death interrupts is lost, a step that is done again is replayed.

What is simplified: snapshots are taken on time, not at the next step's end; evaluations, data and reports are spread over the steps; what
strikes while an earlier strike is being noticed waits until it has been; after a strike that a node survives the disk holds the last
step, though rank 0, which writes it, may be the one that died (1 in the number of nodes).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, with_config

from gai_yolo.checkpointing.schedule import FIRST_AFTER, Cost, automatic_interval
from gai_yolo.goodput.record import Phase
from gai_yolo.goodput.timeline import DOWNTIME, LOST, REPLAYED, TIME_PARTS, USEFUL
from gai_yolo.sections import ElasticConfig, SnapshotsConfig

Kind = Literal["worker", "node", "notice", "join", "hang", "all"]
"""A process dies; a node dies; a node leaves after a notice; nodes join; a node hangs or is cut off; all nodes die at once."""
GRACEFUL: tuple[Kind, ...] = ("notice", "join")
"""The step is ended first."""
DAY = 86400.0


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Restart:
    """Seconds from an interruption to the next step."""

    detection: NonNegativeFloat = 0.3
    """Until the survivors have noticed and saved; of a hang, beyond `Costs.patience`."""
    rendezvous: NonNegativeFloat = 0.5
    """Until the next processes start, and in their process group."""
    imports: NonNegativeFloat = 0.0
    load: NonNegativeFloat = 1.0
    first_step: NonNegativeFloat = 0.4
    """Until it is done, the wait for its batch included."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Restarts:
    """By kind of interruption. Where nodes are missing, the rendezvous waits its last call (2 s) for more; a dead node is noticed after
    three keep-alives of 1 s. All at once: launchers start anew, and import."""

    worker: Restart = Restart()
    node: Restart = Restart(rendezvous=4.6)
    notice: Restart = Restart(rendezvous=2.5)
    join: Restart = Restart(rendezvous=1.6)
    hang: Restart = Restart(rendezvous=4.0)
    all: Restart = Restart(rendezvous=4.6)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Costs:
    """What a job's parts cost, in seconds. The defaults were measured on 2 cores (docs/benchmarks.md), the snapshots with YOLO12-x, 712 MB;
    what nobody measured is said to be assumed."""

    step: PositiveFloat = 0.77
    """With all nodes."""
    scaling: NonNegativeFloat = 1.0
    """1: half the nodes need twice as long for a step; 0: as long, as do nodes that share one machine's cores."""
    data: NonNegativeFloat = 0.0
    """For each step, as are the next three."""
    reporting: NonNegativeFloat = 0.0
    evaluation: NonNegativeFloat = 0.0
    snapshot: NonNegativeFloat | None = None
    """Measured as a whole, in place of what follows from stalls and intervals."""
    first_batch: NonNegativeFloat = 0.3
    """The part of `Restart.first_step` that is a wait for data."""
    stall: NonNegativeFloat = 0.126
    """Of a durable snapshot, as are the next two."""
    write: NonNegativeFloat = 2.3
    cpu: NonNegativeFloat = 1.15
    """Assumed: one of two cores is busy all the while."""
    memory_stall: NonNegativeFloat = 0.126
    memory_write: NonNegativeFloat = 2.4
    """What the job itself assumes before it has measured: 300 MB/s."""
    start_up: NonNegativeFloat = 0.0
    """Of the job, once: launchers and agents, and what the fork server imports."""
    closing: NonNegativeFloat = 0.3
    """Of a run that is finished."""
    patience: NonNegativeFloat = ElasticConfig().step_timeout_seconds
    """Until a step hangs; ten steps if that is longer."""
    replacement: NonNegativeFloat = 600.0
    """Assumed: from the loss of a node until another joins."""
    restart: Restarts = Restarts()
    source: str = ""
    """SHA-256 of the `goodput.json` they were measured from."""


@dataclass(frozen=True)
class Policy:
    """How a job deals with interruptions."""

    name: str
    interval: float
    """Seconds between durable snapshots."""
    memory_interval: float = math.inf
    """Seconds between those in memory."""
    first: float = math.inf
    """Seconds after a start until the first durable one, if that is sooner."""
    survivors_save: bool = True
    """The last completed step outlives any interruption but `all`."""
    elastic: bool = True
    """It goes on with the nodes that are left; else it waits..."""
    hand_off: float = 0.0
    """...so many seconds for a spare one."""


@dataclass(frozen=True)
class Rate:
    """How often nodes are lost."""

    name: str
    per_node_day: float
    source: str
    kinds: Mapping[Kind, float] = field(default_factory=lambda: {"node": 1.0})
    """Shares, which add up to 1."""
    at_once: float = 1.0
    """Nodes that are lost together, on average."""

    def between(self, nodes: int) -> float:
        """Seconds between two interruptions of a job on so many nodes."""
        return DAY * self.at_once / (self.per_node_day * nodes)


@dataclass(frozen=True)
class Strike:
    """An interruption: when (seconds), which, and how many nodes go on."""

    time: float
    kind: Kind
    nodes: int


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    wall: float
    seconds: dict[str, float]
    """By `TIME_PARTS`; they add up to `wall`."""
    progress: float
    """Steps done in the end, at the speed of all nodes, as a share of the wall time."""
    strikes: int

    @property
    def goodput(self) -> float:
        """As in `goodput.json`."""
        return self.seconds[USEFUL] / self.wall if self.wall > 0 else 1.0


def own_policy(costs: Costs, between_failures: float, max_overhead: float | None = None) -> Policy:
    """What this project does, with `snapshots.hours_between_failures` set to these seconds, by its own code."""
    overhead = SnapshotsConfig().max_overhead if max_overhead is None else max_overhead
    interval = automatic_interval(Cost(costs.write, costs.stall, costs.cpu), between_failures, overhead)
    return Policy("this project", interval, (costs.memory_stall + costs.memory_write) / overhead, FIRST_AFTER)


class Job:
    """A run that never ends, from the exec of its first process on."""

    def __init__(self, costs: Costs, policy: Policy, nodes: int) -> None:
        self.costs, self.policy, self.all_nodes, self.nodes = costs, policy, nodes, nodes
        self.now = 0.0
        self.seconds = dict.fromkeys(TIME_PARTS, 0.0)
        self.steps = self.highest = self.durable = 0.0
        """Completed; ever completed; on the disk."""
        self.strikes = 0
        self._starting: deque[tuple[str, float]] = deque()
        self._slow = 0.0
        first = costs.restart.worker
        self._start(replace(first, imports=first.imports + costs.start_up), None)

    @property
    def is_meeting(self) -> bool:
        """Whether nodes that come now are waited for."""
        return bool(self._starting) and self._starting[0][0] == DOWNTIME

    def run_until(self, time: float, graceful: bool = False) -> None:
        """Start, and train; `graceful` if the step is ended that is under way then."""
        while self._starting and self.now < time:
            part, left = self._starting.popleft()
            spent = min(left, time - self.now)
            self._spend(part, spent)
            if spent < left:
                self._starting.appendleft((part, left - spent))
        if self.now < time:
            self._train(time - self.now, graceful)

    def strike(self, kind: Kind, nodes: int, wait: float = 0.0) -> None:
        """End this start, and begin the next with so many nodes after `wait` seconds and the rendezvous."""
        restart: Restart = getattr(self.costs.restart, kind)
        self.strikes += 1
        if kind == "hang":
            self._spend(LOST, max(self.costs.patience, 10 * self._step))
        self._spend(Phase.CLOSING if kind in GRACEFUL else LOST, restart.detection)
        if kind == "all" or not self.policy.survivors_save:
            self.steps = self.durable
        else:
            self.durable = self.steps
        self.nodes = nodes
        self._start(restart, wait)

    def outcome(self) -> Outcome:
        """Up to now."""
        progress = self.steps * self.costs.step / self.now if self.now > 0 else 1.0
        return Outcome(self.now, dict(self.seconds), progress, self.strikes)

    def spend_closing(self) -> None:
        """Finish."""
        self._spend(Phase.CLOSING, self.costs.closing)

    @property
    def _step(self) -> float:
        return self.costs.step * math.pow(self.all_nodes / max(1, self.nodes), self.costs.scaling)

    def _start(self, restart: Restart, wait: float | None) -> None:
        first = min(self.costs.first_batch, restart.first_step)
        phases = [(Phase.IMPORT, restart.imports), (Phase.LOAD, restart.load), (Phase.DATA, first)]
        self._starting = deque((str(phase), seconds) for phase, seconds in phases)
        if wait is not None:
            self._starting.appendleft((DOWNTIME, wait + restart.rendezvous))
        self._slow = max(0.0, restart.first_step - first - self._step)

    def _spend(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        self.now += seconds

    def _train(self, seconds: float, graceful: bool) -> None:
        """The whole stretch from the first batch to what ends the start."""
        costs, own = self.costs, self._step
        snapshot, last = self._snapshots(seconds)
        pace = own + costs.data + costs.reporting + costs.evaluation + (costs.snapshot or 0.0)
        exact = max(0.0, (seconds - snapshot - self._slow) / pace)
        steps = exact if graceful else math.floor(exact + 1e-9)
        slow = min(self._slow, seconds - snapshot) if steps > 0 or graceful else 0.0
        again = min(steps, max(0.0, self.highest - self.steps))
        replayed = again * own + (slow if again > 0 else 0.0)
        self._spend(REPLAYED, replayed)
        self._spend(USEFUL, steps * own + slow - replayed)
        self._spend(Phase.DATA, steps * costs.data)
        self._spend(Phase.REPORTING, steps * costs.reporting)
        self._spend(Phase.EVALUATION, steps * costs.evaluation)
        self._spend(Phase.SNAPSHOT, steps * (costs.snapshot or 0.0) + snapshot)
        self._spend(LOST, max(0.0, seconds - snapshot - slow - steps * pace))
        if last > 0:
            self.durable = max(self.durable, self.steps + steps * last / seconds)
        self.steps += steps
        self.highest = max(self.highest, self.steps)

    def _snapshots(self, seconds: float) -> tuple[float, float]:
        """Seconds of stalls in a stretch, and when the last durable snapshot was taken that is complete at its end; 0 if none is."""
        costs, policy = self.costs, self.policy
        first, cycle = min(policy.first, policy.interval), policy.interval + costs.stall
        durable = _ticks(seconds, first, cycle)
        complete = _ticks(seconds - costs.write, first, cycle)
        memory = _ticks(seconds, policy.memory_interval, policy.memory_interval + costs.memory_stall)
        stalled = 0.0 if costs.snapshot is not None else min(seconds, durable * costs.stall + memory * costs.memory_stall)
        return stalled, first + (complete - 1) * cycle if complete else 0.0


def simulate(rate: Rate, nodes: int, costs: Costs, policy: Policy, strikes: int = 2000, seed: int = 0) -> Outcome:
    """A job on so many nodes for as long as so many losses take; a lost node is replaced after `costs.replacement`."""
    random = Random(f"{seed} {rate.name} {nodes}")
    job, kinds, shares = Job(costs, policy, nodes), list(rate.kinds), list(rate.kinds.values())
    returns: deque[tuple[float, int]] = deque()
    for _ in range(strikes):
        time = _next_loss(job, rate, random, returns)
        kind = random.choices(kinds, shares)[0]
        taken = 0 if kind == "worker" else _geometric(rate.at_once, random)
        job.run_until(time, graceful=kind in GRACEFUL)
        if kind == "all" or taken >= job.nodes:
            job.strike("all", nodes, costs.replacement)
            returns.clear()
        elif policy.elastic:
            job.strike(kind, job.nodes - taken)
            if taken:
                returns.append((job.now + costs.replacement, taken))
        else:
            job.strike(kind, nodes, policy.hand_off if taken else 0.0)
    return job.outcome()


def replay(strikes: Iterable[Strike], end: float, costs: Costs, policy: Policy, nodes: int, finished: bool) -> Outcome:
    """A job through a given schedule, in the order of times, until `end` seconds after its first exec.

    Args:
        nodes: of the whole job; until the first strike all are there.
        finished: whether the run was complete then.
    """
    job = Job(costs, policy, nodes)
    for strike in strikes:
        job.run_until(strike.time, graceful=strike.kind in GRACEFUL)
        job.strike(strike.kind, strike.nodes)
    if finished:
        job.run_until(end - costs.closing, graceful=True)
        job.spend_closing()
    else:
        job.run_until(end, graceful=True)
    return job.outcome()


def _next_loss(job: Job, rate: Rate, random: Random, returns: deque[tuple[float, int]]) -> float:
    """When the next nodes are lost, after those that come back before have joined. Losses have no memory, so they may be drawn anew
    whenever the number of nodes changes."""
    while True:
        time = job.now + random.expovariate(1 / rate.between(job.nodes))
        if not returns or returns[0][0] > time:
            return time
        due, count = returns.popleft()
        job.run_until(due, graceful=True)
        while returns and returns[0][0] <= job.now:
            count += returns.popleft()[1]
        if job.is_meeting:
            job.nodes += count
        else:
            job.strike("join", job.nodes + count)


def _ticks(seconds: float, first: float, cycle: float) -> int:
    """How many of the times first, first + cycle, ... are over."""
    return 0 if seconds < first or math.isinf(first) else 1 + (0 if math.isinf(cycle) else int((seconds - first) // cycle))


def _geometric(mean: float, random: Random) -> int:
    """1, 2, ... with this mean."""
    return 1 if mean <= 1 else 1 + int(math.log(1 - random.random()) / math.log(1 - 1 / mean))
