"""Which checkpoints may go: a pure function that gives a reason for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gai_yolo.store.manifest import Manifest

LAST = "the last complete one"
BEST = "the best"
EVERY_EPOCH = "every epoch checkpoint is kept"
NOT_BEST = "no longer the best, and not due by the interval"


@dataclass(frozen=True)
class Policy:
    """What is kept besides the newest and the best checkpoint, which always are."""

    keep_steps: int = 2
    """Newest mid-epoch snapshots."""
    keep_epochs: int | Literal["all"] = "all"
    """Newest epoch checkpoints."""
    keep_every: int | None = None
    """Every this many epochs the epoch checkpoint is kept for ever."""
    best_since: int = -1
    """The step after which evaluations can be compared: before it the validation set was another one."""


@dataclass(frozen=True)
class Decision:
    """What is to become of one checkpoint, and why."""

    manifest: Manifest
    keep: bool
    reason: str


def decide(verified: Sequence[Manifest], policy: Policy) -> list[Decision]:
    """Decide on each checkpoint of a run; the result has the order of the input.

    Args:
        verified: complete ones only, with verified digests: whatever is counted here lets another one go.
    """
    newest_first = sorted(verified, key=lambda manifest: manifest.position, reverse=True)
    steps = [manifest for manifest in newest_first if manifest.kind == "step"]
    due_epochs = [manifest for manifest in newest_first if manifest.kind == "epoch" and manifest.due]
    best = best_of(verified, policy.best_since)
    decisions = []
    for manifest in verified:
        if manifest is newest_first[0]:
            kept, reason = True, LAST
        elif manifest is best:
            kept, reason = True, BEST
        elif manifest.kind == "step":
            kept, reason = _among_newest(manifest, steps, policy.keep_steps, "snapshots")
        elif not manifest.due:
            kept, reason = False, NOT_BEST
        elif policy.keep_epochs == "all":
            kept, reason = True, EVERY_EPOCH
        elif policy.keep_every is not None and manifest.position.epoch % policy.keep_every == 0:
            kept, reason = True, f"every {policy.keep_every} epochs one is kept"
        else:
            kept, reason = _among_newest(manifest, due_epochs, policy.keep_epochs, "epoch checkpoints")
        decisions.append(Decision(manifest, kept, reason))
    return decisions


def best_of(manifests: Sequence[Manifest], since: int = -1) -> Manifest | None:
    """The evaluated epoch with the highest mAP50-95, the earliest of equals, of those after the step `since` if there are any; None if none
    was evaluated."""
    evaluated = [manifest for manifest in manifests if manifest.kind == "epoch" and manifest.metric is not None]
    evaluated = [manifest for manifest in evaluated if manifest.position.step > since] or evaluated
    return max(evaluated, key=lambda manifest: (manifest.metric, -manifest.position.epoch), default=None)


def _among_newest(manifest: Manifest, newest_first: list[Manifest], count: int, what: str) -> tuple[bool, str]:
    if any(manifest is one for one in newest_first[:count]):
        return True, f"among the newest {count} {what}"
    return False, f"older than the newest {count} {what}"
