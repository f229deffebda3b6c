"""The agent's side of its fork server. See `fork_server.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from gai_yolo.launcher.fork_server import FORKED_NAME, WORKER_NAME
from gai_yolo.launcher.processes import adopt_orphans, children_of, name_of

ANSWER_WITHIN = 120.0
"""Seconds; the first answer comes when everything is imported, from a disk that may be slow."""
POLL = 0.02
"""Seconds between two looks at a process that is waited for."""


class ForkedChild:
    """A child of this process that the fork server has made; as much of `subprocess.Popen` as torchrun uses."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid = pid
        self.args = args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus a signal's number, or None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = 255  # somebody else has waited for it; how it ended is not known
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(POLL)
        return code


class ForkServer:
    """Starts processes that run a command, by forking one that has imported what it imports.

    One process is made ready at once. When it has died, or does not answer, `fork` says so and makes another one ready.

    Args:
        command: `[sys.executable, "-u", SCRIPT, ...]` or `[sys.executable, "-u", "-m", MODULE, ...]`.

    Raises:
        OSError: this system has none of what it takes.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._forks: set[int] = set()
        adopt_orphans()
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that forks."""
        return self._process.pid

    def fork(self, command: Sequence[str], environment: Mapping[str, str]) -> ForkedChild | None:
        """Start a process, or return None where it has to be started in the usual way: it is another command, its imports might see another
        environment, or the server is not there."""
        if list(command) != self._command:
            return None
        try:
            self._channel.sendall(f"{json.dumps(dict(environment))}\n".encode())
            answer = self._answers.readline()
        except OSError:
            answer = ""
        if not answer:
            self.close()
            self._kill_unknown()
            self._start()
            return None
        if int(answer) == 0:
            return None
        self._forks.add(int(answer))
        return ForkedChild(int(answer), command)

    def close(self) -> None:
        """End the process that forks; its forks go on."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._channel.close()

    def _kill_unknown(self) -> None:
        """End a fork whose id was lost with the server: another process will be started in its place."""
        for pid in children_of(os.getpid()) - self._forks:
            if name_of(pid).startswith((FORKED_NAME, WORKER_NAME)):
                os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(ANSWER_WITHIN)
        self._answers = self._channel.makefile("r")
        with theirs:
            start = [sys.executable, "-u", "-m", "gai_yolo.launcher.fork_server", str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen([*start, *self._command[2:]], pass_fds=[theirs.fileno()])


def fork_server_for(command: Sequence[str]) -> ForkServer | None:
    """A fork server, where there can be one."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        return ForkServer(command)
    return None
