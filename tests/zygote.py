"""Starts jobs for tests by forking a process that has imported what they import: most of a short job's seconds are PyTorch's import.

A job is a process of its own as ever, with its own session, environment and output. What it shares with the others is the seed of
Python's hashes, so some tests start their jobs in the plain way (`harness.plain`). `python -m tests.zygote SOCKET` is the process that
forks; a launcher forks its agents, and agents their workers through the product's own fork server.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

from gai_yolo.checkpointing import writer_process
from gai_yolo.checkpointing.writer_start import Started, be_writer
from gai_yolo.launcher import fork_server
from gai_yolo.launcher.fork_server import OF_WORKER, ForkServer, be_server, fork_workers
from gai_yolo.launcher.processes import Child
from gai_yolo.launcher.script import Script, preload
from gai_yolo.log import PACKAGE
from gai_yolo.processes import ForkedChild, die_with_parent
from gai_yolo.supervision import outcome

REPOSITORY = Path(__file__).parents[1]
AFTER_START = (
    "PYTEST_CURRENT_TEST",
    "PYTHONUNBUFFERED",
    "PYTHONPATH",
    "GAI_YOLO_FAULTS",
    "GAI_YOLO_STRACE",
    "GAI_YOLO_ENDING",
    "NODE",
    "OTHER",
    "OTHER_RANK",
    "TMPDIR",
    "TROUBLE",
    "TROUBLE_STEP",
    "TROUBLE_RANK",
    "TROUBLE_DEATHS",
    "SLOW_SECONDS",
    "CUBLAS_WORKSPACE_CONFIG",
    "TORCHINDUCTOR_CACHE_DIR",
)
"""Variables that may differ: nobody looks at them while anything is imported, or `follow_python_path` makes up for it."""
LATER = ("torchvision.ops", "torch.utils.tensorboard", "pycocotools.cocoeval", "gai_yolo.launcher.torchrun")
"""What a job imports only when it evaluates and reports, and agents."""
TORCHRUN, LAUNCH = ["-m", "torch.distributed.run"], ["-m", "gai_yolo.cli", "launch"]


class Forked:
    """A job; as much of `subprocess.Popen` as tests use."""

    def __init__(self, control: socket.socket, stdout: IO[str] | None = None, stderr: IO[str] | None = None) -> None:
        self._control = control
        said = b""
        while not said.endswith(b"\n"):
            said += control.recv(1)  # one at a time: the exit code may be there already
        self.pid = int(said)
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus a signal's number, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended."""
        if self.returncode is None:
            self._control.settimeout(timeout)
            try:
                self.returncode = int(self._control.recv(16))
            except TimeoutError:
                raise subprocess.TimeoutExpired("job", timeout or 0.0) from None
            self._control.close()
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        """Send one, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Zygote:
    """The process that forks, as the tests see it."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        start = [sys.executable, "-u", "-m", "tests.zygote", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                start, pass_fds=[theirs.fileno()], cwd=REPOSITORY, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        atexit.register(self._process.kill)

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether a job's imports would be the same."""
        names = self.environment.keys() | environment.keys()
        differing = {name for name in names - set(AFTER_START) if self.environment.get(name) != environment.get(name)}
        return "OMP_NUM_THREADS" not in differing and all(map(OF_WORKER.fullmatch, differing))

    def start(self, command: Sequence[str], environment: Mapping[str, str], apart: bool, folder: Path, output: IO[Any] | None) -> Forked:
        """Start `python ...` in a folder.

        Args:
            apart: errors have a stream of their own.
            output: where all is written that it says; None: to streams.
        """
        wanted = {"words": command[1:], "environment": dict(environment), "folder": str(folder)}
        if output is not None:
            return Forked(self._ask(wanted, [output.fileno()] * 2))
        streams = [os.pipe() for _ in range(2 if apart else 1)]
        control = self._ask(wanted, [streams[0][1], streams[-1][1]])
        for _, writing in streams:
            os.close(writing)
        stdout, *rest = [os.fdopen(reading, "r", errors="replace") for reading, _ in streams]
        return Forked(control, stdout, rest[0] if rest else None)

    def fork_writer(self, _: Callable[[], None]) -> Started | None:
        """A writer for a job that is run in this process, which has threads; as `writer_start.fork_writer`."""
        if not self.can_start(environment := {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": self.environment["PYTHONPATH"]}):
            return None
        own, other = socket.socketpair()
        with other:
            control = self._ask({"words": [], "environment": environment}, [1, 2, other.fileno()])
        writer: Any = Forked(control)
        return writer, own

    def _ask(self, wanted: dict[str, Any], descriptors: list[int]) -> socket.socket:
        ours, control = socket.socketpair()
        with control:
            socket.send_fds(self._channel, [json.dumps(wanted).encode()], [control.fileno(), *descriptors])
        return ours


@cache
def zygote() -> Zygote | None:
    """This process's zygote; None where processes cannot be forked safely."""
    return Zygote() if sys.platform == "linux" else None


def twin(requests: Connection, command: Sequence[str]) -> Pid:
    """A fork server that is itself a fork of the agent, made before the agent has threads."""
    agent, script = os.getpid(), Script(command[2:])
    pid = os.fork()
    if pid == 0:
        end_as_python(lambda: be_server(requests, agent, script, lambda: be_child_of(agent, script)))
    return Pid(pid)


class Twins(ForkServer):
    """A fork server whose process is a fork of the agent."""

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__(command, twin)


class ForkedAgent(ForkedChild):
    """An agent that is a fork of its launcher; stands for `launcher.processes.Child`."""

    end: Any = Child.end

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        gc.collect(1)  # what goes later, in a worker, might close a descriptor that is another one by then
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # until it has no handlers of the launcher's
        super().__init__(os.fork(), command)
        if self.pid == 0:
            end_as_python(lambda: be_agent(command, environment, before))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.started = time.monotonic()

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def be_agent(command: Sequence[str], environment: Mapping[str, str], mask: set[int | signal.Signals]) -> None:
    """Be what `Child` would have started, in a fork of the launcher: nothing of the launcher's is to be here but its memory."""
    os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    gc.freeze()  # what is collected might close a descriptor that is another one by then
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    PACKAGE.handlers.clear()
    vars(fork_server)["ForkServer"] = Twins
    Script(command[1:]).run()


def end_as_python(main: Callable[[], None]) -> NoReturn:
    """Do this, and end as Python does after it, but without what the process that this is a fork of would have done at its end."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def be_child_of(agent: int, script: Script) -> None:
    """What importing in a process that this agent has started would have done."""
    outcome.AGENT = agent
    script.prepare()


class Pid:
    """A child; as much of `subprocess.Popen` as `ForkServer` uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Take note of its end."""
        os.waitpid(self.pid, 0)


def follow_python_path() -> None:
    """Do what Python does at its start with the folders of PYTHONPATH that this process did not have."""
    new = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    sys.path[1:1] = new
    for folder in new:
        if (Path(folder) / "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))


def run_job(words: list[str]) -> None:
    """Be `python WORDS`; with a launcher, one whose agents are forks of this process, and with torchrun, an agent whose workers are."""
    os.setsid()
    if words[:3] == LAUNCH:
        from gai_yolo.launcher import supervisor

        vars(supervisor)["Child"] = ForkedAgent
    if words[:2] == TORCHRUN:
        from gai_yolo.launcher.rendezvous.handler import name_methods_at_once

        name_methods_at_once()
        at = next(place for place, word in enumerate(words[2:], 2) if not word.startswith("--"))
        fork_workers(ForkServer([sys.executable, "-u", *words[at:]], twin))
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        script = Script(words)
        script.prepare()
        follow_python_path()
        script.run()


def wait_for_job(control: socket.socket, job: int) -> None:
    """Tell the job's process id, and how it ends."""
    with contextlib.suppress(OSError):
        control.sendall(f"{job}\n".encode())
    _, status = os.waitpid(job, 0)
    with contextlib.suppress(OSError):
        control.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    """Be the process that forks, and in its forks the job and who waits for it."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]), signal.SIGKILL)
    Script([str(REPOSITORY / "elastic_train.py")]).preload()
    preload("".join(f"import {name}\n" for name in LATER).encode())
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait are not waited for
    while True:
        said, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not said:
            return
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    wanted = json.loads(said)
    with socket.socket(fileno=descriptors[0]) as control:
        job = os.fork()
        if job != 0:
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            wait_for_job(control, job)
            os._exit(0)
    for target, descriptor in enumerate(descriptors[1:3], start=1):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    tempfile.tempdir = None  # the variable may name another one
    if not wanted["words"]:
        be_writer(socket.socket(fileno=descriptors[3]), writer_process.main)
    gc.unfreeze()
    os.chdir(wanted["folder"])
    run_job(wanted["words"])


if __name__ == "__main__":
    main()
