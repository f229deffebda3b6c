"""`gai-yolo data check`: look at a data set as training would, and leave tables, a document and pictures.

Exit codes: 0 training would take it, 1 it would refuse it, 2 there is nothing to check, or nowhere to write to, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gai_yolo.config import Config, load_config
from gai_yolo.errors import INTERRUPTED, Refusal
from gai_yolo.sections import DataConfig

MOST_DECODED = 10_000
"""Images of a split that are decoded unless more are asked for: some minutes, where all of a large data set would take hours."""
WHERE_FOUND = "what was found is in the folder of --output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("path", type=Path, nargs="?", metavar="PATH", help="a data set folder or a YOLO data.yaml, as data.path")
    what.add_argument("--config", type=Path, help="YAML file of a training, whose section `data` says what is read")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="with --config: override values")
    parser.add_argument("--format", choices=("coco", "yolo", "voc"), help="with PATH: as data.format (default: found out)")
    parser.add_argument(
        "--output", type=Path, default=Path("data-check"), help="folder of the pictures and report.json (default: ./%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--images",
        default=str(MOST_DECODED),
        metavar="N|all",
        help="images to decode of each split, at least the 100 that training tries (default: %(default)s)",
    )


def check(given: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        Refusal: there is no such data set or configuration, or the output folder cannot be written to.
    """
    # What reads and draws loads NumPy, OpenCV and rich, which the other commands of `gai-yolo` do without: hence the imports below.
    config = _data_config(given)
    try:
        return _check(config, given.output, _most_decoded(given.images), given.json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _most_decoded(said: str) -> int | None:
    if said == "all":
        return None
    if not said.isdecimal() or int(said) < 1:
        raise Refusal(f"--images {said}: give a number from 1 on, or `all`.")
    return int(said)


def _data_config(given: argparse.Namespace) -> DataConfig:
    from gai_yolo.data.formats.reading import expand
    from gai_yolo.data.sources import BUILT_IN

    if given.config is not None and given.format is not None:
        raise Refusal("--format: the configuration says it; use --set data.format=... with --config.")
    if given.config is None and given.set:
        raise Refusal("--set: overrides values of a configuration; give it with --config.")
    data = load_config(given.config, given.set).data if given.config is not None else Config().data
    if given.path is not None:
        data = data.model_copy(update={"path": given.path, "format": given.format or "auto"})
    if data.path != BUILT_IN and not expand(data.path).exists():
        raise Refusal(f"{data.path}: there is no such folder or file; give `shapes`, a data set folder, or a YOLO data.yaml.")
    return data


def _check(config: DataConfig, output: Path, most: int | None, as_json_text: bool) -> int:
    from gai_yolo.data_check.inspection import inspect
    from gai_yolo.data_check.output import keep
    from gai_yolo.data_check.report import as_json, make_report
    from gai_yolo.data_check.tables import view
    from gai_yolo.reporting.output_folder import cannot_write, make_ready, refuse_among_images
    from gai_yolo.reporting.terminal import rendered, say

    try:
        make_ready(output)
    except OSError as error:
        raise cannot_write(output, error) from None
    findings = inspect(config, most)
    refuse_among_images(output, [found.index for found in findings.splits.values() if found.index is not None])
    report = make_report(config, findings)
    try:
        report = keep(output, config, findings, report)
    except OSError as error:
        raise cannot_write(output, error) from None
    if as_json_text:
        say(sys.stdout, as_json(report), WHERE_FOUND)
        say(sys.stderr, "".join(f"refused: {sentence}\n" for sentence in report.refusals), WHERE_FOUND)  # escapes what is no text by itself
    else:
        say(sys.stdout, rendered(view(report), sys.stdout), WHERE_FOUND)
    return 0 if report.trainable else 1
