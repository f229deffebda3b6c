"""A run that ends before its last epoch is complete: as any other, and for good."""

from __future__ import annotations

import time
from pathlib import Path

from gai_yolo.reporting.status import status_of
from tests.harness import run, small
from tests.runs import metrics

CONFIG = ["--config", "configs/config_test_resume.yaml"]


def start(folder: Path, cache: Path, *values: str) -> str:
    done = run("elastic_train.py", [*CONFIG, *small(folder, cache, "training.epochs=9", "training.checkpoint_interval=4", *values)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_patience_ends_a_run_that_says_so_and_stays_ended(tmp_path: Path, cache: Path) -> None:
    """Loss: the state of the last epoch is nowhere; or each start trains another epoch."""
    values = ("evaluation.interval=1", "training.lr=1e-9")  # the network learns nothing
    said = start(tmp_path, cache, *values, "training.patience=1")
    assert "finished: 2 of 9 epochs (mAP50-95 has not risen since epoch 1, training.patience = 1)" in said
    assert (tmp_path / "run" / "checkpoints" / "epoch_002.pt").is_file(), "whatever the interval of checkpoints"
    again = start(tmp_path, cache, *values, "training.patience=1")
    assert "finished: 2 of 9 epochs" in again and "step 1/" not in again
    assert status_of(tmp_path / "run", time.time()).report.epoch == 2, "and not in the one that will never be"
    assert "finished: 3 of 9 epochs" in start(tmp_path, cache, *values, "training.patience=2"), "with more patience it goes on"
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


def test_time_budget_ends_with_an_evaluation(tmp_path: Path, cache: Path) -> None:
    """Loss: hours of training, and no number at their end."""
    said = start(tmp_path, cache, "training.time_budget=1e-6")
    assert "finished: 1 of 9 epochs (no further one fits into training.time_budget" in said
    (row,) = metrics(tmp_path / "run")
    assert row["val_loss"] is not None and row["evaluation_seconds"] > 0, "although every thousandth epoch is evaluated"
    assert (tmp_path / "run" / "checkpoints" / "epoch_001.pt").is_file()
