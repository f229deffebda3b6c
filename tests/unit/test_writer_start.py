"""The process that writes checkpoints, as a fork of the training process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import pytest

from gai_yolo.checkpointing import writer_process
from gai_yolo.checkpointing.writer_process import WriterProcess
from gai_yolo.checkpointing.writer_start import WRITER_NAME, SpareWriter, fork_writer
from gai_yolo.processes import children_of, name_of
from gai_yolo.store.lease import Fence, raise_fence
from gai_yolo.store.retention import Policy
from tests.harness import REPOSITORY, environment

FORK_WRITER = fork_writer
"""The product's own; `conftest.py` puts another in its place."""
PATIENCE = 60.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux")


def in_one_thread(body: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> object:
    """What a function returns in a process without other threads, which this one is not; an AssertionError is one here."""
    monkeypatch.setattr("gai_yolo.checkpointing.writer_start.fork_writer", FORK_WRITER)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            answer: object
            try:
                answer = body()
            except BaseException as error:
                answer = AssertionError(f"{type(error).__name__}: {error}")
            Connection(writing).send(answer)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        answer = Connection(reading).recv()
    finally:
        os.waitpid(pid, 0)
    if isinstance(answer, AssertionError):
        raise answer
    return answer


def fence_of(run: Path) -> Fence:
    """Of who has the run folder."""
    return raise_fence(run.parent / f".{run.name}.fence")


def wait_until(condition: Callable[[], bool]) -> None:
    """It comes to be so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process is no more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_what_a_job_imports_leaves_it_fit_to_fork() -> None:
    """Loss: a library that starts a thread when it is imported, and every start imports PyTorch twice, unseen."""
    code = (
        "import elastic_train; from gai_yolo.checkpointing.writer_start import SpareWriter; "
        "spare = SpareWriter(lambda: None); assert spare.take() is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_serves_as_one_that_imports_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a writer that Ctrl-C ends, or that holds what it is not to hold; the checkpoints of the end with it."""

    def body() -> tuple[str, int, list[str]]:
        spare = SpareWriter(writer_process.main)
        process = WriterProcess(tmp_path, fence_of(tmp_path), Policy(), spare)
        assert spare.take() is None, "one writer is all that there is"
        pid = next(iter(children_of(os.getpid())))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
        process.answer(PATIENCE)  # that best.pt is as it should be
        files = [str(path.readlink()) for path in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name))]
        name, nice = name_of(pid), os.getpriority(os.PRIO_PROCESS, pid)
        process.close(PATIENCE)
        assert not children_of(os.getpid()), "it has ended, and nobody is left to wait for"
        return name, nice, files

    name, nice, files = cast(tuple[str, int, list[str]], in_one_thread(body, monkeypatch))
    assert (name, nice) == (WRITER_NAME, 19)
    assert files[0].startswith("socket:") and files[1] == os.devnull
    assert all(file.startswith("socket:") for file in files[3:]), files


@pytest.mark.parametrize("what", ["killed", "no descriptor"])
def test_one_that_cannot_be_had_is_no_loss(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: the kernel takes the one process that nobody misses yet, and the job ends or writes nothing; or a process without work for each
    start that was short of descriptors."""

    def body() -> tuple[str, int, int]:
        spare, dup = SpareWriter(writer_process.main), os.dup
        (pid,) = children_of(os.getpid())
        if what == "killed":
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: is_gone(pid))
        else:

            def refuse(_: int) -> int:
                os.dup = dup
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            os.dup = refuse
        process = WriterProcess(tmp_path, fence_of(tmp_path), Policy(), spare)
        answer, children = process.answer(PATIENCE), children_of(os.getpid())
        process.close(PATIENCE)
        return type(answer).__name__, len(children - {pid}), len(children)

    assert in_one_thread(body, monkeypatch) == ("BestRenewed", 1, 1)


def test_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a process left behind by each start that is refused."""

    def body() -> int:
        spare = SpareWriter(writer_process.main)
        (pid,) = children_of(os.getpid())
        spare.close()
        spare.close()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_one_thread(body, monkeypatch) == 0


def test_it_does_not_outlive_who_was_killed_before_it_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a process for ever, of each job that is killed while it starts."""

    def body() -> int:
        SpareWriter(writer_process.main).take()
        return next(iter(children_of(os.getpid())))  # what is not closed is so by the end of this process, as by a kill

    pid = in_one_thread(body, monkeypatch)
    assert isinstance(pid, int)
    wait_until(lambda: is_gone(pid))


def test_there_is_none_beside_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a writer that waits for a lock which a thread held that it does not have, and every save with it."""

    def body() -> tuple[bool, int]:
        enough = threading.Event()
        thread = threading.Thread(target=enough.wait)
        thread.start()
        spare = SpareWriter(writer_process.main)
        enough.set()
        thread.join()
        return spare.take() is None, len(children_of(os.getpid()))

    assert in_one_thread(body, monkeypatch) == (True, 0)


def test_a_fault_of_its_own_is_seen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a writer that dies again and again, and nobody knows of what."""

    def body() -> int:
        def main() -> None:
            raise KeyError("nothing foreseen")

        started = FORK_WRITER(main)
        assert started is not None
        return started[0].wait(PATIENCE)

    assert in_one_thread(body, monkeypatch) == 1
    assert "KeyError: 'nothing foreseen'" in capfd.readouterr().err
