"""`gai-yolo status`: where a run is, and what its interruptions cost."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("runs", type=Path, nargs=1, metavar="RUN_FOLDER", help="experiments/NAME")
    parser.add_argument("--once", action="store_true", help="print one report on a terminal too")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def status(given: argparse.Namespace) -> int:
    """Print the status; returns the exit code."""
    from gai_yolo.reporting.status import show_status  # loads rich, which JSON of the other commands does without

    show_status(given.runs[0], given.json, given.once)
    return 0
