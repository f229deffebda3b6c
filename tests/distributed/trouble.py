"""The real job in trouble. TROUBLE is the kind, TROUBLE_STEP when, TROUBLE_RANK whose (any of them, if it is not set):

- `flip`: after the step, one bit of one weight is another, as with bad memory.
- `jump`: in the step, the gradients are far above what is expected.
- `nan`: in the step, the gradients are no numbers.
- `nans`: in this and all later steps.
- `hang`: the step never ends.
- `long`: the step computes for longer than any grace.
- `kill`: the process dies in the step, as often as TROUBLE_DEATHS says; the file that it names counts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_train import main
from gai_yolo.distributed.exact_sum import memory_order
from gai_yolo.goodput import progress
from gai_yolo.job import build as assembly
from gai_yolo.training.step import StepResult, TrainingStep

KIND, STEP = os.environ["TROUBLE"], int(os.environ["TROUBLE_STEP"])
LONG = 120.0
"""Seconds."""
IS_MINE = os.environ.get("TROUBLE_RANK") in (None, os.environ.get("RANK", "0"))


class TroubledStep(TrainingStep):
    """A step that may go wrong."""

    def __call__(self, *arguments: Any, **options: Any) -> StepResult:
        now = IS_MINE and (self.state.step + 1 == STEP or (KIND == "nans" and self.state.step + 1 > STEP))
        handle = None
        if now and KIND == "jump":
            assert self.state.gradient_exponents is not None
            self.state.gradient_exponents = [-60] * len(self.state.gradient_exponents)
        if now and KIND in ("nan", "nans"):
            handle = self.parameters[7].register_hook(_spoiled)
        if now:
            print(f"trouble: {KIND}", flush=True)
        if now and KIND == "kill":
            die()
        if now and KIND == "hang":
            time.sleep(3600)
        if now and KIND == "long":
            compute_for(LONG)
        result = super().__call__(*arguments, **options)
        if handle is not None:
            handle.remove()
        if now and KIND == "flip":
            memory_order(self.parameters[0].detach()).view(torch.uint8)[0] ^= 1
        if now and KIND == "jump":
            print(f"measured: {result.measured}", flush=True)
        return result


def die() -> None:
    """`kill -9`, unless it has happened often enough. TROUBLE_DEATHS is `FILE:NUMBER`."""
    path, _, most = os.environ["TROUBLE_DEATHS"].rpartition(":")
    deaths = Path(path).read_text() if Path(path).exists() else ""
    if len(deaths) < int(most):
        Path(path).write_text(f"{deaths}x")
        os.kill(os.getpid(), signal.SIGKILL)


def compute_for(seconds: float) -> None:
    """Be as busy as a step is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        torch.ones(64, 64) @ torch.ones(64, 64)


def _spoiled(gradient: Tensor) -> Tensor:
    return gradient * float("nan")


if __name__ == "__main__":
    vars(assembly)["TrainingStep"] = TroubledStep
    vars(progress)["LEAST_SECONDS"] = 1.0  # tests have less time
    sys.exit(main())
