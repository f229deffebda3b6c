"""`gai-yolo export` and `gai-yolo benchmark`, and the example of docs/export.md, which uses a file without this program."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gai_yolo.cli.main import main
from gai_yolo.data.dataset import EvaluationSet
from gai_yolo.data.images import GREY
from gai_yolo.data.order import Key
from gai_yolo.detector.postprocess import Detections, select_detections, to_file_pixels
from gai_yolo.detector.weights import Origin
from gai_yolo.inference.export import export
from gai_yolo.inference.formats import LIBRARIES, Layout
from gai_yolo.inference.graph import Selection
from gai_yolo.inference.precision import average_precision, examined
from gai_yolo.inference.trained import load_trained
from tests.harness import REPOSITORY
from tests.networks import model_in, weight_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A file as `weights export` makes it, of a training on `shapes`, that began with weights of others."""
    config = {"data": {"image_size": 64, "cache_folder": str(cache)}, "evaluation": {"confidence": 0.05}}
    return weight_file(tmp_path_factory.mktemp("weights") / "mine.safetensors", config, Origin("yolo12n.pt", "0" * 64, "AGPL-3.0"))


def test_a_network_is_exported_beside_its_weights_and_measured(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: a file of which nobody knows whether it is as good as the network, or whose licence is forgotten."""
    assert main(["export", str(weights), "--format", "torchscript", "--data", "shapes"]) == 0
    said = capfd.readouterr()
    assert said.err == "", "no warnings of libraries"
    path = weights.with_suffix(".torchscript")
    assert f"{path}: 0." in said.out and path.is_file()
    (row,) = (line.split() for line in said.out.splitlines() if "mAP50-95" in line)
    assert row[1] == row[2] and row[3] in ("+0.0000", "-0.0000")
    assert "note: who published yolo12n.pt claims AGPL-3.0 for it" in said.out and "TorchScript deprecated" in said.out
    assert main(["export", str(weights), "--format", "torchscript"]) == 2
    assert "is there already; give another --output, or --overwrite" in capfd.readouterr().err


def test_formats_are_timed_and_measured(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: figures that compare a network with another one, or of a format that was never run."""
    words = ["benchmark", str(weights), "--formats", "pytorch", "torchscript", "--rounds", "2", "--size", "64", "--batch", "5"]
    assert main([*words, "--data", "shapes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, theirs = report["timings"]
    assert (ours["name"], theirs["name"]) == ("pytorch", "torchscript") and report["batch"] == 5 and report["absent"] == {}
    for one in (ours, theirs):
        assert 0 < one["quartiles"][0] <= one["milliseconds"] <= one["quartiles"][1]
        assert one["images_per_second"] == pytest.approx(5000 / one["milliseconds"])
    assert ours["score_difference"] == 0 and 0 <= theirs["score_difference"] < 1e-4 and theirs["num_bytes"] > 100_000
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-3) and len(ours["precision"]) == 12
    assert main(words) == 0
    assert "half of calls" in (said := capsys.readouterr().out) and "torchscript" in said


@pytest.mark.parametrize("batch", [None, 5])
def test_a_file_that_finds_everything_has_a_precision_of_one(batch: int | None, weights: Path) -> None:
    """Loss: boxes that are brought back into the picture wrongly, pictures that are mixed up, in the number that decides."""
    layout = Layout(batch, (64, 64))
    on = examined(load_trained(weights), Path("shapes"), layout)
    truths, seen = iter(EvaluationSet(on.images)[Key(0, position)] for position in range(len(on.index))), list[int]()

    def detect(outputs: Sequence[NDArray[Any]]) -> list[Detections]:
        seen.append(len(outputs[0]))
        samples = [item.sample for item in itertools.islice(truths, seen[-1])]
        found = [Detections(torch.from_numpy(one.boxes), torch.ones(len(one.boxes)), torch.from_numpy(one.classes)) for one in samples]
        return found + [found[0]] * (seen[-1] - len(found))

    numbers = average_precision(lambda images: [images], detect, on)
    assert numbers["mAP50-95"] > 0.99 and sum(seen) == (15 if batch else len(on.index)) == (15 if batch else 13)


def test_formats_that_are_not_installed_are_listed(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: a comparison from which a format is missing without a word."""
    monkeypatch.setitem(LIBRARIES, "openvino", ("no_such_library_here",))
    assert main(["benchmark", str(weights), "--formats", "pytorch", "openvino", "--rounds", "1"]) == 0
    assert 'openvino: not installed here; pip install "gai-yolo[openvino]"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "/nowhere"], "/nowhere: cannot be read"),
        (["export", "FILE", "--size", "100"], "--size 100: give one or two multiples of 32"),
        (["export", "FILE", "--size", "64", "64", "64"], "--size 64 64 64"),
        (["export", "FILE", "--batch", "all"], "--batch all: give a number from 1 on"),
        (["export", "FILE", "--confidence", "0.5"], "--confidence: is of non-maximum suppression inside of the file; add --nms"),
        (["export", "FILE", "--nms", "--iou", "70"], "--iou 70: give a number from 0 to 1"),
        (["export", "FILE", "--nms", "--confidence", "nan"], "--confidence nan"),
        (["export", "FILE", "--nms", "--max-detections", "0"], "--max-detections 0"),
        (["export", "FILE", "--opset", "18"], "--opset: is ONNX's"),
        (["export", "FILE", "--output", "a.pt"], "ends with .torchscript"),
        (["export", "FILE", "--data", "/nowhere"], "there is no such folder or file"),
        (["export", "FILE", "--size", "64", "96", "--data", "shapes"], "the input is 64 x 96; leave --data out"),
        (["export", "FILE", "--output", "/proc/a.torchscript"], "/proc"),
        (["benchmark", "FILE", "--rounds", "0"], "--rounds 0"),
        (["benchmark", "FILE", "--batch", "dynamic"], "--batch dynamic"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    words: list[str], says: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a traceback, or minutes of work before it."""
    file = weight_file(tmp_path / "mine.safetensors", {"data": {"image_size": 64, "cache_folder": str(cache)}})
    given = [str(file) if word == "FILE" else word for word in words]
    assert main([*given, *(["--format", "torchscript"] if words[0] == "export" else [])]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and says in errors, errors
    assert list(tmp_path.iterdir()) == [file]


def test_data_of_other_classes_is_refused(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an mAP of 0, and the search for its reason in the file."""
    model = model_in(tmp_path, {"data": {"image_size": 64, "cache_folder": str(cache)}})
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [circle, star, square, triangle]\n")
    assert main(["export", str(model.path), "--format", "torchscript", "--data", str(tmp_path / "data.yaml")]) == 2
    assert "its classes are not those of" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.torchscript"))


def test_the_example_of_the_documents_finds_what_this_program_finds(tmp_path: Path) -> None:
    """Loss: an example that does not run, or that looks at pictures otherwise than training did."""
    for library in LIBRARIES["onnx"]:
        pytest.importorskip(library)
    model, selection = model_in(tmp_path), Selection(0.3, 0.5, 20)
    export(model, "onnx", tmp_path / "network.onnx", selection=selection)
    rng = np.random.default_rng(1)
    picture = cv2.GaussianBlur(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8), (0, 0), 3)
    cv2.imwrite(str(tmp_path / "picture.png"), picture[..., ::-1])
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "export.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    found = [line.split() for line in done.stdout.splitlines()]
    square = np.full((64, 64, 3), GREY, np.uint8)
    square[8:56] = cv2.resize(picture, (64, 48), interpolation=cv2.INTER_AREA)
    images = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        boxes, scores = model.network(images)
    (wanted,) = select_detections(boxes, scores, selection.confidence, selection.iou, selection.max_detections)
    assert len(found) == len(wanted.scores) > 0
    assert [row[0] for row in found] == [model.class_names[label] for label in wanted.classes]
    values = torch.tensor([[float(value) for value in row[1:]] for row in found])
    assert torch.allclose(values[:, 0], wanted.scores, atol=1e-4)
    expected = to_file_pixels(wanted.boxes, torch.tensor([0.5, 0.0, 8.0]), 128, 96)
    inside = torch.minimum(values[:, 1:].clamp(min=0), torch.tensor([128.0, 96.0, 128.0, 96.0]))
    assert torch.allclose(inside, expected, atol=0.05)
