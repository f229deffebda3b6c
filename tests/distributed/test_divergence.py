"""A rank whose memory or processor is broken, found by the real job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import Running, run, small
from tests.runs import metrics, state_digest

SETTINGS = ("training.max_batches_per_epoch=12", "snapshots.interval_steps=1", "snapshots.keep=50")


def saved_steps(run_folder: Path) -> list[int]:
    """Steps of which a checkpoint or snapshot exists."""
    epochs = [12 * int(path.stem.removeprefix("epoch_")) for path in (run_folder / "checkpoints").glob("epoch_*.json")]
    return sorted(epochs + [int(path.stem.removeprefix("step_")) for path in (run_folder / "snapshots").glob("step_*.json")])


@pytest.mark.parametrize(("check", "flipped", "noticed"), [("interval", 15, "16"), ("before saving", 14, r"14|15|16|17|18|19|2\d")])
def test_a_flipped_bit_is_named_and_nothing_is_saved_after_it(check: str, flipped: int, noticed: str, tmp_path: Path, cache: Path) -> None:
    """Loss: a broken GPU's weights, saved over the good ones; found weeks later, or never."""
    interval = {"interval": "elastic.check_interval=8", "before saving": "elastic.check_interval=1000"}[check]
    saving = {"interval": ["snapshots.interval_steps=9"], "before saving": []}[check]
    arguments = ["--config", "configs/config_test_resume.yaml", *small(tmp_path, cache, *SETTINGS, interval, *saving)]
    job = Running("tests/distributed/flip.py", arguments, 3, {"FLIP_RANK": "1", "FLIP_STEP": str(flipped)})
    assert job.wait() != 0
    assert job.output.count("flipped a bit") == 1
    said = re.search(r"error: rank 1 on \S+ has another state than the other 2 ranks after step (\d+)", job.output)
    assert said and re.fullmatch(noticed, said[1]), job.output
    assert re.search(r"exitcode\s*: 3", job.output), "all ranks leave with the documented code"
    assert "Traceback" not in job.output.split("ChildFailedError")[0]
    before = saved_steps(tmp_path / "run")
    assert before and max(before) < flipped, "nothing after the flip"

    # On healthy machines the run goes on, and what was broken has left no trace.
    again = run("elastic_train.py", arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    healthy = ["--config", "configs/config_test_resume.yaml", *small(tmp_path / "healthy", cache, *SETTINGS)]
    assert run("elastic_train.py", healthy).returncode == 0
    last = "checkpoints/epoch_002.pt"
    assert state_digest(tmp_path / "run" / last) == state_digest(tmp_path / "healthy" / "run" / last)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [12, 24]
