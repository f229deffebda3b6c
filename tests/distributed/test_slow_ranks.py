"""Ranks that work for different times, in the real job."""

from __future__ import annotations

from pathlib import Path

from tests.harness import Running, small
from tests.runs import state_digest

CONFIG = ["--config", "configs/config_test_resume.yaml"]
TIMEOUT, SLOW = 5.0, 7.0
"""Seconds that ranks wait for each other where nobody works, and that one of them works at each of four things."""


def test_long_work_of_one_rank_costs_no_start_and_no_bit(tmp_path: Path, cache: Path) -> None:
    """Loss: endless restarts of a job that evaluates, reads its index or fills its cache for longer than `elastic.timeout_seconds`."""
    settings = ("training.epochs=1", f"elastic.timeout_seconds={TIMEOUT}", "elastic.step_timeout_seconds=6", "data.cache=ram")
    digests: list[str] = []
    for script, extra in (("tests/distributed/slow.py", {"SLOW_SECONDS": str(SLOW)}), ("elastic_train.py", {})):
        folder = tmp_path / str(len(digests))
        job = Running(script, [*CONFIG, *small(folder, cache, *settings)], 2, extra)
        assert job.wait() == 0, job.output
        assert job.output.count("slow: ") == (4 if extra else 0)
        digests.append(state_digest(folder / "run" / "checkpoints" / "epoch_001.pt"))
    assert digests[0] == digests[1]
