"""`gai-yolo weights`: weight files of others for trainings here, and those of a run for others."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gai_yolo.cli.snapshots import must_be_run
from gai_yolo.errors import CheckpointError, printable, refused_by
from gai_yolo.store.atomic import publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    commands = parser.add_subparsers(dest="command", required=True)
    text = "make a safetensors file of a state dict, a checkpoint, or a released YOLO12, whose pickled network is read without its program"
    one = commands.add_parser("import", help=text, description=text)
    one.add_argument("source", type=Path, metavar="FILE")
    text = "make a safetensors file of a run's EMA weights, with class names, configuration, position and origin"
    other = commands.add_parser("export", help=text, description=text)
    other.add_argument("source", type=Path, metavar="RUN_FOLDER")
    other.add_argument("--checkpoint", default="best", metavar="best|last|NAME", help="which one; the best by default")
    for command in (one, other):
        command.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="where to write")
        command.add_argument("--overwrite", action="store_true", help="replace a file of that name")


def weights(given: argparse.Namespace) -> int:
    """Write the file; returns the exit code. Raises `Refusal`."""
    from gai_yolo.inference.weight_files import exported, imported  # loads torch, which the other commands do without

    if given.output.suffix != ".safetensors":
        raise CheckpointError(f"{given.output}: give it a name that ends with .safetensors, by which it is known.")
    if os.path.lexists(given.output) and not given.overwrite:
        raise CheckpointError(f"{given.output}: is there already; give another --output, or --overwrite.")
    if given.output.exists() and not given.output.is_file():
        raise CheckpointError(f"{given.output}: is a folder or a device; give the name of a file as --output.")
    if given.command == "export":
        must_be_run(given.source)
    made = imported(given.source) if given.command == "import" else exported(given.source, given.checkpoint)
    try:
        publish(given.output, lambda file: file.write(made.data))
    except OSError as error:  # it names the draft
        raise refused_by(error, CheckpointError(f"{given.output}: cannot be written ({error.strerror or error}).")) from None
    names = [printable(name, 40) for name in made.weights.class_names or []]
    shown = ", ".join(names[:5] + (["..."] if len(names) > 5 else []))
    classes = f"{made.num_classes} classes" + (f" ({shown})" if names else "")
    print(f"{given.output}: YOLO12-{made.size}, {classes}, {len(made.weights.tensors)} tensors, {len(made.data) / 1e6:.1f} MB")
    if made.weights.origin is not None and made.weights.origin.note:
        print(f"note: {made.weights.origin.note}")
    return 0
