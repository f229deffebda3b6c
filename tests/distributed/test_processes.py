"""The same run, to the last bit, on any number of processes, interrupted and resized or not."""

from __future__ import annotations

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from gai_yolo.checkpointing.digest import part_digests
from tests.conftest import make_cache
from tests.harness import NUM_VALIDATION_IMAGES, Running, run, small
from tests.runs import ledger, scalars

pytestmark = pytest.mark.timeout(1200)
WORLD_SIZES = (1, 2, 3, 4)
STEPS, IMAGES = 6, 106
SETTINGS = (
    # Of all images: 5 steps of four uneven micro-batches and one of a single image, for which most ranks have nothing.
    "training.max_batches_per_epoch=null",
    "training.batch_size=21",
    "training.micro_batch_size=6",
    "evaluation.interval=1",
    # The first epoch with mosaic and mixup, the second without.
    "augment.close_mosaic=1",
    "augment.mixup=0.5",
    "training.optimizer=sgd",
    "training.ema_tau=5",
    "snapshots.interval_steps=2",
    "reporting.ledger=true",
)
assert IMAGES == (STEPS - 1) * 21 + 1
STATE = ("weights", "batch_norm", "ema", "optimizer")


def arguments(folder: Path, cache: Path, *values: str) -> list[str]:
    return ["--config", "configs/config_test_resume.yaml", *small(folder, cache, *SETTINGS, *values)]


def finished(folder: Path, cache: Path, processes: int, *values: str, plain: bool = False) -> Path:
    """The run folder of a run that nothing disturbed."""
    done = run("elastic_train.py", arguments(folder, cache, *values), processes, plain)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def has_snapshot_after(run_folder: Path, step: int) -> bool:
    return any(int(path.stem.removeprefix("step_")) > step for path in (run_folder / "snapshots").glob("*.json"))


def resized(folder: Path, cache: Path, sizes: tuple[int, ...], *values: str, seed: int = 0) -> Path:
    """The run folder of a run that is killed with SIGKILL in the middle of each epoch but for the last start, at steps drawn from
    the seed, and goes on with another number of processes each time."""
    rng = random.Random(seed)
    run_folder = folder / "run"
    for epoch, processes in enumerate(sizes[:-1], start=1):
        job = Running("elastic_train.py", arguments(folder, cache, *values), processes)
        job.wait_for(f"epoch {epoch}/2  step {rng.randrange(1, STEPS // 2)}/{STEPS}")
        job.hold_until(partial(has_snapshot_after, run_folder, (epoch - 1) * STEPS))
        job.send(signal.SIGKILL)
        job.wait()
        assert f"epoch {epoch}/2 done" not in job.output
    done = run("elastic_train.py", arguments(folder, cache, *values), sizes[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"going on from \S+snapshots/step_\d+\.pt \(epoch 1, step \d+\)", done.stdout), done.stdout
    return run_folder


def digests(run_folder: Path) -> dict[str, str]:
    return part_digests(torch.load(run_folder / "checkpoints" / "epoch_002.pt", weights_only=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As other tests have it, with half of the images."""
    return make_cache(tmp_path_factory.mktemp("half"), IMAGES)


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[int, Path]:
    """A run of two whole epochs for each world size; they also differ in what must not matter either."""
    differences = {
        1: (),
        2: ("data.workers=3",),
        3: ("snapshots.interval_steps=null", "snapshots.interval_seconds=null"),
        4: ("data.workers=1",),
    }
    return {
        processes: finished(tmp_path_factory.mktemp(f"processes_{processes}"), cache, processes, *values, plain=processes == 2)
        for processes, values in differences.items()
    }


def test_no_bit_depends_on_the_processes_the_loaders_or_interruptions(
    finished_runs: dict[int, Path], tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: the one promise that no other trainer makes."""
    expected = digests(finished_runs[1])
    for processes in WORLD_SIZES:
        assert digests(finished_runs[processes]) == expected, f"{processes} processes"
    assert digests(resized(tmp_path / "resized", cache, (1, 3, 2))) == expected, "1 -> 3 -> 2"
    rarely = digests(finished(tmp_path / "rarely", cache, 1, "evaluation.interval=2", "data.workers=1"))
    assert {part: rarely[part] for part in STATE} == {part: expected[part] for part in STATE}, "without an evaluation in between"
    figure(f"SGD; 1 to 4 processes; 0, 1, 3 loader workers; snapshots or not; 1 -> 3 -> 2 with SIGKILL: {expected}")


FINE_TUNING = (
    *("model.freeze=7", "model.freeze_epochs=1", "augment.multi_scale=0.5", "training.image_weights=0.9", "training.patience=5"),
    "loss.class_weights=auto",
)


@pytest.mark.parametrize(
    ("name", "values"),
    [("AdamW, fine-tuning", ("training.optimizer=adamw", *FINE_TUNING)), ("bf16", ("training.amp=bf16",))],
)
def test_no_bit_depends_on_a_resize_with_other_arithmetic(
    name: str, values: tuple[str, ...], finished_runs: dict[int, Path], tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: the promise holds for SGD in float32 only, and with all layers trained in one size."""
    expected = digests(finished(tmp_path / "alone", cache, 1, *values))
    assert digests(resized(tmp_path / "resized", cache, (1, 3, 2), *values, seed=1)) == expected
    assert expected["weights"] != digests(finished_runs[1])["weights"], "another arithmetic indeed"
    figure(f"{name}; 1 process, and 1 -> 3 -> 2 with SIGKILL: {expected}")


def test_plain_sums_are_another_matter(finished_runs: dict[int, Path], tmp_path: Path, cache: Path) -> None:
    """Loss: a test that would hold without anything being done for it. With plain DDP the losses agree to rounding, at first."""
    plain = ("training.exact=false", "training.epochs=1", "augment.close_mosaic=0", "training.max_batches_per_epoch=5")
    alone, pair = (finished(tmp_path / str(n), cache, n, *plain) for n in (1, 2))
    states = [torch.load(folder / "checkpoints" / "epoch_001.pt", weights_only=True) for folder in (alone, pair)]
    assert part_digests(states[0])["weights"] != part_digests(states[1])["weights"]
    assert scalars(pair, "Loss/Train_Batch") == pytest.approx(scalars(alone, "Loss/Train_Batch"), rel=1e-3)
    first = scalars(finished_runs[1], "Loss/Train_Batch")[0]
    assert scalars(alone, "Loss/Train_Batch")[0] == pytest.approx(first, rel=1e-6), "the same step as with exact sums"


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
    for processes in WORLD_SIZES[1:]:
        assert ledger(finished_runs[processes]) == alone


def test_evaluation_gives_the_same_numbers_on_any_world_size(finished_runs: dict[int, Path], cache: Path) -> None:
    """Padding duplicates or a loss averaged per rank would make the reported mAP depend on the cluster."""
    checkpoint = str(finished_runs[1] / "checkpoints" / "epoch_002.pt")
    results = []
    for processes in (1, 2, 3):
        done = run("tests/distributed/evaluate.py", [checkpoint, str(cache)], processes)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert results[0]["num_images"] == NUM_VALIDATION_IMAGES and results[0]["num_detections"] > 0
    assert results[1] == results[0]
    assert results[2] == results[0]
