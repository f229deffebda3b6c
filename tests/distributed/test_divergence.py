"""What goes wrong on one rank, in the real job: found by all, said once, and nothing wrong is saved."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.harness import Running, run, small
from tests.runs import metrics, state_digest

CONFIG = ["--config", "configs/config_test_resume.yaml"]
STEPS = 8
"""An epoch."""
SETTINGS = (f"training.max_batches_per_epoch={STEPS}",)
EACH_STEP = ("snapshots.interval_steps=1", "snapshots.keep=50")


def saved_steps(run_folder: Path) -> list[int]:
    """Steps of which a checkpoint or snapshot exists."""
    epochs = [STEPS * int(path.stem.removeprefix("epoch_")) for path in (run_folder / "checkpoints").glob("epoch_*.json")]
    return sorted(epochs + [int(path.stem.removeprefix("step_")) for path in (run_folder / "snapshots").glob("step_*.json")])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> str:
    """Digest of a run on machines that make no mistakes."""
    folder = tmp_path_factory.mktemp("healthy")
    assert run("elastic_train.py", [*CONFIG, *small(folder, cache, *SETTINGS)]).returncode == 0
    return state_digest(folder / "run" / "checkpoints" / "epoch_002.pt")


@pytest.mark.parametrize(("check", "flipped", "noticed"), [("interval", 11, "12"), ("before saving", 10, r"1\d")])
def test_a_flipped_bit_is_named_and_nothing_is_saved_after_it(
    check: str, flipped: int, noticed: str, healthy: str, tmp_path: Path, cache: Path
) -> None:
    """Loss: a broken GPU's weights, saved over the good ones; found weeks later, or never."""
    interval = {"interval": "elastic.check_interval=6", "before saving": "elastic.check_interval=1000"}[check]
    saving = {"interval": ["snapshots.interval_steps=7"], "before saving": []}[check]
    arguments = [*CONFIG, *small(tmp_path, cache, *SETTINGS, *EACH_STEP, interval, *saving)]
    job = Running("tests/distributed/trouble.py", arguments, 3, {"TROUBLE": "flip", "TROUBLE_RANK": "1", "TROUBLE_STEP": str(flipped)})
    assert job.wait() != 0
    assert job.output.count("trouble: flip") == 1
    said = re.search(r"error: rank 1 on \S+ has another state than the other 2 ranks after step (\d+)", job.output)
    assert said and re.fullmatch(noticed, said[1]), job.output
    assert re.search(r"exitcode\s*: 3", job.output), "the documented code"
    assert job.output.count("Traceback") == 1, "torchrun's own"
    before = saved_steps(tmp_path / "run")
    assert before and max(before) < flipped, "nothing after the flip"

    # On healthy machines the run goes on, and what was broken has left no trace.
    again = run("elastic_train.py", arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert state_digest(tmp_path / "run" / "checkpoints" / "epoch_002.pt") == healthy
    assert [row["step"] for row in metrics(tmp_path / "run")] == [STEPS, 2 * STEPS]


def test_a_process_with_another_configuration_is_not_trained_with(tmp_path: Path, cache: Path) -> None:
    """Loss: a silent mixture of two runs, with exit code 0 and weights that nobody can make again."""
    other = {"OTHER_RANK": "1", "OTHER": "--set loss.box=15 --set augment.flip=0"}
    job = Running("tests/distributed/otherwise.py", [*CONFIG, *small(tmp_path, cache)], 2, other)
    assert job.wait() != 0, job.output
    assert re.search(r"\(rank 1\) has augment.flip 0.0 and loss.box 15.0, \S+ \(rank 0\) has 0.5 and 7.5", job.output), job.output
    assert job.output.count("Traceback") == 1, "torchrun's own"
    assert not (tmp_path / "run").exists(), "nothing is begun"


IDLE = (*SETTINGS, "training.batch_size=8", "training.micro_batch_size=4", "evaluation.interval=2")
"""Ranks that have nothing to do, if there are three."""


def test_a_gradient_that_is_no_number_on_one_rank_is_passed_over_by_all(tmp_path: Path, cache: Path) -> None:
    """Loss: ranks that wait for each other for ever, or each with other weights. In the first step, and with idle ranks."""
    digests = []
    for processes, rank in ((1, "0"), (3, "1")):
        folder = tmp_path / str(processes)
        trouble = {"TROUBLE": "nan", "TROUBLE_RANK": rank, "TROUBLE_STEP": "1"}
        job = Running("tests/distributed/trouble.py", [*CONFIG, *small(folder, cache, *IDLE)], processes, trouble)
        assert job.wait() == 0, job.output
        assert job.output.count("step 1 (step 1 of the epoch): the loss or the gradient is not finite; it is passed over") == 1
        digests.append(state_digest(folder / "run" / "checkpoints" / "epoch_002.pt"))
    assert digests[0] == digests[1]


def test_a_run_that_stays_bad_goes_back_twice_and_stops_with_one_line(tmp_path: Path, cache: Path) -> None:
    """Loss: a run that passes over every step and calls itself trained; or that ends without a word, because its first rank was killed
    before it spoke."""
    arguments = [*CONFIG, *small(tmp_path, cache, *IDLE, *EACH_STEP, "training.max_bad_steps=2")]
    job = Running("tests/distributed/trouble.py", arguments, 3, {"TROUBLE": "nans", "TROUBLE_RANK": "1", "TROUBLE_STEP": "6"})
    assert job.wait() != 0
    assert job.output.count("going back to the last good state") == 2, job.output
    assert (
        job.output.count("error: the loss or the gradient was not finite in 3 steps in a row, up to step 8, and so after going back") == 1
    )
    assert re.search(r"exitcode\s*: 2", job.output)
    steps = saved_steps(tmp_path / "run")
    assert steps and max(steps) == 5, "the last good one"


def test_a_jump_in_the_first_step_after_a_resume_leaves_no_trace_of_the_processes(tmp_path: Path, cache: Path) -> None:
    """Loss: ranks that wait for each other for ever, in every start: the first step of a process is when DDP rebuilds its buckets."""
    begun = tmp_path / "begun"
    done = run("elastic_train.py", [*CONFIG, *small(begun, cache, *IDLE, "training.epochs=1")])
    assert done.returncode == 0, done.stdout + done.stderr
    digests = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        shutil.copytree(begun, folder)
        trouble = {"TROUBLE": "jump", "TROUBLE_STEP": f"{STEPS + 1}"}
        job = Running("tests/distributed/trouble.py", [*CONFIG, *small(folder, cache, *IDLE)], processes, trouble)
        assert job.wait() == 0, job.output
        assert job.output.count("measured: True") == processes
        assert job.output.count(f"step {STEPS + 1}: the gradients jumped") == 1
        digests.append(state_digest(folder / "run" / "checkpoints" / "epoch_002.pt"))
    assert digests[0] == digests[1]
