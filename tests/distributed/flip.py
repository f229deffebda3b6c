"""The real job with a memory error: after step FLIP_STEP one bit of one weight of rank FLIP_RANK is another."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from elastic_train import main
from gai_yolo import job
from gai_yolo.training.step import StepResult, TrainingStep


class FlippingStep(TrainingStep):
    """A step on a machine with bad memory."""

    def __call__(self, *arguments: Any, **options: Any) -> StepResult:
        result = super().__call__(*arguments, **options)
        if self.world.rank == int(os.environ["FLIP_RANK"]) and self.state.step == int(os.environ["FLIP_STEP"]):
            self.parameters[0].detach().view(torch.uint8).view(-1)[0] ^= 1
            print("flipped a bit", flush=True)
        return result


if __name__ == "__main__":
    vars(job)["TrainingStep"] = FlippingStep
    sys.exit(main())
