"""`gai-yolo benchmark`: how fast a network is in each format, and how good."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gai_yolo.cli.export import FORMAT_NAMES, add_source, batch_of, shown, sides_of
from gai_yolo.errors import ExportError

if TYPE_CHECKING:
    from gai_yolo.inference.benchmark import BenchmarkReport, Timing

BENCHMARK_EXAMPLES = """examples:
  gai-yolo benchmark experiments/bccd                                 # all formats that are installed here, one image at a time
  gai-yolo benchmark experiments/bccd --formats pytorch onnx --size 320 --batch 8
  gai-yolo benchmark experiments/bccd --data /data/bccd --json        # with mAP
Each format is exported for this batch and size, compared with PyTorch as `gai-yolo export` does, and timed on the CPU, by turns.
OMP_NUM_THREADS says how many threads each may have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = BENCHMARK_EXAMPLES
    add_source(parser)
    names = ("pytorch", "pytorch-bf16", *FORMAT_NAMES)
    parser.add_argument("--formats", nargs="+", choices=names, default=list(names), metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--batch", default="1", metavar="N", help="images at a time; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="calls of each; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def benchmark(given: argparse.Namespace) -> int:
    """Print the figures; returns the exit code. Raises `Refusal`."""
    # Loads torch, which the other commands do without.
    from gai_yolo.inference.benchmark import benchmark as measure
    from gai_yolo.inference.formats import Layout
    from gai_yolo.inference.trained import load_trained

    if given.rounds < 1:
        raise ExportError(f"--rounds {given.rounds}: give a number from 1 on.")
    layout = Layout(batch_of(given.batch), sides_of(given), given.half)
    model = load_trained(given.source, given.checkpoint)
    contenders = list(dict.fromkeys(given.formats))
    report = measure(model, contenders, layout, given.rounds, given.data, shown, lambda text: print(f"{text} ...", file=sys.stderr))
    if given.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        _show(report)
    return 0


def _show(report: BenchmarkReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "title_justify": "left"}
    title = f"{report.batch} x {report.height} x {report.width}, CPU, threads: {report.threads}, rounds: {report.rounds}"
    with_precision = any(one.precision is not None for one in report.timings)
    more = ("mAP50-95", "mAP50") if with_precision else ()
    table = Table("format", "ms, median", "half of calls", "images/s", "MB", "scores differ by", *more, title=title, **style)
    for one in report.timings:
        table.add_row(*_cells(one), *(f"{(one.precision or {})[name]:.4f}" for name in more))
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(table)
    for name, remedy in report.absent.items():
        print(f"{name}: not installed here; {remedy}")


def _cells(one: Timing) -> tuple[str, ...]:
    size = "" if one.num_bytes is None else f"{one.num_bytes / 1e6:.1f}"
    low, high = one.quartiles
    return (
        one.name,
        f"{one.milliseconds:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{one.images_per_second:.1f}",
        size,
        f"{one.score_difference:.2g}",
    )
