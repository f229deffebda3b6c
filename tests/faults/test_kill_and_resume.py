"""Interrupting the real job and going on, as the first guide promises it."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gai_yolo.checkpointing.state import TIMES
from tests.harness import NUM_IMAGES, Running, run, small
from tests.runs import ledger, metrics, scalar_steps, state_digest

STEPS = 12
CONFIG = ["--config", "configs/config_test_resume.yaml"]


def _arguments(folder: Path, cache: Path) -> list[str]:
    # Without snapshots: what is tested here are the first guide's checkpoints after whole epochs.
    never = ("snapshots.interval_seconds=null", "elastic.memory_interval_steps=null")
    values = (f"training.max_batches_per_epoch={STEPS}", "training.batch_size=8", "data.workers=1", "evaluation.interval=1", *never)
    return [*CONFIG, *small(folder, cache, *values)]


def wait_for_epoch_2(job: Running, run_folder: Path) -> None:
    """Until the job is in the middle of epoch 2, and the checkpoint of epoch 1 is complete."""
    job.wait_for(f"epoch 2/2  step 2/{STEPS}")
    job.hold_until((run_folder / "checkpoints" / "epoch_001.json").exists)
    assert "epoch 2/2 done" not in job.output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("main.py", _arguments(folder, cache))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture
def job(tmp_path: Path, cache: Path) -> Iterator[Running]:
    """The same run, started in the background and waited for until it is in the middle of epoch 2."""
    running = Running("main.py", _arguments(tmp_path, cache))
    wait_for_epoch_2(running, tmp_path / "run")
    yield running
    if running.process.poll() is None:
        running.send(signal.SIGKILL)
        running.wait()


@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopped_in_epoch_2_and_resumed(
    signal_number: signal.Signals, exit_code: int, job: Running, undisturbed: Path, tmp_path: Path, cache: Path
) -> None:
    """An interruption must leave no trace: not in the weights, not in the metrics, not in TensorBoard."""
    job.send(signal_number)
    assert job.wait() == exit_code
    assert "Traceback" not in job.output
    folder = tmp_path / "run"
    assert [row["epoch"] for row in metrics(folder)] == [1]
    done_steps = re.findall(rf"epoch 2/2  step (\d+)/{STEPS}", job.output)[-1]

    done = run("main.py", [*_arguments(tmp_path, cache), "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    if signal_number == signal.SIGKILL:
        assert f"going on from {folder / 'checkpoints' / 'epoch_001.pt'} (epoch 1, step {STEPS})" in done.stdout
    else:
        left = STEPS + int(done_steps)
        assert re.search(rf"(Ctrl-C|SIGTERM): left after step {left}; the same command goes on", job.output)
        assert re.search(rf"going on from \S+step_{left:08d}.pt \(epoch 1, step {left}\)", done.stdout), "the very next step"
    assert "epoch 1/2" not in done.stdout and "epoch 2/2" in done.stdout

    assert state_digest(folder / "checkpoints" / "epoch_002.pt") == state_digest(undisturbed / "checkpoints" / "epoch_002.pt")
    steps = scalar_steps(folder)
    assert steps["Loss/Train_Batch"] == list(range(1, 2 * STEPS + 1))
    assert steps["Learning_Rate"] == list(range(1, 2 * STEPS + 1))
    assert steps["Loss/Train"] == steps["Loss/Validation"] == steps["COCO/mAP50-95"] == [STEPS, 2 * STEPS]
    assert steps == scalar_steps(undisturbed)
    timeless = [{key: row[key] for key in row.keys() - set(TIMES)} for row in metrics(folder)]
    expected = [{key: row[key] for key in row.keys() - set(TIMES)} for row in metrics(undisturbed)]
    assert timeless == expected


def test_two_processes_killed_and_resumed_by_one(tmp_path: Path, cache: Path) -> None:
    """The node that is left must be able to go on alone."""
    arguments = _arguments(tmp_path, cache)
    pair = Running("elastic_train.py", arguments, processes=2, plain=True)
    wait_for_epoch_2(pair, tmp_path / "run")
    pair.send(signal.SIGKILL)
    pair.wait()
    done = run("elastic_train.py", arguments, plain=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [STEPS, 2 * STEPS]
    assert scalar_steps(tmp_path / "run")["Loss/Train_Batch"] == list(range(1, 2 * STEPS + 1))


def test_two_processes_killed_before_anything_was_saved_are_one_run_with_the_one_that_is_left(tmp_path: Path, cache: Path) -> None:
    """Loss: what two processes had settled is settled anew by one: other micro-batches, other weights, and nobody notices."""
    never = ("snapshots.interval_seconds=null", "elastic.memory_interval_steps=null", "training.epochs=1")
    values = (*never, "training.max_batches_per_epoch=6", "training.batch_size=8")
    arguments = [*CONFIG, *small(tmp_path / "killed", cache, *values, "training.micro_batch_size=auto")]
    pair = Running("elastic_train.py", arguments, processes=2)
    pair.wait_for("epoch 1/1  step 1/6")
    pair.send(signal.SIGKILL)
    pair.wait()
    folder, undisturbed = tmp_path / "killed" / "run", tmp_path / "undisturbed" / "run"
    assert not list(folder.glob("*/*.pt"))
    done = run("elastic_train.py", arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch 8 in micro-batches of 4" in done.stdout
    assert run("elastic_train.py", [*CONFIG, *small(tmp_path / "undisturbed", cache, *values)]).returncode == 0
    last = Path("checkpoints") / "epoch_001.pt"
    assert state_digest(folder / last) == state_digest(undisturbed / last)


def test_killed_in_mid_epoch_trains_each_sample_once(tmp_path: Path, cache: Path) -> None:
    """Loss: samples trained twice or not at all after every preemption, which no loss curve shows."""
    whole = ("training.max_batches_per_epoch=null", "training.batch_size=12", "training.micro_batch_size=12")
    values = (*whole, "reporting.ledger=true", "snapshots.interval_steps=2")
    arguments = [*CONFIG, *small(tmp_path / "killed", cache, *values)]
    folder, undisturbed = tmp_path / "killed" / "run", tmp_path / "undisturbed" / "run"
    job = Running("main.py", arguments)
    while not list((folder / "snapshots").glob("step_*.json")):
        assert job.process.poll() is None, job.output
        time.sleep(0.01)
    job.send(signal.SIGKILL)
    job.wait()
    assert not list((folder / "checkpoints").glob("epoch_*.json")), "killed in the first epoch"
    done = run("main.py", arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"going on from \S+snapshots/step_\d+\.pt \(epoch 0, step \d+\)", done.stdout)

    assert run("main.py", [*CONFIG, *small(tmp_path / "undisturbed", cache, *values)]).returncode == 0
    assert ledger(folder) == ledger(undisturbed), "the same batches in the same steps"
    trained = [i for step in ledger(folder)[1].values() for micro_batch in step for i in micro_batch]
    assert len(trained) == len(set(trained)) == NUM_IMAGES
    assert state_digest(folder / "checkpoints" / "epoch_002.pt") == state_digest(undisturbed / "checkpoints" / "epoch_002.pt")
    assert scalar_steps(folder) == scalar_steps(undisturbed)
