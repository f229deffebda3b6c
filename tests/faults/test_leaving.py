"""A process that has to go: in the middle of a step, in time, with everything saved; or one that makes no progress at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, Running, environment, finished, run, small
from tests.runs import state_digest

pytestmark = pytest.mark.timeout(600)
CONFIG = ["--config", "configs/config_test_resume.yaml"]
GRACE = 15.0
"""Seconds, as on GKE spot."""


def going_on(output: str) -> int:
    """The step that a start went on from."""
    found = re.search(r"going on from \S+ \(epoch \d+, step (\d+)\)", output)
    assert found, output
    return int(found[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_in_the_middle_of_a_long_step_it_is_gone_in_time_and_loses_none(
    number: signal.Signals, tmp_path: Path, cache: Path, figure: Callable[[str], None]
) -> None:
    """Loss: a spot machine is gone before the step is done, and with it everything since the last snapshot."""
    # Nothing saves by itself, and the second step is one that takes minutes.
    never = ("snapshots.interval_seconds=null", "elastic.memory_interval_steps=null", "training.max_batches_per_epoch=3")
    arguments = [*CONFIG, *small(tmp_path, cache, *never, "data.workers=1")]
    job = Running("tests/distributed/trouble.py", arguments, extra={"TROUBLE": "long", "TROUBLE_STEP": "2"})
    job.wait_for("trouble: long")
    told = time.monotonic()
    os.kill(job.process.pid, number)
    assert job.wait() == 75, job.output
    seconds = time.monotonic() - told
    assert seconds < GRACE
    assert "step 2/3" not in job.output and "the last step's state is saved" in job.output
    figure(f"{number.name} in mid-step: gone after {seconds:.2f} s")
    again = Running("elastic_train.py", arguments)
    again.wait_for("going on from")
    again.send(signal.SIGKILL)
    again.wait()
    assert going_on(again.output) == 1


def test_one_of_two_processes_is_told_and_both_end_at_the_same_step(tmp_path: Path, cache: Path) -> None:
    """Loss: ranks that disagree on the step at which one of them left, and wait for it; or another result."""
    settings = ("training.max_batches_per_epoch=12", "evaluation.interval=2", "data.workers=1")
    arguments = [*CONFIG, *small(tmp_path, cache, *settings)]
    job = Running("elastic_train.py", arguments, 2)
    job.wait_for("epoch 1/2  step 4/12")
    os.kill(job.training_processes()[1], signal.SIGTERM)
    assert job.wait() != 0
    last_step = max(int(step) for step in re.findall(r"epoch 1/2  step (\d+)/12", job.output))
    assert 4 <= last_step < 12 and "SIGTERM" in job.output, job.output
    done = run("elastic_train.py", arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert going_on(done.stdout) == last_step
    alone = run("elastic_train.py", [*CONFIG, *small(tmp_path / "alone", cache, *settings)])
    assert alone.returncode == 0
    last = Path("run") / "checkpoints" / "epoch_002.pt"
    assert state_digest(tmp_path / last) == state_digest(tmp_path / "alone" / last)


def test_the_first_process_of_a_node_dies_and_another_one_saves_for_it(tmp_path: Path, cache: Path) -> None:
    """Loss: everything since the last snapshot, because the one process died that keeps the node's state."""
    never = ("snapshots.interval_seconds=null", "elastic.memory_interval_steps=1000", "training.max_batches_per_epoch=12")
    job = Running("elastic_train.py", [*CONFIG, *small(tmp_path, cache, *never, "training.epochs=1")], 2, restarts=3)
    job.wait_for("epoch 1/1  step 5/12")
    os.kill(job.training_processes()[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert going_on(job.output) >= 5, job.output


def test_a_step_that_hangs_in_every_start_ends_the_job_with_the_reason(tmp_path: Path, cache: Path) -> None:
    """Loss: a job that hangs for ever, or is started again for ever, on machines that are paid by the hour."""
    settings = ("training.max_batches_per_epoch=12", "elastic.step_timeout_seconds=3", "elastic.memory_interval_steps=1")
    arguments = ["tests/distributed/trouble.py", *CONFIG, *small(tmp_path, cache, *settings)]
    launch = [sys.executable, "-m", "gai_yolo.cli", "launch", "--processes-per-node", "2", "--", *arguments]
    done = finished(launch, {**environment(), "TROUBLE": "hang", "TROUBLE_RANK": "1", "TROUBLE_STEP": "6"})
    output = done.stdout + done.stderr
    assert done.returncode == 4, output
    assert output.count("trouble: hang") == 4, "the first start made five steps; the three others none"
    assert "step hung: none for" in output and "in __call__" in output, "where it hangs"
    assert re.search(
        r"error: no progress: the last 3 starts that failed went on from step 5 and did not complete another one; the last one: \S+", output
    )
    assert output.count("error: no progress") == 1


def test_a_session_that_drops_costs_no_step(tmp_path: Path, cache: Path) -> None:
    """Loss: everything since the last snapshot, and the writer and the loaders with it, because a laptop was closed; or, as nothing can be
    said on a terminal that is gone, the state that was about to be saved."""
    never = ("snapshots.interval_seconds=null", "elastic.memory_interval_steps=null", "training.max_batches_per_epoch=25")
    arguments = [*CONFIG, *small(tmp_path, cache, *never, "training.batch_size=8", "data.workers=1")]
    master, slave = os.openpty()
    job = subprocess.Popen(
        [sys.executable, "elastic_train.py", *arguments],
        cwd=REPOSITORY,
        env={**environment(), "TERM": "dumb"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the session's terminal: its end is heard by all of the foreground
    )
    os.close(slave)
    said = ""
    try:
        while "step 3/25" not in said:
            said += os.read(master, 4096).decode(errors="replace")
        os.close(master)
        assert job.wait(60) == 75
    finally:
        job.kill()
    records = [json.loads(path.read_text()) for path in (tmp_path / "run" / "goodput").glob("*.json")]
    again = Running("elastic_train.py", arguments)
    again.wait_for("going on from")
    again.send(signal.SIGKILL)
    again.wait()
    step = going_on(again.output)
    assert step >= 3 and f"SIGHUP: left after step {step}" in str(records)


def test_five_deaths_in_a_row_before_the_first_step_do_not_end_the_job(tmp_path: Path, cache: Path) -> None:
    """Loss: `kill -9` three times during the start, by a kernel that is short of memory, gives exit code 4 for good; five times, 1."""
    settings = ("training.max_batches_per_epoch=1", "training.epochs=1")
    arguments = ["tests/distributed/trouble.py", *CONFIG, *small(tmp_path, cache, *settings)]
    deaths = {"TROUBLE": "kill", "TROUBLE_STEP": "1", "TROUBLE_DEATHS": f"{tmp_path / 'deaths'}:5"}
    done = finished([sys.executable, "-m", "gai_yolo.cli", "launch", "--", *arguments], {**environment(), **deaths})
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert (tmp_path / "deaths").read_text() == "xxxxx" and output.count("trouble: kill") == 6
    assert "3 starts from step 0 have ended before a new step was made: going on in 1 s" in output
    assert "launch: processes are killed as soon as they are started; starting again in 1 s\n" in output
