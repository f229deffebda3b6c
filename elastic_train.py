"""The training job: `uv run elastic_train.py` or `torchrun --nproc-per-node 2 elastic_train.py`.

Exit codes: 0 done (or nothing left to do), 1 an exception that nobody had foreseen, 2 refused with one line that says why, 3 a process
has another state than the others, 4 no progress: started again in vain, 75 left after a notice (SIGTERM, SIGHUP, SIGUSR1, the cloud's) with
the state saved, 76 to be started again (a peer was lost, or something hung, or something stands in the way that time can mend; without a
launcher or torchrun's restarts that is a refusal), 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import gai_yolo.job.run  # noqa: F401  # at the top, where a fork server finds what to import before it forks
from gai_yolo.cli.train import add_arguments, run
from gai_yolo.supervision.outcome import leave
from gai_yolo.supervision.streams import forgive_lost_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train YOLOv12; goes on by itself from the newest checkpoint of the run.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    forgive_lost_streams()
    leave(main())
