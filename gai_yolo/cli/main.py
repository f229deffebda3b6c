"""The command `gai-yolo`: `gai-yolo --help` says what it can do.

Exit codes: 0 all is well, 1 something is not (`verify` found a bad one, the runs of `digest` differ, training would refuse the data set),
2 refused with one line that says why; those of `train` and `launch` are in their `--help`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence

from gai_yolo import __version__
from gai_yolo.cli import benchmark, completion, digest, export, predict, snapshots, status, train, val, weights
from gai_yolo.data_check import command as data_check
from gai_yolo.data_convert import arguments as convert_arguments
from gai_yolo.data_convert import command as data_convert
from gai_yolo.errors import REFUSED, Refusal
from gai_yolo.launcher import arguments as launch_arguments
from gai_yolo.launcher.supervisor import main as launch
from gai_yolo.log import showing

EXAMPLES = """\
examples:
  gai-yolo train                                        the built-in data set, some minutes on a CPU
  gai-yolo status experiments/shapes                    where it is, and what interruptions cost
  gai-yolo val experiments/shapes                       how good it is
  gai-yolo predict experiments/shapes photos/           what it finds
  gai-yolo export experiments/shapes --format onnx      for other programs
  gai-yolo snapshots ls experiments/shapes              its checkpoints
  gai-yolo COMMAND --help                               more of each"""
OF_THEIR_OWN_WORDS = ("train", "launch")
"""Commands that show what the package says themselves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        with contextlib.nullcontext() if given.tool in OF_THEIR_OWN_WORDS else showing(warn):
            code: int = given.function(given)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    except OSError as error:
        where = error.filename or next(iter(getattr(given, "runs", [])), "output")
        print(f"error: {where}: {error.strerror or error}; nothing complete was lost.", file=sys.stderr)
        return REFUSED
    return code


def make_parser() -> argparse.ArgumentParser:
    """All commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = "Train YOLO12 so that nothing can stop it, and use what was trained."
    parser = argparse.ArgumentParser(prog="gai-yolo", description=text, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"gai-yolo {__version__}")
    tools = parser.add_subparsers(dest="tool", required=True)

    def add(
        to: argparse._SubParsersAction[argparse.ArgumentParser],
        name: str,
        text: str,
        describe: Callable[[argparse.ArgumentParser], None],
        function: Callable[[argparse.Namespace], int],
    ) -> None:
        one = to.add_parser(name, help=text, description=text)
        describe(one)
        one.set_defaults(function=function)

    add(tools, "train", "train, or go on with a training", train.add_arguments, train.train)
    add(tools, "snapshots", "the checkpoints of a run", snapshots.add_arguments, snapshots.snapshots)
    text = "print the SHA-256 of the parts of a run's newest state; of several runs, and whether they are equal"
    add(tools, "digest", text, digest.add_arguments, digest.digest)
    text = "show where a run is, its interruptions and where its time went; on a terminal a live view"
    add(tools, "status", text, status.add_arguments, status.status)
    add(tools, "launch", "run a training job on this node, and keep it going", launch_arguments.add_arguments, launch)
    add(tools, "weights", "weight files of others, and those of a run for others", weights.add_arguments, weights.weights)
    text = (
        "evaluate a run's checkpoint or a weight file on a data set; COCO's numbers, each class, confusions, curves, best and worst images"
    )
    add(tools, "val", text, val.add_arguments, val.val)
    text = "look for objects in images and videos; leaves drawn pictures and tables in a new folder"
    add(tools, "predict", text, predict.add_arguments, predict.predict)
    text = "write a trained network for other programs (ONNX, TorchScript, OpenVINO), compared with PyTorch before it gets its name"
    add(tools, "export", text, export.add_arguments, export.export)
    text = "time a trained network in PyTorch and in each format that it can be exported to"
    add(tools, "benchmark", text, benchmark.add_arguments, benchmark.benchmark)
    data = tools.add_parser("data", help="the data set of a training").add_subparsers(dest="command", required=True)
    text = "read a data set as training would; show what is in it and what is wrong with it, in tables, report.json and pictures"
    add(data, "check", text, data_check.add_arguments, data_check.check)
    text = "write a data set in another format: COCO, YOLO or VOC; also from BDD100K, and with other classes"
    add(data, "convert", text, convert_arguments.add_convert_arguments, data_convert.convert)
    text = "part a data set anew into train, val and test, by image or by group"
    add(data, "split", text, convert_arguments.add_split_arguments, data_convert.split)
    text = "print a script that lets a shell complete these commands"
    add(tools, "completion", text, completion.add_arguments, lambda given: completion.completion(given, parser))
    return parser


def warn(record: logging.LogRecord) -> None:
    """Show what the package says where what is asked for goes to standard output."""
    if record.levelno >= logging.WARNING:
        print(f"warning: {record.getMessage()}", file=sys.stderr)
