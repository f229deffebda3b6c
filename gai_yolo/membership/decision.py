"""Whose run it is: which one is gone on with, of those that the nodes' run folders and memories hold, and what becomes of the others.

Two runs that took the same turns (`run_record.Turn`) are the same trajectory, whatever they are called: of these the most verified progress
is gone on from, wherever it lies, and the others join it. Where they differ nobody trains before a person has chosen. The decision is a
pure function of what all ranks told, and of no rank's number.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gai_yolo.errors import Refusal
from gai_yolo.store.manifest import Position
from gai_yolo.store.run_record import START, RunRecord, Settled, Turn

MOST_TOLD = 3
"""Differences that are named."""


@dataclass(frozen=True)
class Claim:
    """What one place of one node holds of a run."""

    place: str
    """Host and folder, for people."""
    tier: Literal["disk", "memory"]
    record: RunRecord
    """Without a `run_id` if the folder has none, because an older version made it."""
    progress: Position | None = None
    """Of the newest state there that was verified."""

    @property
    def way(self) -> tuple[str, str]:
        """Equal for claims that have nothing to settle among themselves."""
        return self.record.run_id, json.dumps([asdict(turn) for turn in self.record.turns], sort_keys=True)


@dataclass(frozen=True)
class Fate:
    """What is to become of the states of a claim."""

    aside: bool = False
    """All of them are moved aside."""
    beyond: Position | None = None
    """Those newer than this are moved aside."""
    why: str = ""
    """For people."""


KEPT = Fate()


def is_open(claims: Sequence[Claim]) -> bool:
    """Whether it takes a look at the states to tell whose run it is."""
    return len({claim.way for claim in claims}) > 1


def decide(claims: Sequence[Claim], started_over: bool, exact: bool, name: str, launch: str = "") -> tuple[RunRecord, list[Fate]]:
    """Whose run it is, and what becomes of each claim.

    Args:
        claims: of all nodes; their progress needs to be known only if `is_open`.
        started_over: with --fresh, just now.
        exact: states of equal position are equal in runs of the same turns.
        name: drawn at random, for a new run.
        launch: of a job with --fresh, which starts, or has started, the run over; else empty.

    Raises:
        Refusal: there are different runs, and a person has to choose.
    """
    last = max((claim.record.generation for claim in claims), default=0)
    if started_over:
        return RunRecord(f"{last + 1}-{name}", launch=launch), [Fate(aside=True, why="the run was started over") for _ in claims]
    known = {claim.record.run_id for claim in claims if claim.tier == "disk"}
    counting = [claim.tier == "disk" or not claim.record.anchored or claim.record.run_id in known for claim in claims]
    newest = max((claim.record.generation for claim, counts in zip(claims, counting, strict=True) if counts), default=0)
    # Nodes that were not there when the job started over know neither that nor its generation.
    ours = _of_job(claims, launch, newest)
    fates = [KEPT] * len(claims)
    current = []
    for place, claim in enumerate(claims):
        if not counting[place]:
            fates[place] = Fate(aside=True, why="no run folder knows its run any more")
        elif claim.record.launch != launch if ours else claim.record.generation < newest:
            fates[place] = Fate(aside=True, why="is of another run than the other nodes'")
        else:
            current.append(place)
    current.sort(key=lambda place: _order(claims[place]))  # so that all refuse alike
    candidates = [claims[place] for place in current]
    best = _best(candidates)
    record = RunRecord(f"{max(last, 1)}-{name}")
    if best is not None:
        for place in current:
            fates[place] = _fate(claims[place], best, exact)
        record = _record(best, candidates, record.run_id)
    return record, fates


def _of_job(claims: Sequence[Claim], launch: str, newest: int) -> bool:
    """Whether a run that this job has started over is the one to go on with, whatever the other nodes bring.

    Raises:
        Refusal: another one was started over more often. Whether that was before or after, no clock tells for certain.
    """
    ours = [claim for claim in claims if launch and claim.record.launch == launch]
    if not ours or any(claim.record.generation == newest for claim in ours):
        return bool(ours)
    other = min((claim for claim in claims if claim.record.generation == newest), key=_order)
    raise Refusal(_conflict(other, min(ours, key=_order), 0))


def _order(claim: Claim) -> tuple[str, ...]:
    """For sorting, so that no rank's number decides; two machines may well have the same name."""
    return claim.place, claim.tier, repr(claim)


def _best(candidates: Sequence[Claim]) -> Claim | None:
    """Which of the sorted claims is gone on with. Who has gone back meant it; otherwise the most progress counts. An empty folder never
    counts, unless all are empty."""
    named = Counter(claim.record.run_id for claim in candidates if claim.record.run_id)
    ordered = sorted(candidates, key=lambda claim: (-named[claim.record.run_id], claim.record.run_id))
    holders = [claim for claim in ordered if claim.progress is not None]
    if holders:
        return max(holders, key=lambda claim: (claim.record.rollbacks, claim.progress, len(claim.record.turns), bool(claim.record.run_id)))
    return next((claim for claim in ordered if claim.record.run_id), None)


def _record(best: Claim, candidates: Sequence[Claim], new_id: str) -> RunRecord:
    """What all keep of the run from now on."""
    run_id = best.record.run_id or new_id
    alike = [claim.record for claim in candidates if claim.way == best.way]
    of_run = [claim.record for claim in candidates if claim.record.run_id == best.record.run_id]
    # A run whose turns are unsaid has not gone back: its progress would not be there.
    turns = best.record.turns or max((record.turns for record in of_run if not record.rollbacks), key=len, default=())
    settled: dict[str, Settled] = next((record.settled for record in [best.record, *alike, *of_run] if record.settled), {})
    return RunRecord(run_id, turns, settled, launch=best.record.launch)


def _fate(claim: Claim, best: Claim, exact: bool) -> Fate:
    if claim.progress is None or claim.way == best.way:
        return KEPT
    same_run = claim.record.run_id == best.record.run_id
    mine, its = claim.record.turns, best.record.turns
    if same_run and not (mine and its):
        return KEPT
    common = sum(1 for _ in itertools.takewhile(lambda pair: is_same(*pair), zip(mine, its, strict=False)))
    apart = [turns[common].position for turns in (mine, its) if len(turns) > common]
    # Whoever has gone back after a turn may have gone back behind it.
    apart += [turn.position for turn in (*mine[common:], *its[common:]) if turn.rollback]
    fork = min(apart, default=None)
    if not (mine and its) or (fork is not None and (common == 0 or (not same_run and claim.progress > fork))):
        raise Refusal(_conflict(best, claim, common))
    if not same_run and not exact:
        return Fate(aside=True, why=f"is of a run that has less progress than {best.place}, and without exact sums it cannot join it")
    if fork is None or claim.progress <= fork:
        return KEPT
    gone_back = best.record.rollbacks > claim.record.rollbacks
    why = "a person has gone back" if gone_back else "the run went on from there with other settings, and got further"
    return Fate(beyond=fork, why=why)


def _conflict(best: Claim, other: Claim, common: int) -> str:
    between = differences(best.record.turns, other.record.turns, common)
    return (
        f"{best.place} ({_said(best.progress)}) and {other.place} ({_said(other.progress)}) hold different runs{between}: nothing is "
        "trained and nothing was changed; move the folder that is not wanted aside, or take --fresh (which keeps both) or another "
        "experiment.name."
    )


def differences(ones: Sequence[Turn], others: Sequence[Turn], common: int) -> str:
    """In what two runs differ where they part, after so many common turns, for people; empty if that is not known."""
    if not ones or not others:
        return ""
    one, other = (turns[min(common, len(turns) - 1)] for turns in (ones, others))
    if one.rollback or other.rollback:
        return " (somebody has gone back in one of them)"
    keys = differing(one.settings, other.settings)
    named = [f"{key} is {_short(one.settings[key])} and {_short(other.settings[key])}" for key in keys[:MOST_TOLD]]
    more = [f"and {len(keys) - MOST_TOLD} more keys differ"] if len(keys) > MOST_TOLD else []
    return f" ({', '.join([*named, *more])})" if keys else ""


def turns_after(record: RunRecord, position: Position | None, settings: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of a run that goes on under these settings, from a position, or from its beginning."""
    if position is None or not record.turns:
        return (Turn(START, settings),)
    # The weights that it began with play no part any more.
    alike = not differing({**record.turns[-1].settings, "model.weights": settings.get("model.weights")}, settings)
    return record.turns if alike else (*record.turns, Turn(position, settings))


def is_same(one: Turn, other: Turn) -> bool:
    """Whether two runs took the same turn."""
    return (one.position, one.rollback) == (other.position, other.rollback) and not differing(one.settings, other.settings)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys whose values differ. Those that only one knows belong to another version of this program, and are passed over."""
    return sorted(key for key in one.keys() & other.keys() if one[key] != other[key])


def _said(position: Position | None) -> str:
    return "no complete state" if position is None else f"epoch {position.epoch}, step {position.step}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
