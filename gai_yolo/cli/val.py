"""`gai-yolo val`: how good a trained network is on a data set."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gai_yolo.config import Config
from gai_yolo.errors import INTERRUPTED, Refusal
from gai_yolo.sections import DataConfig

if TYPE_CHECKING:
    from gai_yolo.data.dataset import Batch
    from gai_yolo.inference.trained import TrainedModel
    from gai_yolo.inference.validate import Question, ValidationReport

EXAMPLES_OF_USE = """examples:
  gai-yolo val experiments/bccd                                  the best epoch, on the validation set of the run
  gai-yolo val experiments/bccd --checkpoint epoch_010           that one; the numbers are those of training_metrics.json
  gai-yolo val experiments/bccd --split test --json              the test split of its data set, as JSON
  gai-yolo val yolo12n.safetensors --data /data/coco             weights of others, on a data set with their classes

The folder of the results (RUN/val/NAME-1, or ./val/NAME-1 of a file, or --output) holds validation.json, precision_recall.png,
confidence.png, confusion_matrix.png, and the worst and best images. Exit codes: 0 done, 2 refused, 130 Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES_OF_USE
    parser.add_argument("source", type=Path, metavar="RUN|FILE", help="the folder of a run, or a weight file")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|NAME", help="of a run, which one; the best by default")
    parser.add_argument("--data", type=Path, metavar="PATH|shapes", help="a data set, as data.path (default: that of the training)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="of the data set (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the results go, a new or empty folder")
    parser.add_argument("--overwrite", action="store_true", help="with --output: replace what an earlier validation has left there")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--batch", type=int, metavar="N", help="images of one pass (default: as in training; last digits depend on it)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the GPU, unless the training was told to do without")
    text = "from which on detections count in the confusion matrix and in the F1 of images (default: 0.25)"
    parser.add_argument("--confidence", type=float, default=0.25, metavar="0..1", help=text)
    text = "overlap from which on a detection matches a box there (default: 0.5)"
    parser.add_argument("--iou", type=float, default=0.5, metavar="0..1", help=text)


def val(given: argparse.Namespace) -> int:
    """Evaluate, write and print; returns the exit code. Raises `Refusal`."""
    # What computes and draws loads torch, OpenCV and rich, which the other commands do without: hence the imports below.
    _check_numbers(given)
    try:
        return _val(given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _check_numbers(given: argparse.Namespace) -> None:
    if given.batch is not None and given.batch < 1:
        raise Refusal(f"--batch {given.batch}: give a number from 1 on.")
    if not 0 <= given.confidence <= 1:
        raise Refusal(f"--confidence {given.confidence:g}: give a number from 0 to 1.")
    if not 0 < given.iou <= 1:
        raise Refusal(f"--iou {given.iou:g}: give a number above 0, up to 1.")
    if given.overwrite and given.output is None:
        raise Refusal("--overwrite: replaces what is in the folder of --output; give that, too.")


def _val(given: argparse.Namespace) -> int:
    from gai_yolo.inference.trained import load_trained
    from gai_yolo.inference.validate import Question
    from gai_yolo.reporting.output_folder import make_new, make_ready
    from gai_yolo.reporting.terminal import rendered, say
    from gai_yolo.reporting.validation_document import as_json
    from gai_yolo.reporting.validation_folder import keep_validation
    from gai_yolo.reporting.validation_tables import view

    if given.output is not None:
        _check_output(given.output, given.overwrite)
    model = load_trained(given.source, given.checkpoint)
    question = Question(given.split, given.batch, given.device, given.confidence, given.iou)
    parent = given.source / "val" if given.source.is_dir() else Path("val")
    place = given.output or parent
    try:
        with _writing(place):
            make_ready(place)
        report = _report(given, model, question, place)
        with _writing(place):
            folder = given.output or make_new(parent, report.model.path.stem)
            keep_validation(folder, report)
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()  # which it can be if nothing has come of it
    where = f"results: {folder}\n".encode(errors="backslashreplace").decode()
    kept = f"the results are in {folder}"
    if given.json:
        say(sys.stdout, as_json(report), kept)
        say(sys.stderr, where, kept)
    else:
        say(sys.stdout, rendered(view(report), sys.stdout) + where, kept)
    return 0


def _check_output(output: Path, overwrite: bool) -> None:
    from gai_yolo.reporting.validation_folder import VALIDATION_DOCUMENT

    if output.exists() and not output.is_dir():
        raise Refusal(f"{output}: is a file; give --output a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise Refusal(f"{output}: is not empty; give another --output, or --overwrite.")
    if not (output / VALIDATION_DOCUMENT).is_file():
        raise Refusal(f"{output}: holds no {VALIDATION_DOCUMENT}, and what is there is not this command's; give another --output.")


def _data(path: Path | None, model: TrainedModel) -> DataConfig | None:
    """What is read: another data set than that of the training has its own layout, and this machine's loaders and cache."""
    if path is None:
        return None
    known = (model.config or Config()).data
    return DataConfig(path=path, max_bad_fraction=known.max_bad_fraction, workers=known.workers, cache_folder=known.cache_folder)


def _report(given: argparse.Namespace, model: TrainedModel, question: Question, place: Path) -> ValidationReport:
    from gai_yolo.inference.validate import validate
    from gai_yolo.reporting.output_folder import refuse_among_images

    try:
        return validate(model, _data(given.data, model), question, _watched, lambda index: refuse_among_images(place, [index]))
    except (MemoryError, OSError) as error:
        said = getattr(error, "strerror", None) or "there is no memory left"
        raise Refusal(f"{given.source}: cannot be evaluated ({said}); a smaller --batch needs less memory.") from None


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    from gai_yolo.reporting.output_folder import cannot_write

    try:
        yield
    except OSError as error:
        raise cannot_write(place, error) from None


def _watched(batches: Iterable[Batch]) -> Iterable[Batch]:
    """A terminal sees a bar meanwhile."""
    from rich.console import Console
    from rich.progress import track

    from gai_yolo.data.loader import EvaluationLoader

    console = Console(stderr=True)
    total = len(batches.numbers) if isinstance(batches, EvaluationLoader) else None
    return track(batches, "evaluating", total, console=console, transient=True, disable=not console.is_terminal)
