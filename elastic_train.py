"""The training job: `uv run elastic_train.py` or `torchrun --nproc-per-node 2 elastic_train.py`.

Exit codes: 0 done (or nothing left to do), 1 an exception that nobody had foreseen, 2 refused with one line that says why, 3 a process
has another state than the others, 4 no progress: started again in vain, 75 left after a notice (SIGTERM, SIGHUP, SIGUSR1, the cloud's) with
the state saved, 76 to be started again (a peer was lost, or something hung, or something stands in the way that time can mend; without a
launcher or torchrun's restarts that is a refusal), 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gai_yolo.job.run import run_job
from gai_yolo.job.startup import Options
from gai_yolo.supervision.outcome import leave
from gai_yolo.supervision.streams import forgive_lost_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train YOLOv12; goes on by itself from the newest checkpoint of the run.")
    parser.add_argument("--config", type=Path, default=Path("configs/config.yaml"), help="YAML file (default: %(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="say so if there is nothing to continue")
    start.add_argument("--fresh", action="store_true", help="move the old run folder aside and start over")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="override configuration values")
    parser.add_argument("--tensorboard", action="store_true", help="serve TensorBoard on localhost while training")
    given = parser.parse_args(arguments)
    return run_job(given.config, given.set, Options(given.resume, given.fresh, given.tensorboard))


if __name__ == "__main__":
    forgive_lost_streams()
    leave(main())
