"""Networks as files for other programs: they say what the network says, or they are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gai_yolo.detector import YOLO12
from gai_yolo.detector.boxes import anchor_points
from gai_yolo.detector.postprocess import select_detections
from gai_yolo.errors import ExportError
from gai_yolo.inference import export as exporting
from gai_yolo.inference.comparison import (
    EXACT,
    HALF,
    detections_of,
    differences,
    pictures,
    selected,
    selection_differences,
    tried_shapes,
)
from gai_yolo.inference.export import ExportReport, export, publish_parts
from gai_yolo.inference.formats import LIBRARIES, SUFFIXES, Format, Layout, of_network, opened
from gai_yolo.inference.graph import Selecting, Selection, deployable
from gai_yolo.inference.trained import TrainedModel
from gai_yolo.store.filesystem import FileSystem
from tests.networks import lively, model_in

SHAPES = [(1, 64, 64), (2, 32, 96), (5, 96, 32), (32, 64, 64), (1, 160, 320)]
LOW = Selection(0.2, 0.5, 40)
ONE = Layout(1, (32, 64))
"""Quickly compared."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A network that nobody trained."""
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def without_optimizer() -> Iterator[None]:
    """Half of TorchScript's time is its optimizer's, for files that are used once; `gai-yolo export` works with it, and compares."""
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield


SLOW = pytest.mark.exhaustive
"""PyTorch's exporter takes 15 s of processor time for each ONNX graph; tests/contract/test_export_command.py always makes one."""


@pytest.fixture(scope="module", params=["torchscript", pytest.param("onnx", marks=SLOW), pytest.param("openvino", marks=SLOW)])
def files(request: pytest.FixtureRequest, model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network in each format that can be had here, for any batch and size, without and with selection."""
    format: Format = request.param
    for library in LIBRARIES[format]:
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp(format)
    path = folder / f"plain{SUFFIXES[format]}"
    report = export(model, format, path)
    selecting = folder / f"selecting{SUFFIXES[format]}"
    with_selection = export(model, format, selecting, selection=LOW)
    runs = [opened(format, one) for one in (path, selecting)]
    return {"format": format, "plain": path, "selecting": selecting, "reports": [report, with_selection], "runs": runs}


def test_a_file_says_what_the_network_says_whatever_it_is_given(files: dict[str, Any], model: TrainedModel) -> None:
    """Loss: a file that is right for the one batch and size that the export was tried with."""
    run, _ = files["runs"]
    found = list(differences(run, of_network(model.network), SHAPES, EXACT))
    assert [one.is_small for one in found] == [True] * len(SHAPES), found
    assert any(one.boxes > 0 for one in found), "nothing is rounded: it is compared with itself"
    shapes = [(one.batch, one.height, one.width) for one in files["reports"][0].differences]
    assert shapes == tried_shapes(Layout(), model.image_size) and {batch for batch, _, _ in shapes} == {1, 2, 5}


def test_a_file_selects_as_evaluation_does(files: dict[str, Any]) -> None:
    """Loss: a phone that finds other objects than the table of the training says."""
    plain, selecting = files["runs"]
    for shape in SHAPES:
        images = pictures(*shape)
        outputs = selecting(images)
        assert [one.shape for one in outputs] == [(shape[0], 40, 4), (shape[0], 40), (shape[0], 40), (shape[0],)]
        for wanted, found in zip(selected(plain(images), LOW), detections_of(outputs), strict=True):
            assert len(wanted.scores) == len(found.scores)
            assert torch.allclose(wanted.scores, found.scores, atol=1e-6), "in the same order"
        (whole,) = selection_differences(selecting, plain, [shape], LOW)
        assert whole.unequal == 0, whole
        boxes, scores, classes, counts = outputs
        for number, count in enumerate(counts):
            assert not boxes[number, count:].any() and not scores[number, count:].any() and not classes[number, count:].any()
    counts = np.concatenate([selecting(pictures(*shape))[3] for shape in SHAPES])
    assert counts.max() == 40, "more than there is room for"
    assert counts.min() < 40
    assert sum(one.detections for one in files["reports"][1].selections) > 100


@SLOW
def test_a_picture_without_objects_has_none(files: dict[str, Any], model: TrainedModel, tmp_path: Path) -> None:
    """Loss: a program that fails on the first empty scene."""
    path = tmp_path / f"strict{SUFFIXES[files['format']]}"
    export(model, files["format"], path, Layout(batch=2, sides=(32, 64)), Selection(1.0, 0.5, 3))
    boxes, scores, classes, count = opened(files["format"], path)(pictures(2, 32, 64))
    assert count.tolist() == [0, 0] and boxes.shape == (2, 3, 4) and not boxes.any() and not scores.any() and not classes.any()


def test_a_file_in_half_precision_is_half_as_large_and_nearly_as_right(files: dict[str, Any], model: TrainedModel, tmp_path: Path) -> None:
    """Loss: boxes whose coordinates were rounded to whole pixels, or fp16 in name only."""
    path = tmp_path / f"half{SUFFIXES[files['format']]}"
    report = export(model, files["format"], path, dataclasses.replace(ONE, half=True))
    assert all(one.is_small for one in report.differences) and max(one.scores for one in report.differences) > 1e-6
    weights = sum(one.numel() for one in model.network.parameters())
    assert files["reports"][0].num_bytes - report.num_bytes > weights * 1.5, "two bytes less a weight, of four"


def test_a_file_says_whose_it_is_and_nothing_of_the_machine(files: dict[str, Any], model: TrainedModel) -> None:
    """Loss: numbers without names; the folders of who exported it, published."""
    about = _about(files["format"], files["selecting"])
    assert about["class_names"] == model.class_names and about["image_size"] == 64 and about["stride"] == 32
    assert about["selection"] == dataclasses.asdict(LOW) and about["input"] == {"batch": None, "sides": None, "type": "float32"}
    assert _about(files["format"], files["plain"])["selection"] is None
    for path in (file for report in files["reports"] for file in report.files):
        content = path.read_bytes()
        assert b"site-packages" not in content and str(Path(__file__).parents[2]).encode() not in content, path


def _about(format: Format, path: Path) -> Any:
    if format == "onnx":
        import onnx

        return json.loads({one.key: one.value for one in onnx.load(path).metadata_props}["gai_yolo"])
    if format == "openvino":
        import openvino

        return json.loads(openvino.Core().read_model(path).get_rt_info(["gai_yolo"]).astype(str))
    extra = {"gai_yolo.json": ""}
    torch.jit.load(path, _extra_files=extra)
    return json.loads(extra["gai_yolo.json"])


def test_torchscript_is_not_bound_to_the_device_that_it_was_made_on(files: dict[str, Any]) -> None:
    """Loss: a file that fails on every GPU, because points are computed on the processor, where a trace was made."""
    if files["format"] != "torchscript":
        pytest.skip("other formats name no devices")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = torch.jit.trace(lambda images: anchor_points(64, 64, images.device)[0] + images, (torch.zeros(1),), check_trace=False)
    assert 'Device = prim::Constant[value="cpu"]' in str(bound.inlined_graph), "this is how it is seen"
    assert 'value="cpu"' not in str(torch.jit.load(files["selecting"]).inlined_graph)


def test_suppression_in_plain_operations_is_that_of_evaluation() -> None:
    """Loss: a box of another class that is suppressed, an order of equal scores that changes."""
    rng = np.random.default_rng(0)
    for batch, points, classes, confidence in ((3, 200, 5, 0.3), (1, 40, 1, 0.0), (2, 1, 3, 0.5), (2, 60, 4, 0.999), (2, 9, 3, 1.0)):
        corner, side = rng.uniform(-20, 100, (batch, points, 2)), rng.uniform(2, 60, (batch, points, 2))
        boxes = torch.tensor(np.concatenate((corner, corner + side), axis=2), dtype=torch.float32)
        scores = torch.tensor(rng.random((batch, points, classes)), dtype=torch.float32)
        selection = Selection(confidence, 0.4, 50)
        found = Selecting(_Given(boxes, scores), selection, 30_000)(torch.zeros(0))
        wanted = select_detections(boxes, scores, selection.confidence, selection.iou, selection.max_detections)
        for one, other in zip(wanted, detections_of([part.numpy() for part in found]), strict=True):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores) and torch.equal(one.classes, other.classes)


class _Given(torch.nn.Module):
    def __init__(self, boxes: torch.Tensor, scores: torch.Tensor) -> None:
        super().__init__()
        self.boxes, self.scores = boxes, scores

    def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.boxes, self.scores


Outputs = list[NDArray[Any]]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda boxes, scores: [boxes + 0.02, scores],
        lambda boxes, scores: [boxes, scores + 0.0002],
        lambda boxes, scores: [boxes, np.where(scores > 0.5, np.nan, scores)],
        lambda boxes, scores: [boxes[:, ::-1], scores[:, ::-1]],
        lambda boxes, scores: [boxes[:1], scores[:1]],
        lambda boxes, scores: [boxes[..., [1, 0, 3, 2]], scores],
    ],
)
def test_a_file_that_says_something_else_is_seen(wrong: Callable[[Any, Any], Outputs]) -> None:
    """Loss: a comparison that finds everything alike."""
    truth = of_network(lively())
    assert [one.is_small for one in differences(truth, truth, [(2, 64, 64)], EXACT)] == [True]
    found = list(differences(lambda images: wrong(*truth(images)), truth, [(2, 64, 64)], EXACT))
    assert [one.is_small for one in found] == [False], found


def test_a_file_may_be_as_far_off_as_rounding_explains_and_no_further() -> None:
    """Loss: a large network that cannot be exported since float32 itself is not that exact; a wrong file that passes for a rounded one."""
    truth, shapes = of_network(lively()), [(2, 64, 64)]

    def shifted(boxes: float, scores: float) -> Callable[[NDArray[np.float32]], Outputs]:
        return lambda images: [one + by for one, by in zip(truth(images), (boxes, scores), strict=True)]

    def small(by: tuple[float, float], rounding: tuple[float, float]) -> list[bool]:
        (found,) = differences(shifted(*by), truth, shapes, EXACT, shifted(*rounding))
        assert found.rounding is not None and found.rounding.boxes == pytest.approx(rounding[0], abs=1e-4)
        return [found.is_small]

    assert small((0.03, 0.0003), (0.01, 0.0001)) == [True]
    assert small((0.05, 0.0003), (0.01, 0.0001)) == small((0.03, 0.0005), (0.01, 0.0001)) == [False]
    assert small((1.2, 0.01), (1.0, 0.01)) == [True]
    assert small((1.5, 0.01), (1.0, 0.01)) == small((1.2, 0.03), (1.0, 0.01)) == [False], "more than fp16 may"
    (found,) = differences(truth, truth, shapes, EXACT, lambda _: pytest.fail("nobody has to ask"))
    assert found.is_small and found.rounding is None


@pytest.mark.exhaustive
def test_a_large_network_that_learned_nothing_is_exported_and_a_sabotaged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: the first look at a large network's file, refused because of digits that PyTorch does not have either; or a bug let through."""
    model = TrainedModel(lively("l", 4), tmp_path / "l", ["a", "b", "c", "d"], None, {}, None)
    report = export(model, "torchscript", tmp_path / "a.torchscript", Layout(1, (192, 320)))
    assert all(one.is_small for one in report.differences)

    def otherwise(network: YOLO12, half: bool) -> YOLO12:
        made = deployable(network, half)
        made.model[6].m[0][0].attn.areas = 1  # type: ignore[index, union-attr]
        return made

    monkeypatch.setattr(exporting, "deployable", otherwise)
    with pytest.raises(ExportError, match=r"nothing was written.*or 4 times what PyTorch itself is off in float32"):
        export(model, "torchscript", tmp_path / "b.torchscript", Layout(1, (192, 320)))
    assert not (tmp_path / "b.torchscript").exists()


def test_a_network_that_sees_nothing_does_not_agree_with_everything() -> None:
    """Loss: a new network's file that answers 0 to all pictures, taken for right since all scores are small."""
    torch.manual_seed(0)
    truth = of_network(YOLO12("debug", 80).eval())
    assert truth(pictures(1, 64, 64))[1].max() < 1e-2
    for tolerance in (EXACT, HALF):
        found = list(differences(lambda images: [truth(images)[0], 0 * truth(images)[1]], truth, [(1, 64, 64)], tolerance))
        assert [one.is_small for one in found] == [False], found


def test_a_selection_with_another_threshold_is_seen() -> None:
    """Loss: thresholds that never reached the file."""
    plain = of_network(lively())

    def selecting(selection: Selection) -> Callable[[NDArray[np.float32]], Outputs]:
        return lambda images: [one.numpy() for one in Selecting(_Given(*map(torch.from_numpy, plain(images))), selection, 30_000)(0)]

    def unequal(selection: Selection) -> list[bool]:
        return [one.is_small for one in selection_differences(selecting(selection), plain, [(2, 64, 64)], LOW)]

    assert unequal(LOW) == [True]
    for change in ({"confidence": 0.3}, {"iou": 0.8}, {"max_detections": 2}):
        assert unequal(dataclasses.replace(LOW, **change)) == [False], change


def test_a_file_that_differs_gets_no_name(model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a wrong file under the name of the right one, which it has replaced."""

    def otherwise(network: YOLO12, half: bool) -> YOLO12:
        made = deployable(network, half)
        made.model[0].conv.weight[0, 0, 0, 0] += 0.1  # type: ignore[union-attr, index, operator]
        return made

    old = tmp_path / "a.torchscript"
    old.write_bytes(b"the last one")
    monkeypatch.setattr(exporting, "deployable", otherwise)
    with pytest.raises(ExportError, match=r"nothing was written; on 1 images of 32 x 64 the file's boxes differ") as refusal:
        export(model, "torchscript", old, ONE, overwrite=True)
    assert refusal.value.exit_code == 2
    assert old.read_bytes() == b"the last one" and list(tmp_path.iterdir()) == [old]


def test_names_that_are_taken_or_misleading_are_refused(model: TrainedModel, tmp_path: Path) -> None:
    """Loss: somebody's file."""
    (tmp_path / "a.torchscript").write_text("mine")
    (tmp_path / "b.torchscript").mkdir()
    (tmp_path / "l.torchscript").symlink_to(tmp_path / "later")
    taken = "is there already"
    for name, says in (
        ("a.torchscript", taken),
        ("l.torchscript", taken),
        ("b.torchscript", "is a folder"),
        ("c.onnx", "ends with .torchscript"),
    ):
        with pytest.raises(ExportError, match=says):
            export(model, "torchscript", tmp_path / name)
    assert (tmp_path / "a.torchscript").read_text() == "mine"
    report: ExportReport = export(model, "torchscript", tmp_path / "a.torchscript", ONE, overwrite=True)
    assert report.num_bytes == (tmp_path / "a.torchscript").stat().st_size > 100_000
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("fails", "left"), [(2, ["old", "old"]), (3, ["old", "old"]), (4, ["new", "old"]), (5, ["new", "new"])])
def test_two_files_that_belong_together_are_never_both_lost(fails: int, left: list[str], tmp_path: Path) -> None:
    """Loss: neither the old network nor the new one, after a full disk or a kill at the wrong moment."""
    made, target = tmp_path / "made.xml", tmp_path / "a.xml"
    for path, text in ((made, "new"), (target, "old")):
        for part in (path.with_suffix(".bin"), path):
            part.write_text(text)
    disk = _FailingDisk(fails)
    with contextlib.suppress(OSError):
        assert publish_parts(made, target, disk) == (target, target.with_suffix(".bin"))
    assert disk.left <= 1, "it was tried so far"
    assert [part.read_text() for part in (target.with_suffix(".bin"), target)] == left
    assert {one.name for one in tmp_path.iterdir()} == {"made.xml", "made.bin", "a.xml", "a.bin"}, "no drafts"


class _FailingDisk(FileSystem):
    """Does so many creations and renames."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "full")

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)


def test_a_missing_library_is_named_with_what_installs_it(model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a traceback of an import, and a search for the package's name."""
    monkeypatch.setitem(LIBRARIES, "onnx", ("no_such_library_here",))
    with pytest.raises(
        ExportError, match=r'onnx needs what is not installed here \(no_such_library_here\); pip install "gai-yolo\[onnx\]"'
    ):
        export(model, "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
