"""The process that writes a job's checkpoints, forked where the job itself was: it has imported PyTorch already, which takes it seconds.

It waits, without a thread or an open file of the job's, until the job wants to start its writer, and is that one then, with the same
standard streams and environment. Should the job want another one later, it starts it as ever.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gai_yolo.checkpointing import writer_process as writer
from gai_yolo.processes import die_with_parent

PR_SET_PDEATHSIG = 1
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
POLL = 0.005
"""Seconds between two looks at a process that is waited for."""


class Child:
    """As much of `subprocess.Popen` as the job uses of its writer."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus a signal's number, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("writer", timeout or 0.0)
            time.sleep(POLL)
        return code

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def offer() -> None:
    """Make the process ready, and let the job find it where it starts its writer. To be called before this process has threads; not by a
    process that starts its writer in a way of its own."""
    if os.environ.get("RANK", "0") != "0" or subprocess.Popen.__module__ != "subprocess":
        return
    ours, theirs = socket.socketpair()
    job = os.getpid()
    spare = os.fork()
    if spare == 0:
        ours.close()
        _wait_and_be_it(theirs, job)
    theirs.close()

    def start(command: Sequence[str], *, stdin: int, stdout: int, env: dict[str, str]) -> Any:
        vars(writer)["subprocess"] = subprocess
        try:
            with ours:
                socket.send_fds(ours, [json.dumps({"command": list(command), "environment": env}).encode()], [stdin])
                assert ours.recv(1) == b"."
        except (OSError, AssertionError):  # somebody has killed it
            return subprocess.Popen(command, stdin=stdin, stdout=stdout, env=env)
        return Child(spare)

    vars(writer)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": start})


def _wait_and_be_it(channel: socket.socket, job: int) -> None:
    for number in IGNORED:  # as in `writer_process.START`
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(job, signal.SIGKILL)
    said, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 1)
    if not said:
        os._exit(0)
    _outlive_parent()
    wanted = json.loads(said)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    os.dup2(descriptors[0], 0)
    channel.sendall(b".")
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv, sys.orig_argv = ["-c"], wanted["command"]
    for folder in os.environ["PYTHONPATH"].split(os.pathsep):
        if (Path(folder) / "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))
    code = 1
    try:
        writer.main()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _outlive_parent() -> None:
    """What was handed to it the writer finishes when the job has gone."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
