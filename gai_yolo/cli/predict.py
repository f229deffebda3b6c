"""`gai-yolo predict`: look for objects in images, videos and cameras, and leave pictures and tables.

Exit codes: 0 all was looked at, 1 some of it could not be read, 2 nothing could, or refused, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from gai_yolo.errors import INTERRUPTED, Refusal

PREDICT_EXAMPLES = """examples:
  gai-yolo predict experiments/shapes photo.jpg              # predictions/shapes/1/images/photo.jpg is drawn
  gai-yolo predict experiments/shapes photos/ clip.mp4       # a folder with all below it, and a video
  gai-yolo predict yolo12n.safetensors 'photos/**/*.png' --classes person car --confidence 0.4
  find /data -name '*.jpg' -print0 | gai-yolo predict experiments/shapes - --save csv,coco --output found
  gai-yolo predict experiments/shapes 0                      # the first camera, until Ctrl-C
"""
DEFAULT_SAVED = "images,coco,csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = PREDICT_EXAMPLES
    parser.add_argument("model", type=Path, metavar="RUN|FILE", help="the folder of a run, or a weight file")
    text = "an image, a video, a folder (with all below it), a quoted pattern, the number of a camera, or - for a list on standard input"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="a new or empty one (default: predictions/NAME/1, then 2, ...)")
    parser.add_argument("--overwrite", action="store_true", help="with --output: replace files in it")
    parser.add_argument("--save", default=DEFAULT_SAVED, metavar="KIND,...", help="of images, coco, yolo, csv (default: %(default)s)")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|NAME", help="of a run: which one (default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.25, metavar="0..1", help="least score (default: %(default)s)")
    parser.add_argument(
        "--iou", type=float, default=0.7, metavar="0..1", help="overlap from which on two boxes are one object (default: %(default)s)"
    )
    parser.add_argument("--max-detections", type=int, default=300, metavar="N", help="of a picture (default: %(default)s)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="look for these only; names, or numbers from 0")
    parser.add_argument("--size", type=int, metavar="N", help="of the network's input in pixels (default: as in training)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pictures that are computed together (default: %(default)s)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")


def predict(given: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        Refusal: an option is wrong, or nothing can be read.
        OSError: the output cannot be written.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # its lines name no file; this program does
    try:
        return _predict(given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _predict(given: argparse.Namespace) -> int:
    # What reads, computes and draws loads PyTorch and OpenCV, which other commands do without.
    from gai_yolo.inference.prediction import Selection, checked_size, class_positions
    from gai_yolo.inference.trained import load_trained
    from gai_yolo.predict.command import Session, Settings, described, nothing
    from gai_yolo.predict.detector import Detector
    from gai_yolo.predict.output import SAVED_KINDS, Output, new_folder
    from gai_yolo.predict.sources import find_sources

    kinds = given.save.split(",")
    if wrong := [kind for kind in kinds if kind not in SAVED_KINDS]:
        raise Refusal(f"--save {given.save}: there is no {wrong[0]!r}; give some of {','.join(SAVED_KINDS)}.")
    if given.overwrite and given.output is None:
        raise Refusal("--overwrite: each prediction gets a folder of its own; give --output with it.")
    if given.batch < 1:
        raise Refusal(f"--batch: must be at least 1, and is {given.batch}.")
    Selection(given.confidence, given.iou, given.max_detections)  # refused before anything is read
    sources = find_sources(given.sources)
    if not sources.items:
        raise Refusal(nothing(sources.problems))
    trained = load_trained(given.model, given.checkpoint)
    detector, names = Detector(trained, given.device), tuple(trained.class_names)
    positions = None if given.classes is None else class_positions(given.classes, names)
    selection = Selection(given.confidence, given.iou, given.max_detections, positions)
    settings = Settings(selection, checked_size(trained.image_size if given.size is None else given.size), given.batch)
    name = given.model.resolve().name if given.model.is_dir() else given.model.stem
    folder = new_folder(given.output, name, given.overwrite)
    about = {"model": str(given.model), "checkpoint": str(trained.path), "device": str(detector.device), **described(settings, names)}
    output = Output(folder, kinds, names, given.overwrite)
    try:
        return Session(detector, settings, output, sources.problems).run(sources.items, about)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk names no file
        raise
    except Refusal:
        if given.output is None:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
