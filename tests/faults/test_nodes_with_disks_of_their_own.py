"""Whole nodes come and go, none of which sees another one's disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.schedules import SEEDS, check_schedule

pytestmark = [pytest.mark.timeout(1500), pytest.mark.exhaustive]


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_job_finishes_by_itself_with_the_same_result(
    seed: int, tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: the promise, where there is no shared storage: the work is with whoever has it."""
    figure(check_schedule(seed, "local", tmp_path, cache))
