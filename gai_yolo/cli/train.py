"""`gai-yolo train`: the training job under the command's name, which needs no clone of the repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from gai_yolo.config_files import DEFAULT

TRAIN_EXAMPLES = """\
examples:
  gai-yolo train                                    the built-in data set, some minutes on a CPU
  gai-yolo train --config bccd --set data.path=/data/bccd training.epochs=20
  gai-yolo train --set model.weights=yolo12n.safetensors model.freeze=9 training.patience=10
  torchrun --nproc-per-node 2 -m gai_yolo train     as many processes
  gai-yolo launch -- -m gai_yolo train              the same, kept going whatever happens

The same command goes on from the newest complete checkpoint of the run. Every key of --set: docs/configuration.md.

exit codes: 0 done (or nothing left to do), 1 an exception that nobody had foreseen, 2 refused with one line that says why, 3 a process has
another state than the others, 4 no progress: started again in vain, 75 left after a notice (SIGTERM, SIGHUP, SIGUSR1, the cloud's) with
the state saved, 76 to be started again (a peer was lost, or something hung, or something stands in the way that time can mend; without a
launcher or torchrun's restarts that is a refusal), 130 interrupted with Ctrl-C."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, TRAIN_EXAMPLES
    text = "YAML file, or the name of one that comes with the package, such as bccd (default: %(default)s)"
    parser.add_argument("--config", type=Path, default=DEFAULT, metavar="FILE|NAME", help=text)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="say so if there is nothing to continue")
    start.add_argument("--fresh", action="store_true", help="move the old run folder aside and start over")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="override configuration values")
    parser.add_argument("--tensorboard", action="store_true", help="serve TensorBoard on localhost while training")


def run(given: argparse.Namespace) -> int:
    """Train as the command line says; returns the exit code."""
    from gai_yolo.job.run import run_job  # loads torch, which the other commands do without
    from gai_yolo.job.startup import Options

    return run_job(given.config, given.set, Options(given.resume, given.fresh, given.tensorboard))


def train(given: argparse.Namespace) -> int:
    """The same as the main program of this process, which ends with it."""
    from gai_yolo.supervision.outcome import leave
    from gai_yolo.supervision.streams import forgive_lost_streams

    forgive_lost_streams()
    leave(run(given))
