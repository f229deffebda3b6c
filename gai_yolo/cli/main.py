"""The command `gai-yolo`.

`gai-yolo snapshots ls | verify | prune | adopt | rollback RUN_FOLDER` shows, checks, thins out and repairs the checkpoints of a run, and
goes back to an older one; `gai-yolo digest RUN_FOLDER ...` prints what its state is, to compare runs; `gai-yolo status RUN_FOLDER` says
where it is and what its interruptions cost; `gai-yolo launch -- SCRIPT ...` keeps a job going on this node; `gai-yolo data check PATH`
looks at a data set; `gai-yolo weights import | export` makes a safetensors file of others' weights, and of a run's; `gai-yolo export
RUN_FOLDER` makes a file of a network for other programs, and `gai-yolo benchmark RUN_FOLDER` times them. Exit codes: 0 all is well, 1
`verify` found a bad one, the runs of `digest` differ or training would refuse the data set, 2 refused with one line that says why; those of
`launch` are in its `--help`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence

from gai_yolo.cli import benchmark, digest, export, snapshots, status, weights
from gai_yolo.data_check import command as data_check
from gai_yolo.errors import REFUSED, Refusal
from gai_yolo.launcher import arguments as launch_arguments
from gai_yolo.launcher.supervisor import main as launch
from gai_yolo.log import showing


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gai-yolo", description="Tools around runs of elastic_train.py.")
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

    add(tools, "snapshots", "the checkpoints of a run", snapshots.add_arguments, snapshots.snapshots)
    text = "print the SHA-256 of the parts of a run's newest state; of several runs, and whether they are equal"
    add(tools, "digest", text, digest.add_arguments, digest.digest)
    text = "show where a run is, its interruptions and where its time went; on a terminal a live view"
    add(tools, "status", text, status.add_arguments, status.status)
    add(tools, "launch", "run a training job on this node, and keep it going", launch_arguments.add_arguments, launch)
    add(tools, "weights", "weight files of others, and those of a run for others", weights.add_arguments, weights.weights)
    text = "write a trained network for other programs (ONNX, TorchScript, OpenVINO), compared with PyTorch before it gets its name"
    add(tools, "export", text, export.add_arguments, export.export)
    text = "time a trained network in PyTorch and in each format that it can be exported to"
    add(tools, "benchmark", text, benchmark.add_arguments, benchmark.benchmark)
    data = tools.add_parser("data", help="the data set of a training").add_subparsers(dest="command", required=True)
    text = "read a data set as training would; show what is in it and what is wrong with it, in tables, report.json and pictures"
    add(data, "check", text, data_check.add_arguments, data_check.check)
    given = parser.parse_args(arguments)
    try:
        with contextlib.nullcontext() if given.tool == "launch" else showing(warn):  # that one has words of its own
            code: int = given.function(given)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    except OSError as error:
        where = error.filename or next(iter(getattr(given, "runs", [])), "output")
        print(f"error: {where}: {error.strerror or error}; nothing complete was lost.", file=sys.stderr)
        return REFUSED
    return code


def warn(record: logging.LogRecord) -> None:
    """Show what the package says where what is asked for goes to standard output."""
    if record.levelno >= logging.WARNING:
        print(f"warning: {record.getMessage()}", file=sys.stderr)
