"""This project's policies from 8 to 10,000 nodes at published failure rates: `uv run benchmarks/scale.py`.

A simulation with measured costs (`--costs FILE`, JSON, see `Costs`); what it assumes is printed with the tables. Beside it a model of a
job as others run it. `--measure RUN_FOLDER` prints the costs that a measured run had, for `--costs`; `--trace GOODPUT_JSON ... --costs
FILE` simulates the schedule of other measured runs with them and ends with 1 if the goodput is off by more than 3 points.

    uv run benchmarks/scale.py --measure experiments/first > costs.json
    uv run benchmarks/scale.py --trace experiments/second/goodput.json --costs costs.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from benchmarks.simulation import DAY, Costs, Kind, Policy, Rate, Restart, Restarts, own_policy, simulate
from benchmarks.traces import compare, measure, read_trace, table
from gai_yolo.checkpointing.schedule import young_daly
from gai_yolo.errors import Refusal
from gai_yolo.sections import SnapshotsConfig

NODES = (8, 32, 128, 512, 2048, 10_000)
TOLERANCE = 3.0
"""Points that a simulated trace's goodput may be off."""
HANGS = 35 / 419
"""Share of Llama 3's unexpected interruptions that were network switches and cables (its table 5): taken as hangs."""
ALL = 0.01
"""Share of losses that take all nodes at once. Assumed, of the order seen by OPT-175B: `2 machines a day` in two months, and once the
whole cluster, deleted by mistake (both in the final update of its chronicles)."""
HARDWARE: dict[Kind, float] = {"node": 1 - HANGS - ALL, "hang": HANGS, "all": ALL}
SPOT: dict[Kind, float] = {"notice": 1 - ALL, "all": ALL}
REVISITING = "Kokolis et al., Revisiting Reliability in Large-Scale Machine Learning Research Clusters, HPCA 2025, arXiv 2410.21680"
ADVISOR = "share of instances reclaimed in a month, AWS Spot Instance Advisor's"
RATES = (
    Rate("Meta RSC-2", 2.34e-3, f"2.34 failures in 1000 node-days, 8 A100 a node ({REVISITING})", HARDWARE),
    Rate(
        "Llama 3",
        419 / 54 / (16384 / 8),
        "419 unexpected interruptions in 54 days on 16,384 H100, 8 a node (The Llama 3 Herd of Models, arXiv 2407.21783)",
        HARDWARE,
    ),
    Rate("Meta RSC-1", 6.50e-3, f"6.50 failures in 1000 node-days, 8 A100 a node ({REVISITING})", HARDWARE),
    Rate(
        "OPT-175B",
        2 / (1024 / 8),
        "about 2 machines a day of 1024 A100, 8 a node (github.com/facebookresearch/metaseq, projects/OPT/chronicles/final_update.md)",
        HARDWARE,
    ),
    Rate(
        "RSC-1, jobs of 1024",
        24 / 7.9 / (1024 / 8),
        f"7.9 hours between failures of jobs on 1024 A100, whatever failed ({REVISITING})",
        HARDWARE,
    ),
    Rate("spot, 5 %", -math.log(0.95) / 30, f"{ADVISOR} upper bound of the lowest band", SPOT),
    Rate("spot, 20 %", -math.log(0.80) / 30, f"{ADVISOR} lower bound of the highest band", SPOT),
    Rate(
        "spot, turbulent",
        85 / 8.32,
        "85 preemptions, 2.4 at once, in 8.32 node-days of at most 12 g4dn.xlarge, counted in the data of Bamboo (NSDI 2023; "
        "github.com/uclasystem/bamboo, doc/data/aws-spot-instances-g4dn-xlarge-us-east-1c-2020-11-20-1930-to-2020-11-21-2200.csv)",
        SPOT,
        at_once=85 / 35,
    ),
)
OTHERS = Policy("as others", interval=1800.0, survivors_save=False, elastic=False, hand_off=60.0)
ASSUMED_OF_OTHERS = """\
"As others" is a model, not a measurement: a durable snapshot every 30 minutes, or as often as is best (Young and Daly), by torch.save of
712 MB (1.1 s, measured); nothing in memory, notices not used; torchrun finds a dead node after its default of 3 keep-alives of 5 s, NCCL
finds a hang after its default of 10 minutes; a scheduler hands over a spare node within 60 s, so it is never short of nodes; imports take
8 s (both assumed); all that came after the last snapshot is done again."""
FACTORS = (1, 3, 10)
"""By which a restart may be slower on many nodes than where it was measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, metavar="FILE", help="JSON, in place of the defaults; what is not in it keeps its default")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--losses", type=int, default=2000, help="each job is simulated for as long as so many take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, nargs="+", metavar="GOODPUT_JSON", help="measured runs to be simulated")
    parser.add_argument("--measure", type=Path, metavar="RUN_FOLDER", help="print the costs that a run had")
    given = parser.parse_args(arguments)
    try:
        if min(given.nodes) < 1 or given.losses < 1:
            raise Refusal("--nodes and --losses must be 1 or more.")
        if given.measure is not None:
            print(json.dumps(asdict(measure(given.measure)), indent=1))
            return 0
        costs = Costs() if given.costs is None else read_costs(given.costs)
        if given.trace is not None:
            return max(show_trace(path, costs) for path in given.trace)
        show_scale(costs, given.nodes, given.losses, given.seed)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    return 0


def read_costs(path: Path) -> Costs:
    """Costs from a JSON file.

    Raises:
        Refusal: a field is wrong; says which.
    """
    try:
        return TypeAdapter(Costs).validate_json(path.read_bytes())
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(f"{path}: {where + ': ' if where else ''}{first['msg']}; see Costs in benchmarks/simulation.py.") from None


def show_trace(path: Path, costs: Costs) -> int:
    """Compare a measured run with its simulation; returns 1 if they differ too much."""
    trace = read_trace(path)
    outcome = compare(trace, costs)
    interruptions = len(trace.report.interruptions)
    print(f"{trace.path}: {trace.report.wall:.0f} s, {interruptions} interruptions\n{table(outcome)}")
    well = abs(outcome.difference) <= TOLERANCE
    print(f"goodput {'within' if well else 'off by more than'} {TOLERANCE:.0f} points ({outcome.difference:+.2f})\n")
    return 0 if well else 1


def show_scale(costs: Costs, nodes: Sequence[int], losses: int, seed: int) -> None:
    """The tables, and what they assume."""
    print("goodput: useful steps' share of the time, as in goodput.json. progress: steps done, as if all nodes had always been there.")
    for rate in RATES:
        print(f"\n{rate.name}: {rate.source}")
        print(f"{'':25}{'this project':^36}{'as others, goodput':>24}")
        print(f"{'nodes':>10}{'losses a day':>15}{'interval':>12}{'goodput':>12}{'progress':>12}{'30 minutes':>12}{'best':>12}")
        for number in nodes:
            print(row(rate, number, costs, losses, seed))
    show_slower(costs, max(nodes), losses, seed)
    hours = SnapshotsConfig().hours_between_failures
    print(
        f"\nAssumed: losses have no memory; {ALL:.0%} of them take all nodes at once (then the disk's snapshot is gone on from), "
        f"{HANGS:.1%} of hardware's are hangs; a lost node is replaced after {costs.replacement:.0f} s; steps take longer while nodes are "
        "missing; data, reports and evaluations take no time unless --costs says so; a restart takes as long on many nodes as where it was "
        "measured, which by default was without GPUs (hence the last table).\ninterval: of durable snapshots, by "
        "gai_yolo.checkpointing.schedule, with snapshots.hours_between_failures set to what the rate says; left at its default of "
        f"{hours:g} hours it is {own_policy(costs, 3600 * hours).interval:.0f} s everywhere.\n{ASSUMED_OF_OTHERS}"
    )


def row(rate: Rate, nodes: int, costs: Costs, losses: int, seed: int) -> str:
    """A line of a table."""
    between, others = rate.between(nodes), others_costs(costs)
    policy, best = own_policy(costs, between), replace(OTHERS, interval=young_daly(others.write, between))
    mine = simulate(rate, nodes, costs, policy, losses, seed)
    theirs = [simulate(rate, nodes, others, one, losses, seed).goodput for one in (OTHERS, best)]
    shares = "".join(f"{share:>12.2%}" for share in (mine.goodput, mine.progress, *theirs))
    return f"{nodes:>10,}{DAY / between:>15.3g}{policy.interval:>10.0f} s{shares}"


def show_slower(costs: Costs, nodes: int, losses: int, seed: int) -> None:
    """What if a restart of so many nodes takes longer than where it was measured?"""
    print(f"\ngoodput of this project on {nodes:,} nodes if all of a restart takes longer than measured, by a factor of")
    print(f"{'':20}" + "".join(f"{factor:>10}" for factor in FACTORS))
    for rate in RATES:
        shares = []
        for factor in FACTORS:
            slow = slower(costs, factor)
            shares.append(simulate(rate, nodes, slow, own_policy(slow, rate.between(nodes)), losses, seed).goodput)
        print(f"{rate.name:20}" + "".join(f"{share:>10.2%}" for share in shares))


def slower(costs: Costs, factor: float) -> Costs:
    """The same, with all of a restart so many times slower."""

    def stretched(restart: Restart) -> Restart:
        return Restart(**{name: factor * seconds for name, seconds in asdict(restart).items()})

    kinds = {one.name: stretched(getattr(costs.restart, one.name)) for one in fields(Restarts)}
    return replace(costs, restart=Restarts(**kinds), first_batch=factor * costs.first_batch)


def others_costs(costs: Costs) -> Costs:
    """The same machines and steps under `OTHERS`."""
    noticed = {"worker": 0.3, "node": 15.0, "notice": 15.0, "join": 0.3, "hang": 0.0, "all": 0.0}
    restarts = {
        kind: replace(getattr(costs.restart, kind), detection=seconds, rendezvous=0.5, imports=8.0) for kind, seconds in noticed.items()
    }
    return replace(costs, stall=1.1, write=1.1, snapshot=None, patience=600.0, restart=Restarts(**restarts))


if __name__ == "__main__":
    sys.exit(main())
