"""What this process tells its launcher beside the exit code, which torchrun turns into its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gai_yolo.errors import OWN_REASONS, Ending

VARIABLE = "GAI_YOLO_OUTCOME"
"""Environment variable: the file, in a folder of the launcher's own, in which workers say why they end, `{"code": int, "reason": str,
"ending": str, "at": float}`; a node's other processes than the first add `.1`, `.2` to its name. Scripts of other makes may leave the
last two out."""
LAUNCHER_VARIABLE = "GAI_YOLO_LAUNCHER"
"""Environment variable: process id of the launcher, if there is one."""
AGENT = os.getppid()
"""Process id of torchrun's agent, if there is one; when it has died, the parent is another process, which is not to be ended."""


@dataclass(frozen=True)
class Outcome:
    """How a process of the job ends, or has ended."""

    ending: Ending
    reason: str
    """One sentence for people."""

    @property
    def code(self) -> int:
        """Exit code."""
        return self.ending.exit_code


def is_under_torchrun() -> bool:
    """Whether a torchrun agent is the parent of this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_launcher() -> bool:
    """Whether there is a launcher that hears what this process says, waits, and says for what."""
    return VARIABLE in os.environ


def is_started_again() -> bool:
    """Whether somebody starts this process again if it asks for that with its exit code."""
    return has_launcher() or (is_under_torchrun() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0")


def clear() -> None:
    """Forget what a former process said."""
    if path := _path():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def report(outcome: Outcome) -> None:
    """Say how this process ends. Of a node's other processes than the first only what may be the cause of the others' ends."""
    path = _path()
    if path is None or (os.environ.get("LOCAL_RANK", "0") != "0" and outcome.ending not in OWN_REASONS):
        return
    with contextlib.suppress(OSError):
        write_outcome(path, outcome)


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Say it in a file, all of it or nothing; raises `OSError`."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(json.dumps({"code": outcome.code, "reason": outcome.reason, "ending": outcome.ending, "at": time.monotonic()}))
    temp.rename(path)


def _path() -> Path | None:
    path, rank = os.environ.get(VARIABLE), os.environ.get("LOCAL_RANK", "0")
    return None if path is None else Path(path if rank == "0" else f"{path}.{rank}")


def end_agent() -> None:
    """Let torchrun's agent on this node end, where it would start this process again and must not: it has no other way to be told.
    To be called last, because it ends its processes."""
    must_end = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if is_under_torchrun() and must_end and os.getppid() == AGENT:
        with contextlib.suppress(OSError):  # it is just ending
            os.kill(AGENT, signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """End this process at once. An orderly end of the interpreter would wait for threads and processes, whatever those wait for; all that
    matters is closed already."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
