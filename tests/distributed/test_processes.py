"""The same job on one, two and three processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.harness import run, small
from tests.runs import ledger, scalars

WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[int, Path]:
    """A run of two whole epochs for each world size."""
    folders = {}
    for processes in WORLD_SIZES:
        folder = tmp_path_factory.mktemp(f"processes_{processes}")
        arguments = small(folder, cache, "training.max_batches_per_epoch=null", "reporting.ledger=true")
        done = run("elastic_train.py", ["--config", "configs/config_test_resume.yaml", *arguments], processes)
        assert done.returncode == 0, done.stdout + done.stderr
        folders[processes] = folder / "run"
    return folders


@pytest.mark.parametrize("processes", WORLD_SIZES)
def test_every_sample_is_trained_on_exactly_once_an_epoch(processes: int, finished_runs: dict[int, Path], cache: Path) -> None:
    """A lost or doubled sample biases training and nobody would see it in the loss."""
    annotations = next(cache.glob("shapes-*")) / "annotations" / "train.json"
    expected = Counter(image["id"] for image in json.loads(annotations.read_text())["images"])
    epochs = ledger(finished_runs[processes])
    assert sorted(epochs) == [1, 2]
    for steps in epochs.values():
        assert Counter(i for step in steps.values() for micro_batch in step for i in micro_batch) == expected
    first, second = ([step for _, step in sorted(epochs[epoch].items())] for epoch in (1, 2))
    assert first != second, "epochs must be shuffled differently"
    ranks = len(list((finished_runs[processes] / "ledger").glob("rank_*.jsonl")))
    assert ranks == processes


def test_global_batches_and_micro_batches_do_not_depend_on_the_world_size(finished_runs: dict[int, Path]) -> None:
    """Otherwise a resize would change what is learned."""
    alone = ledger(finished_runs[1])
    assert ledger(finished_runs[2]) == alone
    assert ledger(finished_runs[3]) == alone


def test_losses_agree_between_world_sizes(finished_runs: dict[int, Path]) -> None:
    """A loss or gradient normalised per rank would differ by far more than the rounding of sums, which grows slowly."""
    alone = scalars(finished_runs[1], "Loss/Train_Batch")[:10]
    assert len(alone) == 10
    for processes in (2, 3):
        assert scalars(finished_runs[processes], "Loss/Train_Batch")[:10] == pytest.approx(alone, rel=1e-3)


def test_evaluation_gives_the_same_numbers_on_any_world_size(finished_runs: dict[int, Path], cache: Path) -> None:
    """Padding duplicates or a loss averaged per rank would make the reported mAP depend on the cluster."""
    checkpoint = str(finished_runs[1] / "checkpoints" / "epoch_002.pt")
    results = []
    for processes in WORLD_SIZES:
        done = run("tests/distributed/evaluate.py", [checkpoint, str(cache)], processes)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert results[0]["num_images"] == 80 and results[0]["num_detections"] > 0
    assert results[1] == results[0]
    assert results[2] == results[0]
