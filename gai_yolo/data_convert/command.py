"""`gai-yolo data convert` and `gai-yolo data split`: what the command line asks for is read, written and told."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gai_yolo.errors import INTERRUPTED, Refusal

if TYPE_CHECKING:
    from gai_yolo.data_convert.conversion import Target
    from gai_yolo.data_convert.source import Wish
    from gai_yolo.data_convert.summary import Summary

KEPT_IN = "the same is in conversion.json in OUTPUT"


def convert(given: argparse.Namespace) -> int:
    """Run `gai-yolo data convert`; returns the exit code. Raises `Refusal` and `OSError`."""
    # What reads and writes loads NumPy and more, which the other commands of `gai-yolo` do without: hence the imports below.
    from gai_yolo.data_convert import conversion
    from gai_yolo.data_convert.classes import class_map

    wish, target, classes = _wish(given), _target(given), class_map(given.map, given.classes)
    try:
        return _tell(conversion.convert(wish, target, classes), given.json)
    except KeyboardInterrupt:
        return _interrupted()


def split(given: argparse.Namespace) -> int:
    """Run `gai-yolo data split`; returns the exit code. Raises `Refusal` and `OSError`."""
    from gai_yolo.data_convert import conversion
    from gai_yolo.data_convert.classes import class_map

    if not (0 < given.val < 1 and 0 <= given.test < 1 and given.val + given.test < 1):
        raise Refusal(f"--val {given.val:g} --test {given.test:g}: give shares between 0 and 1 that leave something to train on.")
    shares = conversion.Shares({"val": given.val} | ({"test": given.test} if given.test else {}), given.seed, given.group, given.group_by)
    wish, target, classes = _wish(given), _target(given), class_map(given.map, given.classes)
    try:
        return _tell(conversion.split(wish, target, shares, classes), given.json)
    except KeyboardInterrupt:
        return _interrupted()


def _wish(given: argparse.Namespace) -> Wish:
    from gai_yolo.data_convert.dates import Dates
    from gai_yolo.data_convert.source import Wish

    if not 0 <= given.max_bad_fraction <= 1:
        raise Refusal(f"--max-bad-fraction {given.max_bad_fraction:g}: give a share from 0 to 1.")
    dates = Dates(given.since, given.until, given.undated)
    return Wish(given.source, given.form, tuple(given.splits), given.annotations, given.image_folder, given.max_bad_fraction, dates)


def _target(given: argparse.Namespace) -> Target:
    from gai_yolo.data.formats.reading import expand
    from gai_yolo.data_convert.conversion import Target

    return Target(expand(given.output), given.to, given.images, given.overwrite)


def _tell(summary: Summary, as_json_text: bool) -> int:
    from gai_yolo.data_convert.summary import as_json, view
    from gai_yolo.reporting.terminal import rendered, say

    say(sys.stdout, as_json(summary) if as_json_text else rendered(view(summary), sys.stdout), KEPT_IN)
    return 0


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED
