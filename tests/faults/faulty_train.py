"""The real job on a node that can be made faulty while it runs. GAI_YOLO_NODE_FAULTS is a folder; a file in it turns a fault on:

- `stale`: an image file cannot be opened to be read, as when an NFS server does not know its handles any more (ESTALE).
- `slow_scoring`: scoring detections takes as many seconds longer as the file says.
- `slow_steps`: so does each step; no fault, but the run is not over before it should be.

Whenever a fault strikes a line is added to `NAME.log` there; for `slow_scoring` another one when it is over.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycocotools.cocoeval import COCOeval

from elastic_train import main
from gai_yolo.job import build as assembly
from gai_yolo.training.step import StepResult, TrainingStep

IMAGES = (".jpg", ".png")


class Switch:
    """A fault that can be turned on from outside.

    Args:
        folder: where its file and its log are.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file, self._log = str(folder / name), str(folder / f"{name}.log")
        self._open = os.open

    def setting(self) -> str | None:
        """What its file says; None while it is off."""
        try:
            descriptor = self._open(self._file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor) as file:
            return file.read()

    def note(self, text: str) -> None:
        """Let the test know that it has struck."""
        descriptor = self._open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{os.getpid()} {text}\n".encode())
        os.close(descriptor)


def lose_handles(switch: Switch) -> None:
    """Let whatever opens an image to read it look at the switch first."""

    def check(path: Any) -> None:
        if str(path).endswith(IMAGES) and switch.setting() is not None:
            switch.note(str(path))
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    def checked(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: Any = "r", *arguments: Any, **options: Any) -> Any:
            reads = mode & os.O_ACCMODE == os.O_RDONLY if isinstance(mode, int) else str(mode).startswith("r")
            if reads:
                check(path)
            return original(path, mode, *arguments, **options)

        return call

    vars(os)["open"] = checked(os.open)
    vars(io)["open"] = checked(io.open)  # NumPy's and pathlib's
    vars(builtins)["open"] = checked(builtins.open)


def score_slowly(switch: Switch) -> None:
    """Let the scoring of detections look at the switch first."""
    original = COCOeval.evaluate

    def evaluate(self: Any) -> Any:
        seconds = switch.setting()
        if seconds is not None:
            switch.note("begins")
            work_for(float(seconds))
            switch.note("ends")
        return original(self)

    COCOeval.evaluate = evaluate


def step_slowly(switch: Switch) -> None:
    """Let each step look at the switch first."""

    class SlowStep(TrainingStep):
        def __call__(self, *arguments: Any, **options: Any) -> StepResult:
            time.sleep(float(switch.setting() or 0))
            return super().__call__(*arguments, **options)

    vars(assembly)["TrainingStep"] = SlowStep


def work_for(seconds: float) -> None:
    """Use the processor now and then for so long: a scoring that sleeps would rightly be taken for one that hangs."""
    deadline = time.monotonic() + seconds
    while (now := time.monotonic()) < deadline:
        while time.monotonic() < now + 0.05:
            sum(range(1000))
        time.sleep(0.2)


if __name__ == "__main__":
    faults = Path(os.environ["GAI_YOLO_NODE_FAULTS"])
    lose_handles(Switch(faults, "stale"))
    score_slowly(Switch(faults, "slow_scoring"))
    step_slowly(Switch(faults, "slow_steps"))
    sys.exit(main())
