"""When a run is complete: a function of its state and configuration, so that a start finds out as the one before did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gai_yolo.sections import TrainingConfig


def reason_to_end(training: TrainingConfig, rows: Sequence[Mapping[str, Any]], since: int = -1) -> str:
    """Why a run is complete, for people; empty while there is more to train.

    Args:
        rows: of metrics, of all completed epochs.
        since: only evaluations after this step count, see `TrainingState.best_since`.
    """
    if len(rows) >= training.epochs:
        return "all epochs"
    if is_budget_spent(training, rows):
        return f"no further one fits into training.time_budget = {training.time_budget:g} h"
    stale, best = epochs_without_rise(rows, since)
    if training.patience is not None and stale >= training.patience:
        return f"mAP50-95 has not risen since epoch {best}, training.patience = {training.patience}"
    return ""


def epochs_without_rise(rows: Sequence[Mapping[str, Any]], since: int = -1) -> tuple[int, int]:
    """Epochs from the best evaluation (of equals the first) to the last, 0 where the last epoch was not evaluated; and the best one's
    number."""
    judged = [row for row in rows if row["mAP50-95"] is not None and row.get("step", math.inf) > since]
    if not judged or judged[-1] is not rows[-1]:
        return 0, 0
    best = max(judged, key=lambda row: row["mAP50-95"])
    return judged[-1]["epoch"] - best["epoch"], best["epoch"]


def is_budget_spent(training: TrainingConfig, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another epoch as long as the last one, with an evaluation, would go beyond the time budget.

    Args:
        rows: the last one may be of an epoch that is not evaluated yet.
    """
    if training.time_budget is None or not rows:
        return False
    evaluations = [row.get("evaluation_seconds") or 0.0 for row in rows]
    evaluation = next((seconds for seconds in reversed(evaluations) if seconds), 0.0)
    is_evaluated = "evaluation_seconds" in rows[-1]
    spent = sum(row["seconds"] for row in rows) + sum(evaluations) + (0.0 if is_evaluated else evaluation)
    return bool(spent + rows[-1]["seconds"] + evaluation > 3600 * training.time_budget)
