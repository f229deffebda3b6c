"""Where there is no flock, and where an answer of NFS is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from gai_yolo.errors import RunFolderBusy
from gai_yolo.store import lease_file
from gai_yolo.store.lease import Lease, raise_fence
from gai_yolo.store.lease_file import RENEWED_EVERY, STALE, LeaseFile
from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.store import Store


class Clock:
    """Moves by what is slept; `each` is called then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.each = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.each()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without it."""

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def of_a_machine_that_is_gone(path: Path) -> None:
    """The file that it has left."""
    path.write_text(json.dumps({"host": "gone", "boot": "b", "pid": 1, "nonce": "n", "beat": 7}))


@pytest.mark.usefixtures("no_flock")
def test_lock_of_a_machine_that_is_gone_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: without flock one lost machine locks a run for ever."""
    monkeypatch.setattr(lease_file, "STALE", 0.5)
    monkeypatch.setattr(lease_file, "SETTLED", 0.05)
    monkeypatch.setattr("socket.gethostname", lambda: "gone")
    first = Lease(tmp_path / "run")
    first.acquire(0.1)
    for path in tmp_path.glob(".run.lease"):
        of_a_machine_that_is_gone(path)  # its thread sees that and renews it no more, as if it was dead
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    second = Lease(tmp_path / "run")
    assert second.acquire(0.1).number == 2
    second.release()


@pytest.mark.usefixtures("no_flock")
def test_two_jobs_are_kept_apart_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """Loss: two jobs on one run; or a run that is over locks the next one out."""
    monkeypatch.setattr(lease_file, "RENEWED_EVERY", 0.05)
    first, second = Lease(tmp_path / "run"), Lease(tmp_path / "run")
    first.acquire(0.1)
    assert len(told) == 1 and "has no flock" in told[0]
    with pytest.raises(RunFolderBusy):
        second.acquire(0.5)
    first.release()
    second.acquire(0.5)
    second.release()
    assert not (tmp_path / ".run.lease").exists()


def test_an_owner_that_renews_is_never_replaced_and_one_that_stops_is(tmp_path: Path) -> None:
    """Loss: a living job is replaced; or a dead one is waited for until a person comes."""
    path, clock = tmp_path / "lease", Clock()
    of_a_machine_that_is_gone(path)
    beats = iter(range(10**6))

    def beat() -> None:
        if clock.now < 1000.0:
            path.write_text(json.dumps({"host": "other", "boot": "b", "pid": 1, "nonce": "n", "beat": next(beats)}))

    clock.each = beat
    waiting = LeaseFile(path, clock, clock.sleep)
    assert waiting.acquire(10.0) is False and 10.0 <= clock.now < 10.0 + 2 * RENEWED_EVERY
    clock.now = 1000.0
    assert waiting.acquire(10.0) is True and STALE <= clock.now - 1000.0 < STALE + 3 * RENEWED_EVERY
    waiting.release()


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    """Loss: a minute at each start after a crash."""
    child = os.fork()
    if child == 0:
        LeaseFile(tmp_path / "lease").acquire(1.0)
        os._exit(0)
    os.waitpid(child, 0)
    clock = Clock()
    lease = LeaseFile(tmp_path / "lease", clock, clock.sleep)
    assert lease.acquire(0.0) and clock.now < 5.0
    lease.release()


@pytest.mark.parametrize("namespace", [{"pid_namespace": "pid:[1]"}, {}], ids=["another container", "an older version"])
def test_process_id_of_another_container_says_nothing(namespace: dict[str, str], tmp_path: Path) -> None:
    """Loss: of two containers on one host's network, the second takes the lock of the first, which lives, and both write."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    clock, path = Clock(), tmp_path / "lease"
    first = LeaseFile(path, clock, clock.sleep)
    assert first.acquire(0.0)
    owner = json.loads(path.read_bytes())
    first.release()
    owner.pop("pid_namespace", None)
    path.write_text(json.dumps({**owner, "pid": child, "nonce": "n", **namespace}))
    second = LeaseFile(path, clock, clock.sleep)
    assert second.acquire(STALE) and clock.now >= STALE
    second.release()


def test_of_many_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: all nodes of a job that was started anew believe to be the one that writes."""
    monkeypatch.setattr(lease_file, "STALE", 2.0)
    monkeypatch.setattr(lease_file, "RENEWED_EVERY", 0.05)
    monkeypatch.setattr(lease_file, "SETTLED", 0.3)
    of_a_machine_that_is_gone(tmp_path / "lease")
    leases, won = [LeaseFile(tmp_path / "lease") for _ in range(6)], list[int]()

    def run(number: int) -> None:
        if leases[number].acquire(1.0):
            won.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    time.sleep(0.2)
    leases[won[0]].release()
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_an_owner_whose_disk_is_away_for_a_while_renews_its_lock_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: after a hiccup of the share a living job counts as dead, and a second one takes its run over."""
    monkeypatch.setattr(lease_file, "RENEWED_EVERY", 0.05)
    folder = tmp_path / "share"
    folder.mkdir()
    lease = LeaseFile(folder / "lease")
    assert lease.acquire(1.0)
    for away in (lambda: folder.rename(tmp_path / "away"), lambda: (folder / "lease").rename(folder / "kept")):
        away()
        if not folder.exists():
            folder.touch()  # reading is an error now, not only in vain
        time.sleep(0.3)
        if folder.is_file():
            folder.unlink()
            (tmp_path / "away").rename(folder)
        else:
            (folder / "kept").rename(folder / "lease")
        before = (folder / "lease").read_bytes()
        deadline = time.monotonic() + 10.0
        while (folder / "lease").read_bytes() == before:
            assert time.monotonic() < deadline, "it is renewed no more"
            time.sleep(0.01)
    lease.release()
    assert list(folder.iterdir()) == []


# --- lost answers ----------------------------------------------------------------------------------------------------------


def twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does where the first answer was lost: the call is sent again, and the answer to that one comes."""
    original = getattr(os, name)

    def call(*arguments: object, **more: object) -> None:
        original(*arguments, **more)
        original(*arguments, **more)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["rename", "link", "unlink"])
def test_a_call_whose_answer_was_lost_is_done(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a checkpoint that is complete counts as failed, and what it is written over once more stays as `*.aside-1`."""
    run = tmp_path / "run"
    for folder in ("checkpoints", "snapshots"):
        (run / folder).mkdir(parents=True)
    (run / "checkpoints" / "epoch_001.pt").write_bytes(b"somebody's")
    (run / "checkpoints" / ".epoch_002.pt~1-dead~x.tmp").write_bytes(b"of a dead writer")
    twice(name, monkeypatch)
    store = Store(run, raise_fence(tmp_path / ".run.fence"))
    store.sweep()
    one = Manifest("epoch", Position(1, 1, 8), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z")
    assert len(store.publish(one, lambda file: file.write(b"data"))[1]) == 1
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["epoch_001.json", "epoch_001.pt", "epoch_001.pt.aside-1"], "that is somebody's, and there is no second one"
    assert (run / "checkpoints" / "epoch_001.pt.aside-1").read_bytes() == b"somebody's"
    moved = RunFolder(run).move_aside()
    assert moved is not None and moved.is_dir() and not run.exists()


def test_a_rename_whose_source_was_swept_still_fails(tmp_path: Path) -> None:
    """Loss: a writer that was replaced believes that it has published."""
    fs = Store(tmp_path, raise_fence(tmp_path / ".fence")).fs
    (tmp_path / "target").write_bytes(b"its successor's")
    with pytest.raises(FileNotFoundError):
        fs.rename(tmp_path / "draft", tmp_path / "target")
