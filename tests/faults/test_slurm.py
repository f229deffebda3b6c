"""`launch/slurm.sbatch` under a real Slurm, with two nodes on this machine."""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.slurm_cluster import SlurmCluster, slurm_is_missing
from tests.harness import PATIENCE, REPOSITORY, small
from tests.runs import metrics, scalar_steps

pytestmark = pytest.mark.skipif(slurm_is_missing() is not None, reason=str(slurm_is_missing()))

STEPS = 12
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

STAND_IN = """#!/usr/bin/env bash
# In place of gai-yolo: each start ends with the next code of the list, or waits for SIGTERM or a file.
code=$(cut -d ' ' -f $((${SLURM_RESTART_COUNT:-0} + 1)) codes)
trap 'echo "node $SLURM_NODEID leaves"; exit 75' TERM
echo "node $SLURM_NODEID: $*"
[[ $code == wait ]] || exit "$code"
until [[ -e done ]]; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of one core."""
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder, SlurmCluster(Path(folder)) as started:
        yield started


class Submission:
    """One `sbatch` of the repository's script, from a folder that looks like the repository."""

    def __init__(self, cluster: SlurmCluster, folder: Path, options: list[str], arguments: list[str]) -> None:
        self._cluster, self._folder = cluster, folder
        script = str(REPOSITORY / "launch" / "slurm.sbatch")
        out = cluster.command("sbatch", "--parsable", *options, script, *arguments, cwd=folder).strip()
        assert out.isdigit(), out
        self.number = int(out)

    @property
    def log(self) -> str:
        """All that the job has said."""
        path = self._folder / f"gai-yolo-{self.number}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that must happen before the job ends."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            state = self._cluster.job(self.number)["JobState"]
            assert state not in ENDS and time.monotonic() < deadline, f"{what} did not come, the job is {state}:\n{self.log}"
            time.sleep(0.1)

    def wait(self) -> dict[str, str]:
        """What Slurm says of the job when it has ended."""
        deadline = time.monotonic() + PATIENCE
        while (job := self._cluster.job(self.number))["JobState"] not in ENDS:
            assert time.monotonic() < deadline, f"still {job['JobState']}:\n{self.log}"
            time.sleep(0.1)
        return job


def _stand_in(folder: Path, codes: str) -> Path:
    launcher = folder / ".venv" / "bin" / "gai-yolo"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(STAND_IN, encoding="utf-8")
    launcher.chmod(0o755)
    (folder / "codes").write_text(codes, encoding="utf-8")
    return folder


def test_job_under_notice_is_requeued_and_goes_on_at_the_next_step(cluster: SlurmCluster, tmp_path: Path, cache: Path) -> None:
    """Loss: at each time limit of the queue, all that was trained since the last checkpoint; or the job itself."""
    for name, target in {".venv": Path(sys.prefix), **{name: REPOSITORY / name for name in ("elastic_train.py", "configs")}}.items():
        (tmp_path / name).symlink_to(target)
    # The two nodes are one machine here, so they cannot have a memory of their own.
    values = (f"training.max_batches_per_epoch={STEPS}", "snapshots.interval_seconds=null", "elastic.memory_interval_steps=null")
    arguments = ["--config", "configs/config_test_resume.yaml", *small(tmp_path, cache, *values)]
    job = Submission(cluster, tmp_path, ["--nodes=2", "--time=10"], arguments)
    job.wait_for(lambda: "epoch 1/2  step 3/" in job.log, "the third step")
    cluster.command("scancel", "--signal=USR1", "--batch", str(job.number))  # as Slurm does before the time limit

    told = job.wait()
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), job.log
    assert "exit code 75; requeued" in job.log
    assert job.log.count("2 processes on cpu") == 2
    assert (tmp_path / "run" / "checkpoints" / "epoch_002.pt").exists()
    steps = [(int(epoch), int(step)) for epoch, step in re.findall(rf"epoch (\d)/2  step (\d+)/{STEPS}", job.log)]
    assert steps == list(itertools.product((1, 2), range(1, STEPS + 1))), "each step once"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [STEPS, 2 * STEPS]
    assert scalar_steps(tmp_path / "run")["Loss/Train_Batch"] == list(range(1, 2 * STEPS + 1))
    assert list((tmp_path / "experiments" / ".rendezvous").iterdir()) == []


@pytest.mark.parametrize("code", [2, 3, 4])
def test_refusal_is_not_requeued(code: int, cluster: SlurmCluster, tmp_path: Path) -> None:
    """Loss: a queue that starts the same mistake again for weeks."""
    told = Submission(cluster, _stand_in(tmp_path, f"{code} 0"), ["--nodes=2"], []).wait()
    assert (told["JobState"], told["Restarts"], told["ExitCode"]) == ("FAILED", "0", f"{code}:0")


def test_killed_launcher_is_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Loss: the job, because the kernel's OOM killer took the launcher of one node."""
    job = Submission(cluster, _stand_in(tmp_path, "137 0"), ["--nodes=2", "--cpus-per-task=1"], ["--set", "a=b c"])
    told = job.wait()
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), job.log
    assert job.log.count("-- elastic_train.py --set a=b c") == 4, "two nodes, two starts"
    assert f"/.rendezvous/slurm-{job.number}-0 " in job.log and f"/.rendezvous/slurm-{job.number}-1 " in job.log


def test_cancelled_job_saves_and_stays_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Loss: a job that its owner cannot get rid of; or one that is killed without having saved."""
    job = Submission(cluster, _stand_in(tmp_path, "wait 0"), ["--nodes=2"], [])
    job.wait_for(lambda: "node 0: launch" in job.log and "node 1: launch" in job.log, "both launchers")
    cluster.command("scancel", str(job.number))
    told = job.wait()
    assert (told["JobState"], told["Restarts"]) == ("CANCELLED", "0"), job.log
    assert "node 0 leaves" in job.log and "node 1 leaves" in job.log


@pytest.mark.parametrize(
    ("lost", "options", "restarts"),
    [("n1", [], "1"), ("n2", [], "1"), ("n2", ["--no-kill"], "0")],
    ids=["first", "other", "other-no-kill"],
)
def test_job_goes_on_after_the_loss_of_a_node(lost: str, options: list[str], restarts: str, tmp_path: Path) -> None:
    """Loss: the job, which Slurm ends with a node, or leaves without its script for the rest of the time limit."""
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder, SlurmCluster(Path(folder)) as cluster:
        job = Submission(cluster, _stand_in(tmp_path, "wait wait"), ["--nodes=1-2", *options], [])
        job.wait_for(lambda: "node 0: launch" in job.log and "node 1: launch" in job.log, "both launchers")
        cluster.lose(lost)
        left = "n2" if lost == "n1" else "n1"
        job.wait_for(lambda: cluster.job(job.number).items() >= {"JobState": "RUNNING", "NodeList": left}.items(), "a run on one node")
        job.wait_for(lambda: job.log.count(": launch") == 2 + int(restarts), "the launcher there")
        (tmp_path / "done").touch()
        told = job.wait()
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", restarts), job.log
