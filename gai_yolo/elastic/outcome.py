"""What this process tells its launcher beside the exit code, which torchrun turns into its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

VARIABLE = "GAI_YOLO_OUTCOME"
"""Environment variable: the file, in a folder of the launcher's own, in which workers say why they end, `{"code": int, "reason": str}`."""
LAUNCHER_VARIABLE = "GAI_YOLO_LAUNCHER"
"""Environment variable: process id of the launcher, if there is one."""
AGENT = os.getppid()
"""Process id of torchrun's agent, if there is one; when it has died, the parent is another process, which is not to be ended."""


def is_under_torchrun() -> bool:
    """Whether a torchrun agent is the parent of this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def clear() -> None:
    """Forget what a former process said."""
    if path := _path():
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)


def report(code: int, reason: str) -> None:
    """Say how this node's first process ends; those of the others may end because it did."""
    path = _path()
    if not path:
        return
    with contextlib.suppress(OSError):
        write(Path(path), code, reason)


def write(path: Path, code: int, reason: str) -> None:
    """Say it in a file, all of it or nothing; raises `OSError`."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"code": code, "reason": reason}))
    draft.rename(path)


def _path() -> str | None:
    return os.environ.get(VARIABLE) if os.environ.get("LOCAL_RANK", "0") == "0" else None


def end_agent() -> None:
    """Let torchrun's agent on this node end, where it would start this process again and must not: it has no other way to be told.
    To be called last, because it ends its processes."""
    must_end = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if is_under_torchrun() and must_end and os.getppid() == AGENT:
        with contextlib.suppress(OSError):  # it is just ending
            os.kill(AGENT, signal.SIGTERM)
