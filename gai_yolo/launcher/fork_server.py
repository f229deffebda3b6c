"""The agent's fork server: it has imported what the script imports, and its forks become the agent's workers. Linux.

`python -m gai_yolo.launcher.fork_server DESCRIPTOR AGENT SCRIPT ...`, started by `ForkServer` only. Importing PyTorch takes seconds, on
every node and after every fault; a fork takes milliseconds. Unlike those of multiprocessing's fork server the workers are the agent's own
children, as if it had started them itself: it waits for them, they see it as their parent, and a launcher finds them when it has died.
Nothing but imports happens there, so there are no threads, open files or devices that a fork would inherit in the middle of something.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from gai_yolo.launcher.processes import reap_orphans
from gai_yolo.launcher.script import Script
from gai_yolo.processes import ForkedChild, adopt_orphans, children_of, die_with_parent, has_one_thread, name_of, set_name

OF_WORKER = re.compile(
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|OMP_NUM_THREADS|TORCH_NCCL_ASYNC_ERROR_HANDLING|TORCHELASTIC_.*"
)
"""Variables that differ between workers or starts. They are not looked at while anything is imported, or, of the threads, set again."""
FORKED_NAME, WORKER_NAME = "fork-server", "rank-"
"""What `ps -o comm` shows for the server, and of a worker for its first moment; and for a worker, before its rank."""
SIGNALS_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Who sends them to all processes of a job means the workers."""
FORKED_WITHIN = 120.0
"""Seconds; the first answer comes when everything is imported, from a disk that may be slow."""


class Noting(os._Environ[str]):
    """Environment variables, with a list of those that were asked for by name. Who goes through all of them looks for others: tqdm and
    fsspec do, for their own settings. What a copy is asked for afterwards is not seen."""

    seen: ClassVar[set[str]] = set()
    listed: ClassVar[dict[int, str]] = {}
    """The very names that came when all were gone through, by their ids."""

    def __iter__(self) -> Iterator[str]:
        for name in super().__iter__():
            self.listed[id(name)] = name
            yield name

    def __getitem__(self, name: str) -> str:
        if id(name) not in self.listed:
            self.seen.add(name)
        return super().__getitem__(name)


def is_like(own: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether what was imported in one environment is what would be imported in another."""
    differing = {name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name)}
    return all(map(OF_WORKER.fullmatch, differing))


def forks_well() -> bool:
    """Whether a fork of this process is as good as a process that imports the same: no import has touched a GPU, nor left threads
    running, as OpenMP does, which a fork would wait for in vain. OpenBLAS ends its threads before a fork."""
    pid = os.fork()
    if pid == 0:
        torch = sys.modules.get("torch")  # one that does not say it may have touched a GPU
        os._exit(int(torch is not None and getattr(torch.cuda, "_is_in_bad_fork", lambda: True)()))
    return os.waitpid(pid, 0)[1] == 0 and has_one_thread()


def be_server(requests: Connection, agent: int, script: Script, prepare: Callable[[], None]) -> None:
    """Be the server until the agent hangs up, and, in its forks, the script. A request is a worker's environment, the answer its process
    id, or 0 where a fork would not be as good as a new process. `prepare` imports."""
    die_with_parent(agent, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever has started all this may have it ignored, and nobody could be waited for
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS_FOR_WORKERS}
    set_name(FORKED_NAME)
    own = dict(os.environ)
    plain, os.environ.__class__ = os.environ.__class__, Noting  # the same object, because modules may hold it
    gc.disable()  # an import makes no cycles worth searching for: 0.5 s of 8
    prepare()
    gc.enable()
    os.environ.__class__ = plain
    is_fit = forks_well() and not any(map(OF_WORKER.fullmatch, Noting.seen))
    # Libraries set variables for themselves as they are imported (OpenCV does).
    imported = {name: value for name, value in os.environ.items() if own.get(name) != value}
    gc.freeze()  # a collection would write to pages that all processes share
    sys.stdout.flush()
    sys.stderr.flush()
    pid: int | None = 0
    # An agent that ends without having read an answer breaks the connection.
    with contextlib.suppress(EOFError, ConnectionError), requests:
        while pid is not None:
            wanted: dict[str, str] = requests.recv()
            pid = fork_for_agent(handlers) if is_fit and is_like(own, wanted) else 0
            if pid is not None:
                requests.send(pid)
    if pid is not None:
        os._exit(0)  # not by way of Python's end, at which libraries count what was frozen as leaked
    os.environ.clear()
    os.environ.update(wanted | imported)
    set_name(f"{WORKER_NAME}{os.environ.get('RANK', '')}")
    gc.unfreeze()
    if "torch" in sys.modules:
        # OpenMP has read it already, as the server was started.
        with contextlib.suppress(KeyError, ValueError):
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    script.run()


def fork_for_agent(handlers: Mapping[signal.Signals, Any]) -> int | None:
    """Fork a child for the agent, which has asked for orphans (`adopt_orphans`): it is the child of a child that ends at once.

    Args:
        handlers: of signals, to be put back before anybody knows of the child.

    Returns:
        The new process's id, 0 if there is none; in that process None.
    """
    reading, writing = os.pipe()
    middle = os.fork()
    if middle != 0:
        os.close(writing)
        os.waitpid(middle, 0)
        with os.fdopen(reading) as answer:
            return int(answer.read() or 0)
    middle = os.getpid()
    if os.fork() != 0:
        os._exit(0)
    os.close(reading)
    os.setsid()  # torchrun signals the whole session
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:  # not if an import has set another one
            signal.signal(number, handler)
    os.write(writing, f"{os.getpid()}".encode())
    os.close(writing)
    while os.getppid() == middle:  # then it is the agent's
        time.sleep(0.001)
    return None


def main() -> None:
    """Called by `start_server`."""
    script = Script(sys.argv[3:])
    script.prepare()
    be_server(Connection(int(sys.argv[1])), int(sys.argv[2]), script, script.preload)


# -------------------------------------------------------------------------------------------------------------- the agent's side


def start_server(requests: Connection, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start what answers requests for a command's workers at the other end of a connection."""
    start = [sys.executable, "-u", "-m", "gai_yolo.launcher.fork_server", str(requests.fileno()), str(os.getpid())]
    return subprocess.Popen([*start, *command[2:]], pass_fds=[requests.fileno()])


class ForkServer:
    """Starts processes that run a command, by forking one that has imported what it imports.

    One process is made ready at once. When it has died, or does not answer, `fork` says so and makes another one ready.

    Args:
        command: `[sys.executable, "-u", SCRIPT, ...]` or `[sys.executable, "-u", "-m", MODULE, ...]`.
        start: makes that process.

    Raises:
        OSError: this system has none of what it takes.
    """

    def __init__(self, command: Sequence[str], start: Callable[[Connection, Sequence[str]], Any] = start_server) -> None:
        self._command, self._start_server = list(command), start
        self._forks: set[int] = set()
        adopt_orphans()
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that forks."""
        return int(self._process.pid)

    def fork(self, command: Sequence[str], environment: Mapping[str, str]) -> ForkedChild | None:
        """Start a process, or return None where it has to be started in the usual way: it is another command, its imports might see another
        environment, or the server is not there."""
        pid = self._ask(environment) if list(command) == self._command else 0
        if not pid:
            return None
        self._forks.add(pid)
        return ForkedChild(pid, command)

    def wait(self) -> None:
        """Until everything is imported: who meets other nodes after that keeps none of them waiting."""
        self._ask({})  # like no environment that there is

    def _ask(self, environment: Mapping[str, str]) -> int:
        with contextlib.suppress(OSError, EOFError):
            self._requests.send(dict(environment))
            if self._requests.poll(FORKED_WITHIN):
                return int(self._requests.recv())
        self._replace()
        return 0

    def _replace(self) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        for pid in children_of(os.getpid()) - self._forks:  # a fork whose id was lost: another process will be started in its place
            if name_of(pid).startswith((FORKED_NAME, WORKER_NAME)):
                os.kill(pid, signal.SIGKILL)
        self._start()

    def _start(self) -> None:
        self._requests, theirs = Pipe()
        with theirs:
            self._process = self._start_server(theirs, self._command)


def fork_workers(server: ForkServer | None) -> Callable[[], list[int]]:
    """Let torchrun's agent in this process take its workers from a fork server, and start by itself those that it does not give.

    Returns:
        What gives the exit codes of the last start's workers that have ended, minus a signal's number.

    Raises:
        ImportError, AttributeError: this PyTorch starts workers in a way that is not known here.
    """
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    getattr(api, "get_subprocess_handler"), getattr(SubprocessHandler, "_popen")  # noqa: B009  # both are replaced, if they are there
    workers: dict[int, Any] = {}  # by local rank

    class Handler(SubprocessHandler):
        def _popen(self, args: tuple[Any, ...], env: dict[str, str]) -> Any:
            worker: Any = None
            if server is not None:
                # What dead workers leave behind comes to this process, because it has asked for orphans.
                reap_orphans([server.pid, *(worker.pid for worker in workers.values() if worker.poll() is None)])
                if self._stdout is None and self._stderr is None:
                    worker = server.fork(args, env)
            workers[self.local_rank_id] = worker or super()._popen(args, env)
            return workers[self.local_rank_id]

    vars(api)["get_subprocess_handler"] = Handler  # a function of that module alone, looked up at each call
    return lambda: [code for worker in workers.values() if (code := worker.poll()) is not None]


if __name__ == "__main__":
    main()
