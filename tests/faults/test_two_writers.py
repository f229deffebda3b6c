"""Two jobs on one run folder, and a writer that was stopped, replaced, and goes on."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gai_yolo.errors import RunFolderBusy
from gai_yolo.store.best import BestCopy
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.lease import Fence, raise_fence
from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store
from tests.faults.faults import INJECT, Faults
from tests.harness import Running, environment, run, small

POLICY = Policy(keep_steps=1, keep_epochs=1)
OLDER, OLD, NEW = b"older" * 60_000, b"old" * 100_000, b"new" * 100_000


def manifest(epoch: int) -> Manifest:
    return Manifest("epoch", Position(10 * epoch, epoch, 160 * epoch), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z", 0.1 * epoch)


def save(store: Store, epoch: int, content: bytes) -> None:
    """What the writer process does with a request."""
    store.publish(manifest(epoch), lambda file: file.write(content))
    store.prune(POLICY)
    BestCopy(store).renew()


class OldWriter:
    """A writer of an earlier start, in a process of its own: a fork, as a process that imports everything again takes a second."""

    def __init__(self, run_folder: Path, fence: Fence, extra: dict[str, str]) -> None:
        self._said, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                os.environ.update(extra)
                runpy.run_path(str(INJECT / "sitecustomize.py"))
                os.nice(0)  # what the fault injection waits for
                os.write(writing, self._publish(Store(run_folder, fence)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        self._is_there = True

    @staticmethod
    def _publish(store: Store) -> str:
        try:
            save(store, 2, OLD)
        except RunFolderBusy as busy:
            return f"refused: {busy}"
        except FileNotFoundError as error:
            return f"gone: {error}"
        return "published"

    def has_ended(self) -> bool:
        """Whether it is gone."""
        if self._is_there:
            self._is_there = os.waitpid(self.pid, os.WNOHANG)[0] == 0
        return not self._is_there

    def goes_on(self) -> str:
        """Wake it, if it was stopped; returns what it says at its end."""
        os.kill(self.pid, signal.SIGCONT)
        said = b""
        while piece := os.read(self._said, 1 << 16):
            said += piece
        return said.decode()

    def end(self) -> None:
        """Leave nothing of it."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._said)


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with the digest of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_until_stopped(pid: int) -> None:
    """Until the kernel shows a process as stopped."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stopped_at_each_call(folder: Path, in_the_way: bool = False) -> Iterator[tuple[Path, OldWriter, str]]:
    """A writer that is about to publish epoch 2 on top of epoch 1, stopped right before each of its calls in turn: its run
    folder, its process, and the call. It is killed when the next one is asked for."""
    for number in range(1, 100):
        run_folder = folder / str(number) / "run"
        make_folders(run_folder)
        first = raise_fence(run_folder.parent / ".run.fence")
        save(Store(run_folder, first), 1, OLDER)
        if in_the_way:
            (run_folder / "checkpoints" / "epoch_002.pt").write_bytes(b"somebody's")
        faults = Faults(run_folder.parent, run_folder)
        writer = OldWriter(run_folder, first, faults.at([number], "stop"))
        try:
            while not writer.has_ended() and len(faults.calls()) < number:
                time.sleep(0.001)
            if writer.has_ended():
                return
            wait_until_stopped(writer.pid)
            yield run_folder, writer, faults.calls()[-1].what
        finally:
            writer.end()


def make_folders(run_folder: Path) -> None:
    """As a start does."""
    for name in ("checkpoints", "snapshots"):
        (run_folder / name).mkdir(parents=True)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see that a process is stopped")


@needs_proc
@pytest.mark.parametrize("in_the_way", [False, True])
def test_writer_stopped_at_any_call_and_replaced_changes_nothing_when_it_goes_on(in_the_way: bool, tmp_path: Path) -> None:
    """Loss: a machine that was cut off wakes up and renames its checkpoint over that of its successor."""
    victims = []
    for run_folder, writer, victim in stopped_at_each_call(tmp_path, in_the_way):
        successor = Store(run_folder, raise_fence(run_folder.parent / ".run.fence"))
        successor.sweep()
        for epoch in (2, 3):
            save(successor, epoch, NEW)
        before = contents(run_folder)
        said = writer.goes_on()
        if victim == "unlink data":
            del before["checkpoints/epoch_001.pt"]  # it had taken the manifest away before; this was no checkpoint any more
        assert contents(run_folder) == before, f"changed by a writer that was stopped before {victim}"
        listing = Catalogue(run_folder).listing()
        assert [one.position.epoch for one in listing.present] == [3] and all(successor.defect_of(one) is None for one in listing.present)
        assert said.startswith(("refused:", "gone:")) or victim in ("close folder", "open folder", "fsync folder", "unlink data"), said
        victims.append(victim)
    assert {
        "open data",
        "rename data",
        "rename manifest",
        "write best",
        "rename record",
        "rename best",
        "unlink manifest",
        "unlink data",
    } <= set(victims)
    assert len(victims) > 20


@needs_proc
def test_writer_stopped_at_any_call_takes_nothing_away_from_a_run_that_was_started_over(tmp_path: Path) -> None:
    """Loss: the new run's checkpoints have the old one's names; a late removal hits the wrong one."""
    victims = []
    for run_folder, writer, victim in stopped_at_each_call(tmp_path):
        fence = raise_fence(run_folder.parent / ".run.fence")
        run_folder.rename(run_folder.with_name("aside"))  # what --fresh does
        make_folders(run_folder)
        successor = Store(run_folder, fence)
        successor.sweep()
        save(successor, 1, NEW)
        before = contents(run_folder)
        writer.goes_on()
        assert contents(run_folder) == before, f"changed by a writer that was stopped before {victim}"
        victims.append(victim)
    assert {"open data", "rename data", "rename manifest", "write best", "unlink manifest", "unlink data"} <= set(victims)
    assert len(victims) > 20


def _arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    return small(
        folder,
        cache,
        "training.max_batches_per_epoch=5",
        "training.batch_size=4",
        "snapshots.interval_steps=1",
        "snapshots.keep=1",
        "evaluation.interval=1000",
        *more,
    )


def test_second_job_is_refused_with_the_name_of_the_first_and_disturbs_nothing(tmp_path: Path, cache: Path) -> None:
    """Loss: two jobs write into one run; or nobody can tell which process to stop."""
    arguments = _arguments(tmp_path, cache, "training.epochs=1000", "snapshots.keep_epochs=3")
    first = Running("main.py", arguments)
    try:
        first.wait_for("epoch 1/1000  step 1/5")
        second = run("main.py", arguments)
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
        assert f"another job (process {first.process.pid} on {os.uname().nodename}, since " in second.stderr
        prune = [sys.executable, "-m", "gai_yolo.cli", "snapshots", "prune", str(tmp_path / "run")]
        done = subprocess.run(prune, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 2 and f"process {first.process.pid}" in done.stderr
        epoch = int(re.findall(r"epoch (\d+)/1000", first.output)[-1])
        first.wait_for(f"epoch {epoch + 2}/1000  step 1/5")
        assert first.process.poll() is None and "warning" not in first.output, "the first job must not be disturbed"
    finally:
        first.send(signal.SIGKILL)
        first.wait()


@needs_proc
def test_stopped_writer_of_a_killed_job_cannot_publish_over_the_next_job(tmp_path: Path, cache: Path) -> None:
    """Loss: as above, with the real job: the writer process outlives its training process and wakes up later."""
    run_folder = tmp_path / "run"
    faults = Faults(tmp_path, run_folder)
    job = Running("main.py", _arguments(tmp_path, cache, "training.epochs=1000"), extra=faults.at([40], "stop"))
    while len(faults.calls()) < 40:
        assert job.process.poll() is None, job.output
        time.sleep(0.02)
    writer = int(faults.log.read_text().split()[0])
    wait_until_stopped(writer)
    job.process.kill()
    job.process.wait()
    done = run("main.py", _arguments(tmp_path, cache, "training.epochs=8"))
    assert done.returncode == 0, done.stdout + done.stderr
    before = contents(run_folder)
    os.kill(writer, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{writer}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{writer}").exists(), "it ends by itself"
    assert contents(run_folder) == before
    job.wait()
    catalogue = Catalogue(run_folder)
    assert catalogue.listing().defects == [] and all(catalogue.defect_of(one) is None for one in catalogue.listing().present)
    assert not [name for name in before if name.endswith(".tmp")], "the drafts of the dead were swept"
