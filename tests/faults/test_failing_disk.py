"""A real job on a disk that fails: training goes on, somebody is told once, and the checkpoints get there in the end."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gai_yolo.launcher.fork_server import FORKED_NAME
from gai_yolo.processes import children_of, name_of
from gai_yolo.store.catalogue import Catalogue
from tests.faults.faults import Faults
from tests.harness import PATIENCE, Running, environment, run, small, start
from tests.runs import metrics, state_digest
from tests.zygote import Forked

SETTINGS = (
    "training.epochs=4",
    "training.max_batches_per_epoch=8",
    "training.batch_size=4",
    "evaluation.interval=4",
    "snapshots.keep_epochs=1",
)
LAST = "checkpoints/epoch_004.pt"
# So few epochs that none is given up, and each is written in the end: so every fault fires, however fast the machine is. Each
# is in a try of its own, with a success before the next one, so that the pauses stay short.
DATA = [("write data", 1), ("fsync data", 2), ("close data", 5), ("open manifest", 4)]
MANIFEST = [("write manifest", 1), ("fsync manifest", 2), ("rename data", 3), ("rename manifest", 4)]
RETENTION = [("unlink manifest", 1), ("unlink data", 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> str:
    """Digest of the last state of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("main.py", small(folder, cache, *SETTINGS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout
    return state_digest(folder / "run" / LAST)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("writing", [DATA, MANIFEST], ids=["data", "manifest"])
def test_training_never_dies_of_a_failed_save(
    writing: list[tuple[str, int]], error: int, tmp_path: Path, cache: Path, undisturbed: str
) -> None:
    """Loss: a full disk at night, and in the morning the job is gone though the disk has been free since."""
    faults = Faults(tmp_path, tmp_path / "run")
    settings = (*SETTINGS, "snapshots.interval_seconds=null")
    job = Running("main.py", small(tmp_path, cache, *settings), extra=faults.at([*writing, *RETENTION], error))
    assert job.wait() == 0, job.output
    struck = sorted(call.what for call in faults.calls() if call.struck)
    assert struck == sorted(what for what, _ in (*writing, *RETENTION)), "every fault has fired"
    told = re.findall(r"warning: (\S+) could not be written: (.+?); needed (\d+\.\d) MB, free (\d+)\.\d MB", job.output)
    again = re.findall(r"was written, after (\d+) failed tries", job.output)
    assert all(os.strerror(error) in reason and 0.1 <= float(needed) < 10 and int(free) > 0 for _, reason, needed, free in told)
    assert len(told) == len(writing) and again == ["1"] * len(writing), "each outage is told once, and when it is over"
    assert job.output.count("older checkpoints cannot be removed") == len(RETENTION), "retention holds no checkpoint up, and is told"
    assert state_digest(tmp_path / "run" / LAST) == undisturbed
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"epoch_004.pt", "epoch_004.json", "best.pt", ".best", "training_metrics.json"}
    assert not list((tmp_path / "run").rglob("*.tmp")), "failed tries clean up behind themselves"
    catalogue = Catalogue(tmp_path / "run")
    assert all(catalogue.defect_of(one) is None for one in catalogue.listing().present)


def test_result_that_did_not_get_to_the_disk_is_brought_there_by_the_next_start(tmp_path: Path, cache: Path, undisturbed: str) -> None:
    """Loss: "make room and start again", and the next start finds the finished state in memory, says so, and forgets it."""
    faults = Faults(tmp_path, tmp_path / "run")
    last = [("fsync data", number) for number in range(4, 20)]  # as often as it is tried
    arguments = small(tmp_path, cache, *SETTINGS, "snapshots.interval_seconds=null")
    impatient = [*arguments, "--set", "snapshots.patience_seconds=2"]
    job = Running("main.py", impatient, extra=faults.at(last, errno.ENOSPC))
    assert job.wait() == 2, job.output
    assert "checkpoints/epoch_004.pt: could not be written within snapshots.patience_seconds" in job.output
    assert not (tmp_path / "run" / LAST).exists()
    again = run("main.py", arguments)
    assert again.returncode == 0 and "epoch 4/4  step" not in again.stdout, again.stdout + again.stderr
    assert "finished: 4 of 4 epochs" in again.stdout
    assert state_digest(tmp_path / "run" / LAST) == undisturbed


def test_folder_that_vanishes_while_training(tmp_path: Path, cache: Path) -> None:
    """Loss: an unmounted share ends the job, or the job writes on below the mount point."""
    settings = (
        *SETTINGS,
        "training.epochs=1000",
        "evaluation.interval=1000",
        "training.checkpoint_interval=1000",
        "snapshots.interval_steps=1",
    )
    snapshots = tmp_path / "run" / "snapshots"
    job = Running("main.py", small(tmp_path, cache, *settings))
    try:
        job.wait_for("epoch 2/1000  step 1/8")
        snapshots.rename(tmp_path / "elsewhere")
        job.wait_for("could not be written: No such file or directory")
        epoch = int(re.findall(r"epoch (\d+)/1000", job.output)[-1])
        job.wait_for(f"epoch {epoch + 2}/1000  step 1/8")
        assert not snapshots.exists()
        (tmp_path / "elsewhere").rename(snapshots)
        job.wait_for("failed tries")
        assert job.process.poll() is None and job.output.count("could not be written") == 1
    finally:
        job.send(signal.SIGKILL)
        job.wait()


def test_writer_that_is_killed_is_replaced(tmp_path: Path, cache: Path) -> None:
    """Loss: the kernel kills the small process for want of memory, and nothing is saved from then on, unnoticed."""
    faults = Faults(tmp_path, tmp_path / "run")
    settings = (
        *SETTINGS,
        "training.epochs=1000",
        "evaluation.interval=1000",
        "training.checkpoint_interval=1000",
        "snapshots.interval_steps=1",
    )
    job = Running("main.py", small(tmp_path, cache, *settings), extra=faults.at([("write data", 1)], "stop"))
    try:
        job.wait_for("epoch 2/1000  step 1/8")
        while not any(call.struck for call in faults.calls()):
            assert job.process.poll() is None, job.output
        victim = int(faults.log.read_text().split()[0])
        faults.at([], "stop")  # its successor is let alone
        os.kill(victim, signal.SIGKILL)  # in the middle of its work
        job.wait_for("failed tries")
        pids = {int(line.split()[0]) for line in faults.log.read_text().splitlines()}
        assert len(pids - {victim}) == 1 and "the writer process has died" in job.output
    finally:
        job.send(signal.SIGKILL)
        job.wait()


def test_ledger_that_cannot_be_written_is_told_and_ends_alone(tmp_path: Path, cache: Path) -> None:
    """Loss: a debugging aid ends the training it was to explain."""
    ledger = tmp_path / "run" / "ledger" / "rank_0.jsonl"
    ledger.parent.mkdir(parents=True)
    (ledger.parent / "rank_1.jsonl").write_bytes(b"5\n{}\n\xff\xfe\n")
    ledger.mkdir()
    done = run(
        "main.py", small(tmp_path, cache, *SETTINGS, "training.epochs=1", "reporting.ledger=true", "snapshots.interval_seconds=null")
    )
    assert done.returncode == 0 and done.stdout.count("the ledger ends here, training goes on") == 1
    assert "warning" not in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte; returns what takes the room."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")
    return filler


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_worker_that_dies_while_the_disk_is_full_goes_on_from_memory(
    small_disk: Path, tmp_path: Path, cache: Path, undisturbed: str
) -> None:
    """Loss: the launcher is gone after two seconds, for good, because nothing could be written at the start, although the last step was
    complete in /dev/shm."""
    memory = tmp_path / "memory"
    memory.mkdir()
    settings = ("snapshots.interval_seconds=null", "elastic.memory_interval_steps=1", f"elastic.memory_folder={memory}")
    arguments = small(small_disk, cache, *SETTINGS, *settings)
    output = tmp_path / "output"
    with output.open("wb") as out:
        launcher = start([sys.executable, "-m", "gai_yolo.cli", "launch", "--", "main.py", *arguments], environment(), output=out)
    try:
        wait_for(output, "epoch 2/4  step 2/8", launcher)
        filler = fill(small_disk)
        (agent,) = children_of(launcher.pid)
        (worker,) = (pid for pid in children_of(agent) if name_of(pid) != FORKED_NAME)
        os.kill(worker, signal.SIGKILL)
        wait_for(output, "epoch 3/4  step 2/8", launcher)
        assert re.search(rf"going on from {memory}\S+ \(epoch 1, step \d+\)", output.read_text()), output.read_text()
        filler.unlink()
        assert launcher.wait(240) == 0, output.read_text()
    finally:
        launcher.kill()
    assert state_digest(small_disk / "run" / LAST) == undisturbed


def wait_for(output: Path, text: str, process: subprocess.Popen[str] | Forked) -> None:
    """Wait until a text has appeared in the output of a process that lives."""
    deadline = time.monotonic() + PATIENCE
    while text not in output.read_text():
        assert time.monotonic() < deadline and process.poll() is None, output.read_text()
        time.sleep(0.1)
