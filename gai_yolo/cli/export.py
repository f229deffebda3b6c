"""`gai-yolo export`: a trained network for programs that know nothing of this one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gai_yolo.errors import ExportError

if TYPE_CHECKING:
    from gai_yolo.inference.export import ExportReport
    from gai_yolo.inference.formats import Format, Layout
    from gai_yolo.inference.graph import Selection

FORMAT_NAMES = ("onnx", "torchscript", "openvino")
SIDE_STEP = 32
"""Image sides are multiples of it."""
EXPORT_EXAMPLES = """examples:
  gai-yolo export experiments/bccd                                    # ONNX, any batch and size: experiments/bccd/exports/epoch_060.onnx
  gai-yolo export experiments/bccd --nms --confidence 0.3             # detections, not boxes and scores of all points
  gai-yolo export experiments/bccd --size 320 --batch 1 --data /data/bccd    # one size; mAP of PyTorch and of the file
  gai-yolo export yolo12n.safetensors --format torchscript --half --output yolo12n-fp16.torchscript
What a file takes and returns, and how to use it without this program: docs/export.md.
onnx and openvino need libraries: pip install "gai-yolo[onnx]", "gai-yolo[openvino]"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXPORT_EXAMPLES
    add_source(parser)
    parser.add_argument("--format", choices=FORMAT_NAMES, default="onnx", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/exports/CHECKPOINT.SUFFIX, or FILE with another suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    parser.add_argument("--batch", default="dynamic", metavar="dynamic|N", help="images at a time; any number by default")
    parser.add_argument("--nms", action="store_true", help="non-maximum suppression inside of the file, with the three values below")
    parser.add_argument("--confidence", type=float, metavar="C", help="with --nms: scores above it count; default: 0.25")
    parser.add_argument("--iou", type=float, metavar="I", help="with --nms: boxes of a class that overlap more are one; default: 0.7")
    parser.add_argument("--max-detections", type=int, metavar="N", help="with --nms: rows of the outputs; default: 300")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX; default: 18")


def add_source(parser: argparse.ArgumentParser) -> None:
    """What `export` and `benchmark` have in common."""
    parser.add_argument("source", type=Path, metavar="RUN_FOLDER|FILE", help="a run, or a file of weights")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|NAME", help="of a run; the best by default")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="of the input, N or HEIGHT WIDTH, multiples of 32")
    parser.add_argument("--half", action="store_true", help="files compute in fp16, and take images in it")
    parser.add_argument("--data", type=Path, metavar="PATH", help="a data set as data.path: mAP on its validation images, too")


def export(given: argparse.Namespace) -> int:
    """Write the file; returns the exit code. Raises `Refusal`."""
    # Loads torch, which the other commands do without.
    from gai_yolo.inference.export import export as write
    from gai_yolo.inference.export import must_be_free
    from gai_yolo.inference.formats import SUFFIXES, must_be_there
    from gai_yolo.inference.trained import load_trained

    format: Format = given.format
    layout, selection = _layout(given), _selection(given)
    must_be_there(format)
    model = load_trained(given.source, given.checkpoint)
    output = given.output
    if output is None:
        folder = given.source / "exports" if given.source.is_dir() else given.source.parent
        output = folder / f"{model.path.stem}{SUFFIXES[format]}"
    must_be_free(output, format, given.overwrite)
    report = write(model, format, output, layout, selection, given.data, given.overwrite, watched=shown)
    _show(report)
    if format == "torchscript":
        print("note: PyTorch calls TorchScript deprecated; where you can choose, take onnx")
    if model.origin is not None and model.origin.note:
        print(f"note: {model.origin.note}")
    return 0


def sides_of(given: argparse.Namespace) -> tuple[int, int] | None:
    """Height and width, or None. Raises `ExportError` if there can be no such input."""
    if given.size is None:
        return None
    if len(given.size) > 2 or any(side < SIDE_STEP or side % SIDE_STEP for side in given.size):
        raise ExportError(f"--size {' '.join(map(str, given.size))}: give one or two multiples of {SIDE_STEP}, such as 640, or 384 640.")
    return given.size[0], given.size[-1]


def batch_of(said: str) -> int:
    """A number of images. Raises `ExportError`."""
    if not said.isdecimal() or int(said) < 1:
        raise ExportError(f"--batch {said}: give a number from 1 on.")
    return int(said)


def _layout(given: argparse.Namespace) -> Layout:
    from gai_yolo.inference.formats import Layout
    from gai_yolo.inference.onnx_file import LATEST_OPSET, OLDEST_OPSET

    opset = OLDEST_OPSET if given.opset is None else given.opset
    if given.opset is not None and given.format == "torchscript":
        raise ExportError("--opset: is ONNX's; leave it out with --format torchscript.")
    if not OLDEST_OPSET <= opset <= LATEST_OPSET:
        raise ExportError(f"--opset {opset}: files are written in {OLDEST_OPSET} to {LATEST_OPSET}.")
    return Layout(None if given.batch == "dynamic" else batch_of(given.batch), sides_of(given), given.half, opset)


def _selection(given: argparse.Namespace) -> Selection | None:
    from gai_yolo.inference.graph import Selection

    said = {name: getattr(given, name) for name in ("confidence", "iou", "max_detections") if getattr(given, name) is not None}
    if not given.nms:
        if said:
            raise ExportError(f"--{next(iter(said)).replace('_', '-')}: is of non-maximum suppression inside of the file; add --nms.")
        return None
    for name in ("confidence", "iou"):
        if name in said and not 0 <= said[name] <= 1:
            raise ExportError(f"--{name} {said[name]:g}: give a number from 0 to 1.")
    if said.get("max_detections", 1) < 1:
        raise ExportError(f"--max-detections {said['max_detections']}: give a number from 1 on.")
    return Selection(**said)


def shown(batches):  # type: ignore[no-untyped-def]
    """Show on a terminal how many batches of a data set are done."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, "measuring", total=len(batches.numbers), console=console, disable=not console.is_terminal, transient=True)


def _show(report: ExportReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "title_justify": "left"}
    print(f"{', '.join(map(str, report.files))}: {report.num_bytes / 1e6:.1f} MB")
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    rounded = any(one.rounding is not None for one in report.differences)
    more = ("float32's own, boxes", "scores") if rounded else ()
    table = Table("images", "height x width", "boxes, pixels", "scores", *more, title="largest difference from PyTorch", **style)
    for one in report.differences:
        own = () if one.rounding is None else (f"{one.rounding.boxes:.2g}", f"{one.rounding.scores:.2g}")
        table.add_row(str(one.batch), f"{one.height} x {one.width}", f"{one.boxes:.2g}", f"{one.scores:.2g}", *own)
    console.print(table)
    if rounded:
        print(
            "note: this network magnifies the last digits of float32, in PyTorch too (float32's own: its distance from float64); the file "
            "differs more than others may, and not more than that explains"
        )
    if report.selections:
        table = Table("images", "height x width", "confidence", "detections", "unequal", title="detections, and how many differ", **style)
        for found in report.selections:
            size, level = f"{found.height} x {found.width}", f"{found.confidence:.3g}"
            table.add_row(str(found.batch), size, level, str(found.detections), str(found.unequal))
        console.print(table)
    if report.precision is not None:
        table = Table("COCO", "PyTorch", "file", "difference", title="on the validation images", **style)
        for name, (ours, theirs) in report.precision.items():
            table.add_row(name, f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}")
        console.print(table)
