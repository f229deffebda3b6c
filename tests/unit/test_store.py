"""Files are whole or absent, and a run folder has one writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from gai_yolo.errors import RunFolderBusy
from gai_yolo.store import run_folder
from gai_yolo.store.atomic import publish, publish_text
from gai_yolo.store.run_folder import RunFolder
from tests.harness import environment

HOLD = """
import sys, time
from pathlib import Path
from gai_yolo.store.run_folder import RunFolder
RunFolder(Path(sys.argv[1])).lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    """A full disk must not cost the checkpoint that was there before."""
    path = tmp_path / "file"
    publish_text(path, "old")

    def half(file: BinaryIO) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_name_never_shows_a_part_of_the_content(tmp_path: Path) -> None:
    """A reader that looks while a checkpoint is written must see the old one."""
    path = tmp_path / "file"
    publish_text(path, "old")
    seen = []

    def slow(file: BinaryIO) -> None:
        file.write(b"ne")
        file.flush()
        seen.append(path.read_text())
        file.write(b"w")

    publish(path, slow)
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    """A fixed temporary name shared by two writers gives a file of neither."""
    path = tmp_path / "file"
    contents = [bytes([65 + number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=publish, args=(path, lambda file, c=content: file.write(c))) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    """Colleagues who may read the folder must be able to read its checkpoints."""
    before = os.umask(mask)
    try:
        publish_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_run_folder_has_one_writer_and_is_free_when_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs in one folder mix their checkpoints; a dead one must not block the next."""
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.2)
    path = tmp_path / "experiments" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=environment())
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(RunFolderBusy, match="another job is writing"):
        RunFolder(path).lock()
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    folder = RunFolder(path)
    folder.lock()
    folder.release()


def test_moving_aside_keeps_everything_and_never_overwrites(tmp_path: Path) -> None:
    """Starting over twice in one second must keep both old runs."""
    folder = RunFolder(tmp_path / "run")
    assert folder.move_aside() is None
    kept = []
    for content in ("first", "second", "third"):
        folder.make()
        (folder.checkpoints / "epoch_001.pt").write_text(content)
        moved = folder.move_aside()
        assert moved is not None and not folder.path.exists()
        kept.append((moved / "checkpoints" / "epoch_001.pt").read_text())
    assert kept == ["first", "second", "third"]
    assert len(list(tmp_path.iterdir())) == 3
