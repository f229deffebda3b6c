"""Machines and containers that give a job less than it is used to: it works, or one line says what to set."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.cluster import has_namespaces
from tests.harness import PATIENCE, REPOSITORY, environment, finished, small, start

pytestmark = pytest.mark.timeout(300)
LENGTH = ("training.epochs=1", "training.batch_size=2", "training.micro_batch_size=1", "training.max_batches_per_epoch=2")
NAMELESS = 12345
"""A user id that is in no /etc/passwd."""
needs_mounts = pytest.mark.skipif(
    not has_namespaces() or shutil.which("setpriv") is None, reason="needs root, to mount and to become another user"
)


def job(folder: Path, cache: Path, *more: str) -> list[str]:
    """The command line of a short job."""
    return [sys.executable, str(REPOSITORY / "elastic_train.py"), *small(folder, cache, *LENGTH, *more)]


def launched(command: Sequence[str]) -> list[str]:
    """The same under the launcher, with two processes."""
    return [command[0], "-m", "gai_yolo.cli", "launch", "--processes-per-node", "2", "--", *command[1:]]


def run(command: Sequence[str], before: str = "", **variables: str | None) -> tuple[int, str]:
    """Run in a mount namespace of its own; returns exit code and output.

    Args:
        before: shell commands; the last one may end with the beginning of the command's line.
        variables: of the environment; None: not set.
    """
    wanted = {name: value for name, value in {**environment(), **variables}.items() if value is not None}
    words = ["unshare", "--mount", "sh", "-ec", f"{before} {shlex.join(command)}"] if before else list(command)
    done = finished(words, wanted, apart=False, plain=words[0] != sys.executable)
    return done.returncode, done.stdout


def as_nameless(folder: Path) -> str:
    """Becomes a user without a name; the interpreter may lie in root's home, which is made readable by mounting another one there."""
    prefix, aside = Path(sys.base_prefix).resolve(), folder / "prefix"
    closed = next((one for one in reversed([prefix, *prefix.parents]) if not one.stat().st_mode & 0o001), None)
    become = f"exec setpriv --reuid {NAMELESS} --regid {NAMELESS} --clear-groups"
    if closed is None:
        return become
    aside.mkdir(exist_ok=True)
    return (
        f"mount --bind {prefix} {aside}; mount -t tmpfs -o mode=755 tmpfs {closed}; mkdir -p {prefix}; "
        f"mount --bind {aside} {prefix}; {become}"
    )


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the nameless user may write to. Not one of pytest's, which closes the folder of all of them whenever it starts."""
    with tempfile.TemporaryDirectory(prefix="gai-yolo-open-") as folder:
        os.chown(folder, NAMELESS, NAMELESS)
        yield Path(folder)


@needs_mounts
def test_a_run_folder_below_one_that_may_not_be_entered_is_refused(open_folder: Path, tmp_path: Path) -> None:
    """Loss: a traceback for a wrong path."""
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    code, output = run(job(closed, open_folder / "cache"), as_nameless(tmp_path))
    assert code == 2 and f"error: {closed}/run: cannot be reached (Permission denied)" in output and "Traceback" not in output, output


@needs_mounts
def test_a_user_without_a_name_or_a_home_trains(open_folder: Path, tmp_path: Path) -> None:
    """Loss: containers that run as any user id (OpenShift does) end with a KeyError of pwd, or a RuntimeError of pathlib."""
    command = job(open_folder, open_folder / "cache", "elastic.memory_folder=~/memory", "data.workers=1")
    code, output = run(launched(command), as_nameless(tmp_path), HOME=None)
    assert code == 0 and "finished: 1 of 1 epochs" in output and "Traceback" not in output, output
    told = "elastic.memory_folder ~/memory: there is no home folder for `~`; write it in full. No state is kept in this node's memory."
    assert output.count(told) == 1, output
    assert (open_folder / "run" / "checkpoints" / "epoch_001.pt").stat().st_uid == NAMELESS


@needs_mounts
def test_a_user_without_a_home_is_told_what_to_set(open_folder: Path, tmp_path: Path) -> None:
    """Loss: the same, with the default of a folder that lies in the home."""
    command = job(open_folder, open_folder, "data.cache_folder=~/.cache/gai-yolo")
    code, output = run(command, as_nameless(tmp_path), HOME=None)
    assert (code, output) == (2, "error: ~/.cache/gai-yolo: there is no home folder for `~`; write the path in full.\n")


@needs_mounts
def test_a_dev_shm_without_room_is_said_in_one_line(tmp_path: Path, cache: Path) -> None:
    """Loss: Docker's 64 MB are full, or Kubernetes gave 64 kB, and a job that could do without loaders ends with PyTorch's tracebacks."""
    tiny = "mount -t tmpfs -o size=64k tmpfs /dev/shm; head -c 60k /dev/zero > /dev/shm/full; exec"
    code, output = run(job(tmp_path, cache, "data.workers=2"), tiny)
    said = "error: data.workers: 2 loader processes cannot be started (No space left on device); make room for what they need (/dev/shm,"
    assert code == 2 and output.count(said) == 1 and "Traceback" not in output, output
    code, output = run(job(tmp_path, cache, "data.workers=0"), tiny)
    assert code == 0 and "finished: 1 of 1 epochs" in output, output


def test_few_descriptors_are_enough_for_loaders_and_many_micro_batches(tmp_path: Path, cache: Path) -> None:
    """Loss: "too many open files" in the first step, on machines with a limit of 256."""
    settings = ("data.workers=4", "training.batch_size=64", "training.max_batches_per_epoch=1", "evaluation.interval=1")
    code, output = run(["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *job(tmp_path, cache, *settings)])
    assert code == 0 and "finished: 1 of 1 epochs" in output, output


def test_some_of_torchruns_variables_are_refused_in_one_line(tmp_path: Path, cache: Path) -> None:
    """Loss: a shell in which somebody has tried something, a template that forgot a line: KeyError, IndexError, a wait of five minutes."""
    code, output = run(job(tmp_path, cache), LOCAL_RANK="1", WORLD_SIZE="2", RANK="1")
    expected = "error: WORLD_SIZE=2 is set, and MASTER_ADDR, MASTER_PORT not; start the job with gai-yolo launch or torchrun, which set all"
    assert code == 2 and output.startswith(expected) and output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


def test_processes_that_were_started_by_hand_train_together_and_a_lonely_one_says_so(tmp_path: Path, cache: Path) -> None:
    """Loss: an operator that sets no LOCAL_RANK, as pods have one process; or a pod that waits for the first, and ends silently."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}
    arguments = job(tmp_path, cache, "elastic.timeout_seconds=60")
    with (tmp_path / "second").open("w") as log:
        second = start(arguments, {**environment(), **group, "RANK": "1"}, output=log)
    try:
        code, output = run(arguments, **group, RANK="0")
        assert code == 0 and "2 processes on cpu" in output and second.wait(PATIENCE) == 0, output
    finally:
        second.kill()
        second.wait()
    code, output = run(job(tmp_path, cache, "elastic.timeout_seconds=2"), **group, RANK="1")
    assert code == 76, output
    assert output.count(": peer lost: ") == 1 and "Traceback" not in output, output
