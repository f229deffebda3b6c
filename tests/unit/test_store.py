"""Bytes that survive, and a folder that one job writes to."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from gai_yolo.errors import Refusal, RunFolderBusy
from gai_yolo.store import run_folder
from gai_yolo.store.atomic import publish, publish_text
from gai_yolo.store.run_folder import RunFolder


@contextmanager
def script(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own; killed at the end if it is still there."""
    process = subprocess.Popen([sys.executable, "-c", text, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- publish ---------------------------------------------------------------------------------------------------------------


def test_published_file_holds_what_was_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    """Loss: half a file, or one more temporary file with every checkpoint."""
    path = tmp_path / "a.bin"
    for content in (b"first", b"", b"x" * 300_000):
        publish(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
        assert path.read_bytes() == content
    publish_text(path, "Größe: 白\n")
    assert path.read_bytes() == "Größe: 白\n".encode()
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch says no"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old content", None])
def test_failing_writer_leaves_the_old_content_and_no_temporary_file(error: BaseException, old: bytes | None, tmp_path: Path) -> None:
    """Loss: the good checkpoint is gone because the next one could not be written."""
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def write(file: BinaryIO) -> None:
        file.write(b"new" * 50_000)
        raise error

    with pytest.raises(type(error)) as raised:
        publish(path, write)
    assert raised.value is error, "the reason is not hidden by the cleaning up"
    assert names(tmp_path) == (["a.bin"] if old is not None else [])
    assert old is None or path.read_bytes() == old


def test_data_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: after a power cut the newest checkpoint has its name, and zeros inside."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        fsync(descriptor)

    def recorded_replace(source: str, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    publish(tmp_path / "a.bin", lambda file: file.write(b"12345"))
    assert events == ["sync 5 bytes", "rename to a.bin", "sync folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_published_files_have_the_rights_that_the_umask_says(umask: int, mode: int, tmp_path: Path) -> None:
    """Loss: checkpoints that colleagues cannot read, because temporary files are private; or that everybody can write."""
    before = os.umask(umask)
    try:
        publish_text(tmp_path / "a", "x")
        assert os.umask(umask) == umask, "and the umask is as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


WRITER = """
import sys
from pathlib import Path
from gai_yolo.store.atomic import publish
letter = sys.argv[2].encode()
def write(file):
    for _ in range(40):
        file.write(letter * 5000)
        file.flush()
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    publish(Path(sys.argv[1]), write)
"""


def test_two_publishers_never_mix_and_readers_never_see_a_half(tmp_path: Path) -> None:
    """Loss: two processes write one checkpoint, or a copy job runs at the wrong moment, and the file is neither's."""
    path, seen = tmp_path / "a.bin", set()
    path.write_bytes(b"o" * 200_000)
    with script(WRITER, str(path), "a", "60") as one, script(WRITER, str(path), "b", "60") as two:
        assert line_of(one) == line_of(two) == "ready"
        while one.poll() is None or two.poll() is None:
            content = path.read_bytes()
            assert len(content) == 200_000 and len(set(content)) == 1
            seen.add(content[:1])
        assert (one.returncode, two.returncode) == (0, 0)
    assert {b"a", b"b"} <= seen | {path.read_bytes()[:1]}, "both were at work"
    assert names(tmp_path) == ["a.bin"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gai_yolo.store.atomic import publish
def write(file):
    file.write(b"new" * 50_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
publish(Path(sys.argv[1]), write)
"""


def test_killed_writer_leaves_the_old_content_and_a_hidden_file(tmp_path: Path) -> None:
    """Loss: what a killed writer leaves behind is taken for a checkpoint."""
    path = tmp_path / "epoch_001.pt"
    path.write_bytes(b"old")
    with script(KILLED, str(path)) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = set(names(tmp_path)) - {"epoch_001.pt"}
    assert left.startswith(".epoch_001.pt.") and left.endswith(".tmp")
    publish_text(path, "new")
    assert path.read_text() == "new", "and does not stand in the way"


def test_folder_that_is_gone_is_told_as_it_is(tmp_path: Path) -> None:
    """Loss: a run folder removed by hand ends in a message about something else."""
    with pytest.raises(FileNotFoundError):
        publish_text(tmp_path / "gone" / "a", "x")


# --- the lock --------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from gai_yolo.store.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
folder.release()
"""


def test_second_job_is_refused_until_the_first_is_gone_even_if_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: two jobs overwrite each other's checkpoints; or a killed job locks its folder for ever."""
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.3)
    folder = RunFolder(tmp_path / "runs" / "a")
    with script(HOLDER, str(folder.path), "600") as holder:
        assert line_of(holder) == "locked"
        with pytest.raises(RunFolderBusy, match="another job") as refused:
            folder.lock()
        assert str(folder.path) in str(refused.value)
        assert refused.value.exit_code == 2
        RunFolder(tmp_path / "runs" / "b").lock()  # another run is free
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    folder.lock()
    folder.release()
    with script(HOLDER, str(folder.path), "0") as next_holder:
        assert line_of(next_holder) == "locked", "released is free"


def test_a_job_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    """Loss: a restart right after a stop is refused, and the launcher gives up."""
    folder = RunFolder(tmp_path / "a")
    with script(HOLDER, str(folder.path), "0.5") as holder:
        assert line_of(holder) == "locked"
        folder.lock()
    folder.release()


def test_moving_the_folder_aside_does_not_open_the_lock(tmp_path: Path) -> None:
    """Loss: `--fresh` moves the lock away with the folder, and a second job starts beside it."""
    folder = RunFolder(tmp_path / "a")
    folder.lock()
    folder.make()
    assert folder.move_aside() is not None
    folder.make()
    impatient = HOLDER.replace("folder.lock()", "import gai_yolo.store.run_folder as m; m.LOCK_PATIENCE = 0.3; folder.lock()")
    with script(impatient, str(folder.path), "0") as other:
        assert other.wait(60) != 0
        assert other.stderr is not None and "RunFolderBusy" in other.stderr.read()
    folder.release()


# --- the folder ------------------------------------------------------------------------------------------------------------


def test_moving_aside_keeps_everything_and_never_overwrites(tmp_path: Path) -> None:
    """Loss: an old run deleted by a new one of the same name."""
    folder = RunFolder(tmp_path / "a")
    assert folder.move_aside() is None
    moved = []
    started = time.monotonic()
    for number in range(6):
        folder.make()
        (folder.checkpoints / "best.pt").write_text(str(number))
        target = folder.move_aside()
        assert target is not None and not folder.path.exists()
        moved.append(target)
    assert time.monotonic() - started < 5, "several moves fell into one second"
    assert len(set(moved)) == 6 and all(target.parent == tmp_path for target in moved)
    assert [(target / "checkpoints" / "best.pt").read_text() for target in moved] == list("012345")


def test_making_the_folder_keeps_what_is_there(tmp_path: Path) -> None:
    """Loss: a restart empties the run folder."""
    folder = RunFolder(tmp_path / "deep" / "a")
    folder.make()
    (folder.checkpoints / "epoch_001.pt").write_text("x")
    folder.make()
    assert (folder.checkpoints / "epoch_001.pt").read_text() == "x"
    assert all(path.is_dir() for path in (folder.tensorboard, folder.predictions))
    assert folder.metrics == folder.checkpoints / "training_metrics.json"


def test_a_file_in_the_way_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Loss: a traceback for a mistyped folder."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refusal, match=r"experiment\.folder"):
        RunFolder(tmp_path / "file").make()
    with pytest.raises(Refusal, match=r"experiment\.folder"):
        RunFolder(tmp_path / "file" / "a").lock()
    assert (tmp_path / "file").read_text() == "x"
