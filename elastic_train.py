"""The training job: `uv run elastic_train.py` or `torchrun --nproc-per-node 2 elastic_train.py`.

Exit codes: 0 done (or nothing left to do), 1 an exception that nobody had foreseen, 2 refused with one line that says why, 3 a process
has another state than the others, 4 no progress: started again in vain, 75 left after a notice (SIGTERM, SIGHUP, SIGUSR1, the cloud's) with
the state saved, 76 to be started again (a peer was lost, or something hung, or something stands in the way that time can mend; without a
launcher or torchrun's restarts that is a refusal), 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gai_yolo.config import load_config
from gai_yolo.distributed.environment import environment_local_rank
from gai_yolo.errors import INTERRUPTED, Departure, Ending, Refusal
from gai_yolo.job.run import run_job
from gai_yolo.job.startup import Options
from gai_yolo.supervision import outcome
from gai_yolo.supervision.streams import forgive_lost_streams

PAUSE = 10.0
"""Seconds before torchrun tries again what time can mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, train; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train YOLOv12; goes on by itself from the newest checkpoint of the run.")
    parser.add_argument("--config", type=Path, default=Path("configs/config.yaml"), help="YAML file (default: %(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="say so if there is nothing to continue")
    start.add_argument("--fresh", action="store_true", help="move the old run folder aside and start over")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="override configuration values")
    parser.add_argument("--tensorboard", action="store_true", help="serve TensorBoard on localhost while training")
    given = parser.parse_args(arguments)
    try:
        run_job(load_config(given.config, given.set), Options(given.resume, given.fresh, given.tensorboard))
    except Refusal as refusal:
        outcome.report(refusal.ending, str(refusal))  # a wrong configuration is known before there is a job
        return leave_refused(refusal)
    except Departure as departure:
        if not departure.launcher_knows:
            outcome.end_agent()
        return departure.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        print(f"error: {unforeseen(error)}", file=sys.stderr)
        traceback.print_exc()
        return Ending.FAILED.exit_code
    return 0


def unforeseen(error: Exception) -> str:
    """For people, an exception that no part of this program has an answer to: what, where, and what is left."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "gai_yolo" in frame.filename]
    where = f" in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    words = str(error).strip().splitlines()
    what = f"{type(error).__name__}{where}{': ' if words else ''}{words[0].rstrip('.') if words else ''}"
    return f"{what}; what is saved is complete, and the same command goes on from it. The traceback follows."


def leave(code: int) -> NoReturn:
    """End this process at once. An orderly end of the interpreter would wait for threads and processes, whatever those wait for; all that
    matters is closed already."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_refused(refusal: Refusal) -> int:
    """Say why; returns the exit code. What time can mend is no refusal where somebody starts this process again."""
    again = refusal.is_transient and outcome.is_started_again()
    if environment_local_rank() == 0 and not refusal.told and not (again and outcome.has_launcher()):
        print(f"{'waiting' if again else 'error'}: {refusal}", file=sys.stderr, flush=True)
    if not again:
        outcome.end_agent()
        return refusal.exit_code
    if not outcome.has_launcher():
        time.sleep(PAUSE)  # torchrun has no pause between two starts; all processes of a node are here, and none ends the others
    return refusal.ending.exit_code


if __name__ == "__main__":
    forgive_lost_streams()
    leave(main())
