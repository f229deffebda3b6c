"""Bytes that survive, and a folder that one job writes to."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from gai_yolo.errors import CheckpointError, ConfigError, Refusal, RunFolderBusy
from gai_yolo.store import run_folder
from gai_yolo.store.atomic import BUFFER, NO_OWNER, is_temporary, owner_of, publish, publish_text, write_temp_file
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import FENCE_BYTES, Fence, Lease, raise_fence
from gai_yolo.store.manifest import Manifest, Position
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


def num_open() -> int:
    """File descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


# --- reading ---------------------------------------------------------------------------------------------------------------


class Hiccups(FileSystem):
    """A share that does not answer for some calls."""

    def __init__(self, code: int, times: int) -> None:
        self.code, self.times = code, times

    def open(self, path: Path) -> BinaryIO:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.code, os.strerror(self.code), str(path))
        return super().open(path)


def read(_path: Path, file: BinaryIO, _manifest: Manifest) -> bytes:
    """The bytes of a checkpoint."""
    return file.read()


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_share_that_hiccups_at_a_start_is_waited_for(code: int, tmp_path: Path) -> None:
    """Loss: hours of work passed over, or a run begun anew, because of a second in which a server did not answer."""
    run = RunFolder(tmp_path / "run")
    run.lock()
    run.make()
    for epoch in (1, 2):
        run.store.publish(Manifest("epoch", Position(epoch, epoch, epoch), 0, "", 0, "", "", ""), lambda file: file.write(b"state"))
    run.release()
    found, passed_over = Catalogue(run.path, Hiccups(code, 3), patience=5.0).newest(read)
    assert found is not None and found[0].position.epoch == 2 and not passed_over
    waiting = Catalogue(run.path, Hiccups(code, 10**6), patience=0.3)
    if code == errno.EIO:  # a broken disk says that, too, and for ever
        found, passed_over = waiting.newest(read)
        assert found is None and len(passed_over) == 1
        return
    with pytest.raises(CheckpointError, match="cannot be read") as refusal:
        waiting.newest(read)
    assert refusal.value.is_transient


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


class Recording(FileSystem):
    """The real one, with a log of what matters after a power cut."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        self.events.append(f"sync {os.fstat(descriptor).st_size} bytes")

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.events.append(f"rename {'draft' if is_temporary(source.name) else source.name} to {target.name}")

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self.events.append(f"sync folder {folder.name}")


def test_data_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path: Path) -> None:
    """Loss: after a power cut the newest checkpoint has its name, and zeros inside."""
    (tmp_path / "f").mkdir()
    fs = Recording()
    publish(tmp_path / "f" / "a.bin", lambda file: file.write(b"12345"), fs)
    assert fs.events == ["sync 5 bytes", "rename draft to a.bin", "sync folder f"]


class Refusing(FileSystem):
    """Fails with a given error at one of its calls."""

    def __init__(self, call: str, code: int) -> None:
        self.call, self.error = call, OSError(code, os.strerror(code))

    def _refuse(self, call: str) -> None:
        if call == self.call:
            raise self.error

    def create(self, path: Path) -> int:
        self._refuse("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._refuse("write")
        return super().write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self._refuse("fsync")
        super().fsync(descriptor)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._refuse("close")

    def rename(self, source: Path, target: Path) -> None:
        self._refuse("rename")
        super().rename(source, target)


@pytest.mark.parametrize("call", ["create", "write", "fsync", "close", "rename"])
def test_refusal_of_the_disk_at_any_call_keeps_the_old_content_and_is_told_as_it_is(call: str, tmp_path: Path) -> None:
    """Loss: a write that failed late (NFS tells it at close) passes for a good checkpoint, or a draft is left with every try."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    fs = Refusing(call, errno.ENOSPC)
    descriptors = num_open()
    for _ in range(3):
        with pytest.raises(OSError, match="No space left") as raised:
            publish(path, lambda file: file.write(b"new" * 1000), fs)
        assert raised.value is fs.error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
    assert num_open() == descriptors, "nothing stays open"


def test_reason_of_the_disk_is_not_hidden_by_an_archive_writer_that_wraps_it(tmp_path: Path) -> None:
    """Loss: `PytorchStreamWriter failed writing file` in place of `No space left on device`."""

    def write(file: BinaryIO) -> None:
        try:
            file.write(bytes(2 * BUFFER))  # too much to be gathered
        except OSError:
            raise RuntimeError("the archive writer failed") from None

    with pytest.raises(OSError, match="No space left") as raised:
        publish(tmp_path / "a.bin", write, Refusing("write", errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


class ShortWrites(FileSystem):
    """Takes 1 to 7 bytes at a time, as a disk may."""

    def __init__(self) -> None:
        self.random = random.Random(3)
        self.lengths: list[int] = []

    def write(self, descriptor: int, data: memoryview) -> int:
        self.lengths.append(super().write(descriptor, data[: self.random.randint(1, 7)]))
        return self.lengths[-1]


def test_short_writes_give_the_same_bytes_and_the_right_digest(tmp_path: Path) -> None:
    """Loss: where the disk takes less than it was given, a gap in the file, or a digest of bytes that were never written."""
    fs, whole = ShortWrites(), random.Random(4).randbytes(20_000)

    def write(file: BinaryIO) -> None:
        rest = memoryview(whole)
        while rest:
            assert file.write(rest[:777]) == len(rest[:777]), "whoever writes does not notice"
            rest = rest[777:]

    temp = write_temp_file(tmp_path / "a.bin", write, "7-abc", fs)
    assert temp.path.read_bytes() == whole
    assert (temp.size, temp.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert set(fs.lengths) == set(range(1, 8)) and sum(fs.lengths) == len(whole)


def test_digest_is_of_the_bytes_however_they_were_handed_over(tmp_path: Path) -> None:
    """Loss: a checkpoint whose digest is wrong from the start is never trusted again."""
    pieces: list[bytes | memoryview] = [b"", b"a" * 3, memoryview(bytes(range(256)) * 16).cast("I"), b"b" * (BUFFER + 1), b"c"]
    whole = b"".join(bytes(piece) for piece in pieces)

    def write(file: BinaryIO) -> None:
        for piece in pieces:
            file.write(piece)

    temp = write_temp_file(tmp_path / "a.bin", write)
    assert temp.path.read_bytes() == whole
    assert (temp.size, temp.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_a_draft_says_whose_it_is_and_two_never_have_one_name(tmp_path: Path) -> None:
    """Loss: a start sweeps the drafts of its own writer, or leaves those of a dead one, which then gets them published."""
    target = tmp_path / "epoch_001.pt"
    paths = [write_temp_file(target, lambda file: file.write(b"x"), owner).path for owner in ("7-abc", "7-abc", "8-def")]
    assert len(set(paths)) == 3 and all(path.parent == tmp_path and is_temporary(path.name) for path in paths)
    assert [owner_of(path.name) for path in paths] == ["7-abc", "7-abc", "8-def"]
    others = ("epoch_001.pt", ".epoch_001.pt.k3jf9x.tmp", ".a~b", "", ".nfs0001")
    assert [owner_of(name) for name in others] == [""] * 5
    assert [is_temporary(name) for name in others] == [False, True, False, False, False]


@pytest.mark.parametrize(("code", "tolerated"), [(errno.EINVAL, True), (errno.EIO, False), (errno.ENOSPC, False)])
def test_folder_that_cannot_be_synced_is_no_error_but_one_that_fails_is(
    code: int, tolerated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: no checkpoint at all on file systems without folder sync; or a name believed to be on the disk that is not."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append("folder" if is_folder else "file")
        if is_folder:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    descriptors = num_open()
    if tolerated:
        publish_text(tmp_path / "a", "x")
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            publish_text(tmp_path / "a", "x")
    assert synced == ["file", "folder"]
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "x"
    assert num_open() == descriptors, "nothing stays open"


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
    assert left.startswith(".epoch_001.pt") and is_temporary(left) and owner_of(left) == NO_OWNER
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
    monkeypatch.setattr(run_folder, "FOLDER_LOCK_PATIENCE", 0.3)
    folder = RunFolder(tmp_path / "runs" / "a")
    with script(HOLDER, str(folder.path), "600") as holder:
        assert line_of(holder) == "locked"
        with pytest.raises(RunFolderBusy, match="another job") as refused:
            folder.lock()
        assert str(folder.path) in str(refused.value)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(refused.value), "people can find and stop it"
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
    impatient = HOLDER.replace("folder.lock()", "import gai_yolo.store.run_folder as m; m.FOLDER_LOCK_PATIENCE = 0.3; folder.lock()")
    with script(impatient, str(folder.path), "0") as other:
        assert other.wait(60) != 0
        assert other.stderr is not None and "RunFolderBusy" in other.stderr.read()
    folder.release()


# --- the fence -------------------------------------------------------------------------------------------------------------


def start(folder: RunFolder) -> Fence:
    """What a job does at its start and its end."""
    folder.lock()
    folder.release()
    return folder.store.fence


def test_each_start_has_a_larger_number_and_shuts_the_ones_before_out(tmp_path: Path) -> None:
    """Loss: a writer whose training process died wakes up and publishes into the run of its successor."""
    folder = RunFolder(tmp_path / "a")
    fences = [start(folder)]
    fences[0].check()
    folder.make()
    folder.move_aside()  # --fresh
    fences += [start(folder), start(RunFolder(tmp_path / "a"))]
    assert [fence.number for fence in fences] == [1, 2, 3]
    fences[2].check()
    for old in fences[:2]:
        with pytest.raises(RunFolderBusy, match="taken over") as refused:
            old.check()
        assert str(tmp_path) in str(refused.value)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    assert start(RunFolder(tmp_path / "b")).number == 1, "another run has its own"
    fences[2].check()


def test_a_start_is_told_from_another_with_the_same_number(tmp_path: Path) -> None:
    """Loss: somebody tidies hidden files away, numbers begin anew, and two jobs believe in the same one."""
    first = start(RunFolder(tmp_path / "a"))
    first.path.unlink()
    second = start(RunFolder(tmp_path / "a"))
    assert (first.number, second.number) == (1, 1) and first.owner != second.owner
    second.check()
    with pytest.raises(RunFolderBusy):
        first.check()


@pytest.mark.parametrize(
    "garbage",
    [
        *(None, b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"7", b"{}", bytes(200)),
        b'{"number": "x", "nonce": "", "host": "", "pid": 1, "since": ""}',
        b'{"number": 1}',
        b'{"number": Infinity, "nonce": "", "host": "", "pid": 1, "since": ""}',
        b"[" * 100_000,
        b'{"number": -5, "nonce": "0123456789ab", "host": "", "pid": 1, "since": ""}',
        b'{"number": 1%s, "nonce": "0123456789ab", "host": "", "pid": 1, "since": ""}' % (b"0" * 300),
        b'{"number": 1%s, "nonce": "0123456789ab", "host": "", "pid": 1, "since": ""}' % (b"0" * 5000),
        b'{"number": 3, "nonce": "../../etc/x", "host": "", "pid": 1, "since": ""}',
    ],
    ids=lambda garbage: repr(garbage)[:30],
)
def test_lost_or_damaged_fence_is_an_error_of_the_disk_and_heals_with_the_next_start(garbage: bytes | None, tmp_path: Path) -> None:
    """Loss: a run that stops for good, taken over by nobody, because one small file was damaged; or that cannot start again."""
    folder = RunFolder(tmp_path / "a")
    old = start(folder)
    if garbage is None:
        old.path.unlink()
    else:
        old.path.write_bytes(garbage)
    with pytest.raises(OSError) as raised:  # noqa: PT011 - which one depends on the damage
        old.check()
    assert str(old.path) in str(raised.value)
    assert garbage is None or not isinstance(raised.value, FileNotFoundError)
    new = start(folder)
    new.check()
    with pytest.raises(RunFolderBusy):
        old.check()


def test_raising_the_fence_is_on_the_disk_before_anything_else_is_done(tmp_path: Path) -> None:
    """Loss: a power cut brings the old number back after the new job has begun to publish."""
    fs = Recording()
    fence = raise_fence(tmp_path / ".a.fence", fs)
    size = fence.path.stat().st_size
    assert fs.events == [f"sync {size} bytes", "rename draft to .a.fence", f"sync folder {tmp_path.name}"]
    with pytest.raises(OSError, match="Input/output"):
        raise_fence(fence.path, Refusing("fsync", errno.EIO))
    fence.check()


@pytest.mark.parametrize("call", ["create", "write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_lets_the_fence_be_raised_in_its_place(call: str, code: int, tmp_path: Path) -> None:
    """Loss: a start on a full disk is refused for good, although the last step is complete in memory."""
    path = tmp_path / ".a.fence"
    with pytest.raises(OSError, match=r"."):
        raise_fence(path, Refusing(call, code))
    old = raise_fence(path)
    size, inode = path.stat().st_size, path.stat().st_ino
    if call != "fsync":
        new = raise_fence(path, Refusing(call, code))
        new.check()
        assert new.number == old.number + 1 and (path.stat().st_size, path.stat().st_ino) == (size, inode) == (FENCE_BYTES, inode)
        with pytest.raises(RunFolderBusy):
            old.check()
    assert [name.name for name in tmp_path.iterdir()] == [path.name]


def test_what_a_disk_refuses_is_transient_if_time_can_mend_it(tmp_path: Path) -> None:
    """Loss: a disk that is full for an hour, or a share that is away for a minute, ends a job for good; or a typo is waited for."""
    for code, again in ((errno.ENOSPC, True), (errno.ESTALE, True), (errno.EIO, True), (errno.EACCES, False), (errno.EROFS, False)):
        lease = Lease(tmp_path / str(code), Refusing("create", code))
        with pytest.raises(Refusal) as refused:
            lease.acquire(0.1)
        assert refused.value.is_transient == again and refused.value.exit_code == 2
        lease.release()
    assert RunFolderBusy("").is_transient and not ConfigError("").is_transient


# --- the folder ------------------------------------------------------------------------------------------------------------


def test_moving_aside_keeps_everything_and_never_overwrites(tmp_path: Path) -> None:
    """Loss: an old run deleted by a new one of the same name."""
    folder = RunFolder(tmp_path / "a")
    assert folder.move_aside() is None
    moved = []
    for number in range(6):
        folder.make()
        (folder.checkpoints / "best.pt").write_text(str(number))
        target = folder.move_aside()
        assert target is not None and not folder.path.exists()
        moved.append(target)
    assert any(target.name.count("-") == 2 for target in moved), "several moves fell into one second"
    assert len(set(moved)) == 6 and all(target.parent == tmp_path for target in moved)
    assert [(target / "checkpoints" / "best.pt").read_text() for target in moved] == list("012345")


def test_making_the_folder_keeps_what_is_there(tmp_path: Path) -> None:
    """Loss: a restart empties the run folder."""
    folder = RunFolder(tmp_path / "deep" / "a")
    folder.make()
    (folder.checkpoints / "epoch_001.pt").write_text("x")
    folder.make()
    assert (folder.checkpoints / "epoch_001.pt").read_text() == "x"
    assert all(path.is_dir() for path in (folder.snapshots, folder.tensorboard, folder.predictions))
    assert folder.metrics == folder.checkpoints / "training_metrics.json"


def test_a_file_in_the_way_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Loss: a traceback for a mistyped folder."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refusal, match=r"experiment\.folder"):
        RunFolder(tmp_path / "file").make()
    with pytest.raises(Refusal, match=r"experiment\.folder"):
        RunFolder(tmp_path / "file" / "a").lock()
    assert (tmp_path / "file").read_text() == "x"
