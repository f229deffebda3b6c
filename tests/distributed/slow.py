"""The real job, in which one rank works for SLOW_SECONDS at each of what ranks may do for different times."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import ModuleType

from elastic_train import main
from gai_yolo.evaluation import evaluator
from gai_yolo.job import build, startup

SECONDS, RANK = float(os.environ["SLOW_SECONDS"]), int(os.environ["RANK"])


def slow_down(module: ModuleType, name: str, rank: int) -> None:
    """Let a function of a module take its time on one rank."""
    original: Callable[..., object] = vars(module)[name]

    def slow(*arguments: object, **options: object) -> object:
        if rank == RANK:
            print(f"slow: {name}", flush=True)
            time.sleep(SECONDS)
        return original(*arguments, **options)

    vars(module)[name] = slow


if __name__ == "__main__":
    slow_down(startup, "load_indexes", 1)
    slow_down(build, "ImageSource", 0)  # filled when it is made
    slow_down(evaluator, "measure", 0)
    sys.exit(main())
