"""A trained network as a file for other programs: written, run by the program that it is for, compared, and only then given its name."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gai_yolo import __version__
from gai_yolo.detector.boxes import STRIDES
from gai_yolo.detector.postprocess import Detections
from gai_yolo.errors import ExportError
from gai_yolo.inference.comparison import (
    EXACT,
    HALF,
    ROUNDINGS,
    Difference,
    SelectionDifference,
    confidence_for,
    detections_of,
    differences,
    selected,
    selection_differences,
    tried_shapes,
)
from gai_yolo.inference.formats import SUFFIXES, Format, Layout, Run, Write, must_be_there, of_network, opened, prepared
from gai_yolo.inference.graph import Selection, deployable, in_float64
from gai_yolo.inference.precision import Examined, Watched, average_precision, examined
from gai_yolo.inference.trained import TrainedModel
from gai_yolo.sections import EvaluationConfig
from gai_yolo.store.atomic import write_temp_file
from gai_yolo.store.filesystem import REAL, FileSystem


@dataclass(frozen=True, eq=False)
class ExportReport:
    """What was written, and how far it says what the network says."""

    path: Path
    files: tuple[Path, ...]
    """With `path` all that belong to it; they go together."""
    num_bytes: int
    differences: list[Difference]
    selections: list[SelectionDifference]
    """Empty for a file without selection."""
    precision: dict[str, tuple[float, float]] | None
    """COCO's numbers of PyTorch and of the file, on the same images; None if no data set was given."""


def export(
    model: TrainedModel,
    format: Format,
    path: Path,
    layout: Layout | None = None,
    selection: Selection | None = None,
    data: Path | None = None,
    overwrite: bool = False,
    watched: Watched = iter,
) -> ExportReport:
    """Write a network for a program that knows nothing of this one.

    The file takes `images` `(B, 3, H, W)`, RGB in 0..1, and returns boxes and scores as `graph.Predicting`, or detections as
    `graph.Selecting`. It is compared with PyTorch before it gets its name; until then, and if it differs, nothing is there.

    Args:
        path: ends with the format's suffix in `SUFFIXES`. OpenVINO's has a second file beside it, `.bin`.
        layout: None for any number of images, of any size, in float32.
        selection: non-maximum suppression inside of the file; None for none.
        data: a data set, as `data.path`, on whose validation images both are measured too.
        watched: hands on the batches of these, and sees when each is done.

    Raises:
        ExportError: a library is missing, the name is taken or not the format's, or the file says something else than the network.
        DataError: the data set is not there, or that of other classes.
        OSError: the disk refuses.
    """
    layout = layout or Layout()
    must_be_there(format)
    must_be_free(path, format, overwrite)
    on = None if data is None else examined(model, data, layout)
    with _telling(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # before anybody waits for what cannot be written there
    write = prepared(format, deployable(model.network, layout.half), layout)
    with tempfile.TemporaryDirectory(prefix="gai-yolo-export-") as folder:
        trial = _Trial(model, format, layout, write, Path(folder))
        made, compared, selections = trial.made(selection)
        precision = None if on is None else _precision(model, opened(format, made), selection, on, watched)
        must_be_free(path, format, overwrite)
        with _telling(path):
            files = publish_parts(made, path)
    return ExportReport(path, files, sum(one.stat().st_size for one in files), compared, selections, precision)


def must_be_free(path: Path, format: Format, overwrite: bool) -> None:
    """Raises `ExportError` if a file cannot have this name."""
    if path.suffix != SUFFIXES[format]:
        raise ExportError(f"{path}: give it a name that ends with {SUFFIXES[format]}, by which programs know the format.")
    for one in _parts(path):
        if one.is_dir():
            raise ExportError(f"{one}: is a folder; give the file another --output.")
        if (one.exists() or one.is_symlink()) and not overwrite:
            raise ExportError(f"{one}: is there already; give another --output, or --overwrite.")


@dataclass(frozen=True, eq=False)
class _Trial:
    """Files of a network, in a folder where nobody looks for them."""

    model: TrainedModel
    format: Format
    layout: Layout
    write: Write
    folder: Path

    def made(self, selection: Selection | None) -> tuple[Path, list[Difference], list[SelectionDifference]]:
        """A file that was compared. Raises `ExportError` if it differs."""
        shapes, tolerance = tried_shapes(self.layout, self.model.image_size), HALF if self.layout.half else EXACT
        path, run = self._file("plain", None)
        precise = None if self.layout.half else self._precise
        compared = list(differences(run, of_network(self.model.network), shapes, tolerance, precise))
        for one in compared:
            if not one.is_small:
                raise ExportError(
                    f"{self.format}: nothing was written; on {one.batch} images of {one.height} x {one.width} the file's boxes differ from "
                    f"PyTorch's by {one.boxes:.3g} pixels and its scores by {one.scores:.3g} (allowed: {tolerance.boxes:g} of the longer "
                    f"side, and {tolerance.scores:g} or {tolerance.of_highest:g} of the highest score{_rounded(one)})."
                )
        if selection is None:
            return path, compared, []
        path, with_own = self._file("selecting", selection)
        # What the file itself lets through may be nothing.
        lower = Selection(confidence_for(run, shapes), selection.iou, selection.max_detections)
        tried = [(with_own, selection), (self._file("trial", lower)[1], lower)]
        selections = [one for of_file, what in tried for one in selection_differences(of_file, run, shapes, what)]
        for found in selections:
            if not found.is_small:
                raise ExportError(
                    f"{self.format}: nothing was written; on {found.batch} images of {found.height} x {found.width} the file's detections "
                    f"differ from PyTorch's in {found.unequal} of {found.detections}, at a confidence of {found.confidence:.3g}."
                )
        return path, compared, selections

    def _precise(self, images: NDArray[np.float32]) -> list[NDArray[Any]]:
        # Made anew for each of the few batches that ask for it, so that it takes no memory where none does.
        return of_network(in_float64(self.model.network))(images)

    def _file(self, name: str, selection: Selection | None) -> tuple[Path, Run]:
        path = self.folder / f"{name}{SUFFIXES[self.format]}"
        with _telling(self.folder):
            self.write(path, selection, about(self.model, self.layout, selection))
        return path, opened(self.format, path)


def _rounded(one: Difference) -> str:
    if one.rounding is None:
        return ""
    own = f"{one.rounding.boxes:.3g} pixels and {one.rounding.scores:.3g}"
    return f"; or {ROUNDINGS} times what PyTorch itself is off in float32, here {own}, within what fp16 is allowed"


def about(model: TrainedModel, layout: Layout, selection: Selection | None) -> dict[str, Any]:
    """What a file says about itself: plain data, under `METADATA` or where the format has a place for it."""
    return {
        "program": "gai-yolo",
        "version": __version__,
        "size": model.network.size,
        "class_names": model.class_names,
        "image_size": model.image_size,
        "stride": max(STRIDES),
        "input": {"batch": layout.batch, "sides": layout.sides, "type": "float16" if layout.half else "float32"},
        "selection": None if selection is None else asdict(selection),
        "origin": None if model.origin is None else asdict(model.origin),
        "position": json.loads(json.dumps(model.position, default=str)),
        "config": None if model.config is None else model.config.dump(),
    }


@contextlib.contextmanager
def _telling(place: Path) -> Iterator[None]:
    """What the disk refuses is told with the name of what was asked for: drafts have names that nobody knows, and a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(place)) from error


def _precision(
    model: TrainedModel, run: Run, selection: Selection | None, on: Examined, watched: Watched
) -> dict[str, tuple[float, float]]:
    same = selection or evaluated(model)

    def select(outputs: Sequence[Any]) -> list[Detections]:
        return selected(outputs, same)

    ours = average_precision(of_network(model.network), select, on, watched)
    theirs = average_precision(run, select if selection is None else detections_of, on, watched)
    return {name: (value, theirs[name]) for name, value in ours.items()}


def evaluated(model: TrainedModel) -> Selection:
    """The thresholds that its training evaluates with."""
    config = model.config.evaluation if model.config is not None else EvaluationConfig()
    return Selection(config.confidence, config.iou, config.max_detections)


def _parts(path: Path) -> tuple[Path, ...]:
    return (path.with_suffix(".bin"), path) if path.suffix == SUFFIXES["openvino"] else (path,)


def publish_parts(made: Path, path: Path, fs: FileSystem = REAL) -> tuple[Path, ...]:
    """Give the file that was made, and what belongs to it, their names; returns these, `path` first.

    All parts are written and synced before the first gets its name: a full disk or a kill leaves what was there. Of two the one that is
    opened comes last. Killed between both renames, the old `.xml` stands beside the new `.bin` (`docs/export.md`).
    """
    targets = _parts(path)
    with contextlib.ExitStack() as drafts:
        temps = []
        for source, target in zip(_parts(made), targets, strict=True):
            file = drafts.enter_context(source.open("rb"))
            temps.append(drafts.enter_context(write_temp_file(target, lambda to, file=file: shutil.copyfileobj(file, to), fs=fs)))  # type: ignore[misc]
        for temp, target in zip(temps, targets, strict=True):
            fs.rename(temp.path, target)
    fs.sync_folder(path.parent)
    return targets[::-1]
