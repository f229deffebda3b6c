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

from gai_yolo.errors import LAST_WORDS, OF_ANOTHER, OWN_REASONS, Ending

VARIABLE = "GAI_YOLO_OUTCOME"
"""Environment variable: the file, in a folder of the launcher's own, in which workers say why they end, `{"code": int, "reason": str,
"ending": str, "at": float}`; a node's other processes than the first add `.1`, `.2` to its name. Scripts of other makes may leave the
last two out."""
LAUNCHER_VARIABLE = "GAI_YOLO_LAUNCHER"
"""Environment variable: process id of the launcher, if there is one."""
_OF_CODE = {ending.exit_code: ending for ending in LAST_WORDS - {Ending.DIVERGED} | {Ending.LEFT}}
"""For scripts that say no more than a code."""
AGENT = os.getppid()
"""Process id of torchrun's agent, if there is one; when it has died, the parent is another process, which is not to be ended."""


@dataclass(frozen=True)
class Outcome:
    """How a process of the job ends, or has ended."""

    ending: Ending
    reason: str
    """One sentence for people."""


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
    said = {"code": outcome.ending.exit_code, "reason": outcome.reason, "ending": outcome.ending, "at": time.monotonic()}
    temp.write_text(json.dumps(said))
    temp.rename(path)


def read_outcome(path: Path) -> Outcome | None:
    """What workers have said, or None: what the first of them says that tells of itself, else what the node's first process says."""
    said = {one: found for one in _paths(path) if (found := _read(one)) is not None}
    causes = [found for found in said.values() if found[1].ending not in OF_ANOTHER]
    _, outcome = min(causes, key=lambda found: found[0]) if causes else said.get(path, (0.0, None))
    return outcome


def clear_outcome(path: Path) -> None:
    """Forget what workers have said."""
    for one in _paths(path):
        one.unlink(missing_ok=True)


def _paths(path: Path) -> list[Path]:
    """Where a node's processes say how they end."""
    return [path, *path.parent.glob(f"{path.name}.*[0-9]")]


def _read(path: Path) -> tuple[float, Outcome] | None:
    """What one process has said, and when, in seconds of the monotonic clock."""
    try:
        said = json.loads(path.read_text())
        code = int(said["code"])
        given = said.get("ending")
        ending = Ending(given) if given in list(Ending) else _OF_CODE.get(code, Ending.UNKNOWN)
        return float(said.get("at", 0.0)), Outcome(ending, str(said["reason"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


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
