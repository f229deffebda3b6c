"""How fast a network is in each format, and how good."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gai_yolo.inference.comparison import pictures, selected
from gai_yolo.inference.export import evaluated, export
from gai_yolo.inference.formats import SUFFIXES, Format, Layout, Run, missing, of_network, opened
from gai_yolo.inference.precision import Watched, average_precision, examined
from gai_yolo.inference.trained import TrainedModel

Contender = str
"""`pytorch`, `pytorch-bf16`, or a `Format`."""
CONTENDERS: tuple[Contender, ...] = ("pytorch", "pytorch-bf16", *SUFFIXES)
WARM_UP = 3
"""Calls that are not counted: programs choose kernels and take memory in the first ones."""


@dataclass(frozen=True)
class Timing:
    """One way to run a network."""

    name: Contender
    milliseconds: float
    """Of one call, the median."""
    quartiles: tuple[float, float]
    """Between which half of the calls lie."""
    images_per_second: float
    score_difference: float
    """From PyTorch in float32, the largest; of values in 0..1."""
    num_bytes: int | None
    """Of the file; None for PyTorch itself."""
    precision: dict[str, float] | None
    """COCO's numbers; None if no data set was given."""


@dataclass(frozen=True)
class BenchmarkReport:
    """All ways that were tried."""

    timings: list[Timing]
    absent: dict[Contender, str]
    """Those whose libraries are missing, and what installs them."""
    batch: int
    height: int
    width: int
    rounds: int
    threads: int


def benchmark(
    model: TrainedModel,
    contenders: Sequence[Contender] = CONTENDERS,
    layout: Layout | None = None,
    rounds: int = 20,
    data: Path | None = None,
    watched: Watched = iter,
    told: Callable[[str], object] = lambda _: None,
) -> BenchmarkReport:
    """Time a network's formats on the CPU, by turns: what disturbs the machine meanwhile disturbs all of them.

    Args:
        contenders: of `CONTENDERS`.
        layout: of the files; its batch and sides are what is timed, one image and the size of training by default.
        rounds: calls of each.
        data: a data set, as `data.path`, on whose validation images each is measured.
        watched: hands on the batches of these, and sees when each is done.
        told: is called with the name of what is made or measured next.

    Raises:
        ExportError: a file says something else than the network.
        DataError: as `examined`.
    """
    given = layout or Layout()
    height, width = given.sides or (model.image_size, model.image_size)
    layout = Layout(given.batch or 1, (height, width), given.half, given.opset)
    on = None if data is None else examined(model, data, layout)
    images = pictures(layout.batch or 1, height, width)
    absent: dict[Contender, str] = {name: f'pip install "gai-yolo[{name}]"' for name in contenders if name in SUFFIXES and missing(name)}
    with tempfile.TemporaryDirectory(prefix="gai-yolo-benchmark-") as folder:
        runs: dict[Contender, tuple[Run, int | None]] = {}
        for name in contenders:
            if name not in absent:
                told(f"making {name}")
                runs[name] = _contender(model, name, layout, Path(folder))
        told("timing")
        seconds = _timed({name: run for name, (run, _) in runs.items()}, images, rounds)
        truth = of_network(model.network)(images)[1]
        timings = []
        for name, (run, num_bytes) in runs.items():
            difference = float(np.abs(run(images)[1].astype(np.float32) - truth).max())
            precision = None
            if on is not None:
                told(f"measuring {name}")
                precision = average_precision(run, lambda outputs: selected(outputs, evaluated(model)), on, watched)
            median = statistics.median(seconds[name])
            low, high = (float(one) * 1000 for one in np.percentile(seconds[name], (25, 75)))
            timings.append(Timing(name, median * 1000, (low, high), len(images) / median, difference, num_bytes, precision))
    return BenchmarkReport(timings, absent, len(images), height, width, rounds, torch.get_num_threads())


def _contender(model: TrainedModel, name: Contender, layout: Layout, folder: Path) -> tuple[Run, int | None]:
    if name == "pytorch":
        return of_network(model.network), None
    if name == "pytorch-bf16":
        return of_network(model.network, torch.bfloat16), None
    format: Format = name  # type: ignore[assignment]
    report = export(model, format, folder / f"network-{format}{SUFFIXES[format]}", layout)
    return opened(format, report.path), report.num_bytes


def _timed(runs: dict[Contender, Run], images: NDArray[np.float32], rounds: int) -> dict[Contender, list[float]]:
    seconds: dict[Contender, list[float]] = {name: [] for name in runs}
    for number in range(WARM_UP + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds
