"""How OpenMP's threads wait, as OpenMP itself has read it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gai_yolo.machine import SAID_BY, SPIN_COUNT, wait_briefly
from tests.harness import REPOSITORY


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP")
def test_openmp_knows_it_when_the_job_has_imported_torch() -> None:
    """Loss: set after PyTorch is imported, in one of the ways to start a job, it is heeded by nobody; beside one busy process a step
    takes three times as long."""
    environment = {key: value for key, value in os.environ.items() if key not in SAID_BY} | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(
        [sys.executable, "elastic_train.py", "--help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr


@pytest.mark.parametrize("name", SAID_BY)
def test_what_the_user_has_said_stays(name: str) -> None:
    """Loss: a cluster's operator has measured another setting, and is overruled."""
    said = {name: "ACTIVE"}
    wait_briefly(said)
    assert said == {name: "ACTIVE"}
