"""The command lines of `gai-yolo data convert` and `gai-yolo data split`."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

CONVERT_EXAMPLES = """\
examples:
  gai-yolo data convert /data/bccd bccd-yolo --to yolo
  gai-yolo data convert /data/voc2012 voc-coco --to coco --images link          # links to the images in place of copies
  gai-yolo data convert /data/coco vehicles --to yolo --map car=vehicle truck=vehicle '*=-'   # one class of two, no others
  gai-yolo data convert /data/bdd100k bdd --to coco --classes classes.yaml --since 2017-09-01 --until 2017-09-30
  gai-yolo data convert /data/mine new --to coco --annotations labels.json --image-folder photos

A class map (--classes) is a YAML file of lines `old: new`; `old: "-"` leaves a class out, `"*": "-"` all that are not named.
SOURCE is never changed. OUTPUT appears when it is complete, with a summary in it (conversion.json).
Exit codes: 0 done, 2 refused with one line that says why, 130 Ctrl-C."""
SPLIT_EXAMPLES = """\
examples:
  gai-yolo data split /data/mine parted --val 0.2
  gai-yolo data split /data/mine parted --val 0.1 --test 0.1 --seed 7 --to yolo
  gai-yolo data split /data/videos parted --val 0.2 --group '^(.+)_[0-9]+\\.jpg$'   # frames of a video in one split
  gai-yolo data split /data/videos parted --val 0.2 --group-by video_id             # by a field of the image records (COCO, BDD100K)
  gai-yolo data split /data/coco parted --val 0.2 --splits train val                # leave test as it is

All splits that SOURCE has are put together first (--splits chooses). Which split an image comes to depends on the names and the seed only.
--group looks at names with the folders below that of the images (`cam 1/0001.jpg`).
Exit codes: 0 done, 2 refused with one line that says why, 130 Ctrl-C."""


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    _add_common(parser, "coco, yolo or voc", None)
    _explain(parser, CONVERT_EXAMPLES)


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    _add_common(parser, "coco (the default), yolo or voc", "coco")
    parser.add_argument("--val", type=float, required=True, metavar="SHARE", help="share of the images for validation, between 0 and 1")
    parser.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="share for a test split (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="another number, another partition (default: %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--group", metavar="REGEX", help="images for whose names its first group is the same stay together")
    group.add_argument("--group-by", metavar="FIELD", help="images with the same value in this field stay together; dots lead into objects")
    _explain(parser, SPLIT_EXAMPLES)


def _explain(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples.replace("%", "%%")


def _add_common(parser: argparse.ArgumentParser, forms: str, default: str | None) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="`shapes`, a data set folder or a YOLO data.yaml, as data.path")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that is not there yet")
    parser.add_argument("--to", choices=("coco", "yolo", "voc"), required=default is None, default=default, help=forms)
    kinds = ("auto", "coco", "yolo", "voc", "bdd100k")
    parser.add_argument("--from", dest="form", choices=kinds, default="auto", help="how SOURCE is written (default: found out)")
    parser.add_argument(
        "--images",
        choices=("copy", "link", "hardlink", "none"),
        default="copy",
        help="how images come to OUTPUT; links need SOURCE to stay, none writes labels only (default: %(default)s)",
    )
    parser.add_argument(
        "--splits", nargs="+", choices=("train", "val", "test"), default=[], help="take these only (default: all there are)"
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--map", nargs="+", action="extend", default=[], metavar="OLD=NEW", help="rename and merge classes; OLD=- drops one"
    )
    classes.add_argument("--classes", type=Path, metavar="FILE.yaml", help="the same from a file")
    parser.add_argument("--annotations", type=Path, help="of a SOURCE without splits: its json or list of names, relative to SOURCE")
    parser.add_argument("--image-folder", type=Path, help="of a SOURCE without splits: its images, relative to SOURCE")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="as data.max_bad_fraction: images that may be bad (default: 0.1)",
    )
    parser.add_argument("--since", type=_day, metavar="YYYY-MM-DD", help="BDD100K: images of this day (UTC) and later")
    parser.add_argument("--until", type=_day, metavar="YYYY-MM-DD", help="BDD100K: images of this day and earlier")
    parser.add_argument(
        "--undated",
        choices=("drop", "keep"),
        default="drop",
        help="BDD100K: what becomes of images without a date then (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an OUTPUT that one of these commands has written")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no day; write it as 2017-09-30") from None
