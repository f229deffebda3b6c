"""`gai-yolo digest`: what the states of runs are, to compare them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gai_yolo.cli.snapshots import must_be_run
from gai_yolo.errors import CheckpointError
from gai_yolo.store.catalogue import Catalogue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER", help="experiments/NAME")
    parser.add_argument("--checkpoint", metavar="NAME", help="epoch_010 or step_00000123, in place of the newest")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def digest(given: argparse.Namespace) -> int:
    """Print the digests of the states of runs; returns the exit code. Raises `Refusal` if there is no such state."""
    from gai_yolo.checkpointing.digest import part_digests  # loads torch, which the other commands do without
    from gai_yolo.checkpointing.recovery import load, newest

    found = []
    for run in given.runs:
        must_be_run(run)
        catalogue = Catalogue(run)
        one, passed_over = (load(catalogue, given.checkpoint), []) if given.checkpoint is not None else newest(catalogue)
        for text in passed_over:
            print(text, file=sys.stderr)
        if one is None:
            raise CheckpointError(f"{run}: holds no complete checkpoint.")
        try:
            found.append((run, one.path, part_digests(one.content)))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise CheckpointError(f"{one.path}: does not hold a whole training state; it was not written by this program.") from None
    parts = found[0][2].keys()
    differing = [part for part in parts if len({of_parts[part] for _, _, of_parts in found}) > 1]
    if given.json:
        print(json.dumps([{"run": str(run), "checkpoint": str(path), "digests": of_parts} for run, path, of_parts in found], indent=1))
        return 1 if differing else 0
    for run, path, of_parts in found:
        print(f"{run}: {path.relative_to(run)}")
        for part in parts:
            print(f"  {part:<10} {of_parts[part]}{'   differs' if part in differing else ''}")
    if len(found) > 1:
        print(f"differ in {', '.join(differing)}" if differing else "equal, to the last bit")
    return 1 if differing else 0
