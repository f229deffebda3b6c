"""How the process that writes checkpoints begins: as a fork of the training process, made while that one has nothing but its imports, or
else as a process that imports everything again, for seconds. Standard input is its end of the line to the training process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gai_yolo.processes import ForkedChild, has_one_thread, set_name

NOT_FOR_IT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, a launcher's SIGTERM, a scheduler's SIGUSR1 and a terminal's SIGHUP reach the whole process group, and the training process says
when to stop."""
START_CODE = f"""
import signal
for number in {[int(number) for number in NOT_FOR_IT]}:  # before the seconds that importing torch takes
    signal.signal(number, signal.SIG_IGN)
from gai_yolo.checkpointing.writer_process import main
main()
"""
WRITER_NAME = "writer"
"""What `ps -o comm` shows for a fork."""
Started = tuple[subprocess.Popen[bytes] | ForkedChild, socket.socket]
"""A writer, and our end of the line to it."""


class SpareWriter:
    """A fork of this process that waits to be its writer, and ends if it is not taken.

    To be made before this process has threads or open files; where it has, or a fork is not as good as a new process, there is none. Linux.

    Args:
        main: what a writer does.
    """

    def __init__(self, main: Callable[[], None]) -> None:
        self._waiting = fork_writer(main) if sys.platform == "linux" else None

    def take(self) -> Started | None:
        """Hand it over, once."""
        waiting, self._waiting = self._waiting, None
        return waiting

    def close(self) -> None:
        """Let it end, unless it was taken."""
        if (unused := self.take()) is not None:
            unused[1].close()


def fork_writer(main: Callable[[], None]) -> Started | None:
    """A fork that is a writer, if there can be one."""
    own, other = socket.socketpair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_IT)  # until the fork ignores them
    try:
        process = ForkedChild(os.fork(), [])
        if process.pid == 0:
            be_writer(other, main)
    except OSError:
        own.close()
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()
    if not has_one_thread():  # another may have held a lock, which nobody lets go in the fork; OpenBLAS ends its own at a fork
        process.kill()
        process.wait()
        own.close()
        return None
    return process, own


def be_writer(line: socket.socket, main: Callable[[], None]) -> NoReturn:
    """Be the writer in a new fork."""
    code = 1
    try:
        for number in NOT_FOR_IT:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_IT)
        set_name(WRITER_NAME)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # never touches a GPU
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(line.detach(), 0)
        os.dup2(nowhere, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # they may have been elsewhere
        gc.freeze()  # a collection would write to pages that it shares with the training process
        main()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def start_writer() -> Started:
    """A process that imports what it needs. Raises `OSError` if it cannot be started."""
    own, other = socket.socketpair()
    # Modules are found as here, however this process was started, and not (-P) in the current folder; never touches a GPU.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    environment.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, "-P", "-c", START_CODE]
    with other:
        return subprocess.Popen(command, stdin=other.fileno(), stdout=subprocess.DEVNULL, env=environment), own
