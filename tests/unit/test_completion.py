"""A run ends early for reasons that its state knows."""

from __future__ import annotations

from typing import Any

import pytest

from gai_yolo.checkpointing.completion import epochs_without_rise, is_budget_spent, reason_to_end
from gai_yolo.sections import TrainingConfig


def rows(*metrics: float | None) -> list[dict[str, Any]]:
    return [
        {"epoch": n, "step": 10 * n, "mAP50-95": metric, "seconds": 60.0, "evaluation_seconds": None if metric is None else 30.0}
        for n, metric in enumerate(metrics, start=1)
    ]


def config(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"epochs": 10, **settings})


@pytest.mark.parametrize(
    ("metrics", "stale"),
    [
        ((), 0),
        ((0.1,), 0),
        ((0.1, 0.2, 0.2), 1),
        ((0.3, 0.1, 0.2, 0.3), 3),
        ((0.3, None, None, 0.2), 3),
        ((0.3, None, None), 0),
        ((None, None), 0),
        ((0.1, None, 0.2), 0),
    ],
)
def test_patience_counts_epochs_since_the_best_and_asks_after_evaluations_only(metrics: tuple[float | None, ...], stale: int) -> None:
    """Loss: a run that evaluates every fifth epoch ends before it could show that it got better."""
    assert epochs_without_rise(rows(*metrics))[0] == stale


def test_patience_ends_a_run_and_names_its_best_epoch() -> None:
    """Loss: nights of training that change nothing."""
    history = rows(0.1, 0.4, 0.3, 0.4)
    assert reason_to_end(config(patience=3), history) == ""
    assert "since epoch 2" in reason_to_end(config(patience=2), history)
    assert reason_to_end(config(), history) == ""
    assert reason_to_end(config(epochs=4), history) == "all epochs"


def test_another_validation_set_begins_the_count_anew() -> None:
    """Loss: a run that ends because the old validation set was easier."""
    history = rows(0.9, 0.3, 0.2)
    assert reason_to_end(config(patience=2), history) != ""
    assert reason_to_end(config(patience=2), history, since=10) == ""


def test_time_budget_ends_before_the_epoch_that_would_not_fit() -> None:
    """Loss: the slot is over in the middle of an epoch that was never evaluated."""
    history = rows(0.1, 0.2)  # 180 s
    assert reason_to_end(config(time_budget=271 / 3600), history) == ""
    assert "training.time_budget" in reason_to_end(config(time_budget=269 / 3600), history)
    assert reason_to_end(config(time_budget=1e-6), []) == "", "one epoch is made"


def test_time_budget_counts_the_evaluation_that_is_still_to_come() -> None:
    """Loss: the last epoch ends without numbers, or the budget is overdrawn by an evaluation."""
    trained = [*rows(0.1), {"epoch": 2, "step": 20, "seconds": 60.0}]  # 150 s, and 30 s for the evaluation
    assert is_budget_spent(config(time_budget=269 / 3600), trained)
    assert not is_budget_spent(config(time_budget=271 / 3600), trained)


def test_rows_of_older_versions_know_no_time_of_evaluation() -> None:
    """Loss: a run of the version before cannot be gone on with."""
    old = [{key: value for key, value in row.items() if key != "evaluation_seconds"} for row in rows(0.1, 0.2)]
    assert not is_budget_spent(config(time_budget=181 / 3600), old) and is_budget_spent(config(time_budget=179 / 3600), old)
