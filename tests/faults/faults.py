"""Breaking the writer of a real job at chosen file system calls (tests/faults/inject)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.harness import REPOSITORY

INJECT = REPOSITORY / "tests" / "faults" / "inject"


def strace_works() -> bool:
    """Whether this machine has strace and lets it trace."""
    strace = shutil.which("strace")
    return (
        strace is not None and subprocess.run([strace, "-qq", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0
    )


@dataclass(frozen=True)
class Call:
    """A file system call that the writer was about to make."""

    what: str
    """Its name, and the role of the file: `rename manifest`."""
    struck: bool


Place = int | tuple[str, int]
"""A number among all calls, or the number among those of one kind; from 1."""


class Faults:
    """Environment variables that make the writer of a job fail, and the log of its calls.

    Args:
        folder: for the instructions and the log.
        run: the run folder; only calls under it count.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self.log = folder / "calls.log"

    def at(self, places: Sequence[Place], action: Literal["kill", "stop"] | int) -> dict[str, str]:
        """At these calls: kill the job, stop the writer, or fail with an errno."""
        return self._environment("GAI_YOLO_FAULTS", {"root": str(self.run), "log": str(self.log), "at": list(places), "action": action})

    def strace(self, syscall: str, number: int) -> dict[str, str]:
        """Kill the writer with strace at its system call of that number (from 1) and kind, and the job with it."""
        kill = f"inject=/^{syscall}(at2?)?$:signal=KILL:when={number}"
        return self._environment("GAI_YOLO_STRACE", ["-o", str(self.log), "-e", f"trace=/^{syscall}(at2?)?$", "-e", kill])

    def calls(self) -> list[Call]:
        """What the writer has called since `at`, the call it was struck at included."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [Call(what, struck == "1") for _, struck, what in (line.split(maxsplit=2) for line in lines)]

    def _environment(self, variable: str, settings: object) -> dict[str, str]:
        self.log.unlink(missing_ok=True)
        instructions = self.folder / "faults.json"
        instructions.write_text(json.dumps(settings))
        return {"PYTHONPATH": f"{INJECT}{os.pathsep}{REPOSITORY}", variable: str(instructions)}
