"""The agent's fork server: it has imported what the script imports, and its forks become the agent's workers. Linux.

`python -m gai_yolo.launcher.fork_server SOCKET AGENT SCRIPT ...`, started by `forking.py` only. Importing PyTorch takes seconds, on every
node and after every fault; a fork takes milliseconds. Unlike those of multiprocessing's fork server the workers are the agent's own
children, as if it had started them itself: it waits for them, they see it as their parent, and a launcher finds them when it has died.
Nothing but imports happens here, so there are no threads, open files or devices that a fork would inherit in the middle of something.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gai_yolo.launcher.processes import die_with_parent, set_name

PER_WORKER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
)
"""Variables that are not looked at while anything is imported, or, of the threads, set again after the fork. TORCHELASTIC_* too."""
FORKED_NAME, WORKER_NAME = "fork-server", "rank-"
"""What `ps -o comm` shows for the server, and of a worker for its first moment; and for a worker, before its rank."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Who sends them to all processes of a job means the workers."""
ADOPTED_WITHIN = 10.0
"""Seconds."""


@dataclass(frozen=True)
class Script:
    """What to run, as in `python PATH ARGUMENTS`, or `python -m MODULE ARGUMENTS`."""

    is_module: bool
    name: str
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Script:
        """From what follows `python`."""
        is_module = words[0] == "-m"
        name, *arguments = words[1:] if is_module else words
        return cls(is_module, name, tuple(arguments))

    def prepare(self) -> None:
        """Let modules be found where Python looks when it runs this."""
        if not self.is_module and not sys.flags.safe_path:
            sys.path[0] = str(Path(self.name).resolve().parent)

    def run(self) -> None:
        """Run it as the main program of this process."""
        sys.argv = [self.name, *self.arguments]
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(self.name).absolute()), run_name="__main__")

    def imports(self) -> list[str]:
        """Names of the modules that it imports before it does anything else."""
        path: str | None = self.name
        if self.is_module:
            spec = importlib.util.find_spec(self.name)
            path = spec.origin if spec else None
        return imported_names(Path(path).read_bytes()) if path else []


def imported_names(source: bytes) -> list[str]:
    """Modules that a program's first import statements name, before it does anything that could matter to the others. For `from a import b`
    both `a` and `a.b`, which need not be a module."""
    names: list[str] = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            if statement.module and statement.level == 0:
                names += [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names if alias.name != "*")]
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
            break
    return [name for name in names if not name.startswith("__future__")]


def preload(names: Sequence[str]) -> None:
    """Import them, as far as they are modules; what fails will fail in the worker, where it is seen."""
    for name in names:
        package, _, member = name.rpartition(".")
        if hasattr(sys.modules.get(package), member):
            continue  # a module of that name would take its place
        with contextlib.suppress(Exception):
            importlib.import_module(name)


class Noting(os._Environ[str]):
    """Environment variables that notes which were looked at."""

    seen: ClassVar[set[str]] = set()

    def __getitem__(self, name: str) -> str:
        self.seen.add(name)
        return super().__getitem__(name)


@contextlib.contextmanager
def noting() -> Iterator[set[str]]:
    """Names of the variables that are looked at meanwhile."""
    before = os.environ.__class__
    Noting.seen.clear()
    os.environ.__class__ = Noting  # the same object, because modules may hold it
    try:
        yield Noting.seen
    finally:
        os.environ.__class__ = before


def is_of_worker(variable: str) -> bool:
    """Whether a variable differs between workers or starts."""
    return variable in PER_WORKER or variable.startswith("TORCHELASTIC_")


def forks_well() -> bool:
    """Whether a fork of this process is as good as a process that imports the same: no import has touched a GPU, nor left threads
    running, as OpenMP does, which a fork would wait for in vain. OpenBLAS ends its threads before a fork."""
    pid = os.fork()
    if pid == 0:
        torch = sys.modules.get("torch")
        os._exit(int(torch is not None and torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0 and len(list(Path("/proc/self/task").iterdir())) == 1


def serve(channel: socket.socket, agent: int, own: Mapping[str, str] | None, restore: Callable[[], None]) -> bool:
    """Fork a worker for each request of the agent, until that closes the channel. Returns twice, as `os.fork`: in the server False, in each
    worker True, with the worker's environment.

    Args:
        own: this process's environment before it imported anything; None: there will be no forks, each request is answered with 0.
        restore: is called in the worker before anybody knows of it.
    """
    # Libraries set variables for themselves as they are imported (OpenCV does).
    imported = {name: value for name, value in os.environ.items() if own is not None and own.get(name) != value}
    # An agent that ends without having read an answer breaks the connection.
    with contextlib.suppress(ConnectionError), channel, channel.makefile("r") as requests:
        for line in requests:
            wanted: dict[str, str] = json.loads(line)
            pid = fork_for(agent, restore) if own is not None and is_like(own, wanted) else 0
            if pid is None:
                os.environ.clear()
                os.environ.update(wanted | imported)
                return True
            channel.sendall(f"{pid}\n".encode())
    return False


def is_like(own: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether what was imported in one environment is what would be imported in another."""
    differing = {name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name)}
    return all(map(is_of_worker, differing))


def fork_for(agent: int, restore: Callable[[], None]) -> int | None:
    """Fork a child for another process, which must have asked for orphans (`processes.adopt_orphans`): it is the child of a child that
    ends at once.

    Args:
        restore: is called in the child before it tells its id.

    Returns:
        The new process's id, 0 if there is none; in that process None.
    """
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() != 0:
            os._exit(0)
        os.close(reading)
        os.setsid()  # torchrun signals the whole session
        restore()
        os.write(writing, f"{os.getpid()}".encode())
        os.close(writing)
        if not wait_until(lambda: os.getppid() == agent, ADOPTED_WITHIN):
            os._exit(1)
        return None
    os.close(writing)
    os.waitpid(middle, 0)
    with os.fdopen(reading) as answer:
        return int(answer.read() or 0)


def wait_until(condition: Callable[[], bool], patience: float) -> bool:
    """Look every millisecond, for so many seconds; returns whether it came true."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def be_server(channel: socket.socket, agent: int, script: Script, prepare: Callable[[], None]) -> None:
    """Be the server, and, in its forks, the script.

    Args:
        prepare: imports.
    """
    die_with_parent(agent, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever has started all this may have it ignored, and nobody could be waited for
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    set_name(FORKED_NAME)
    own = dict(os.environ)
    with noting() as seen:
        prepare()
    is_fit = forks_well() and not any(map(is_of_worker, seen))
    gc.freeze()  # a collection would write to pages that all processes share
    sys.stdout.flush()
    sys.stderr.flush()

    def restore() -> None:
        for number, handler in handlers.items():
            if signal.getsignal(number) is signal.SIG_IGN:  # not if an import has set another one
                signal.signal(number, handler)

    if not serve(channel, agent, own if is_fit else None, restore):
        return
    set_name(f"{WORKER_NAME}{os.environ.get('RANK', '')}")
    gc.unfreeze()
    torch = sys.modules.get("torch")
    if torch is not None:
        # OpenMP has read it already, as the server was started.
        with contextlib.suppress(KeyError, ValueError):
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    script.run()


def main() -> None:
    """Called by `forking.py`."""
    script = Script.parse(sys.argv[3:])

    def prepare() -> None:
        script.prepare()
        with contextlib.suppress(OSError, SyntaxError, ImportError, ValueError):  # the worker will say it
            preload(script.imports())

    be_server(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), script, prepare)


if __name__ == "__main__":
    main()
