"""`from gai_yolo import Detector`: what a program gets."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gai_yolo.errors import CheckpointError, DataError, Refusal
from gai_yolo.predict.detector import Detector
from gai_yolo.predict.result import Result
from tests.detectors import NAMES, eager_file, eager_model
from tests.harness import REPOSITORY

RNG = np.random.default_rng(2)
IMAGE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(eager_model(), "cpu")


@pytest.fixture(scope="module")
def result(detector: Detector) -> Result:
    found: Result = detector.predict(IMAGE, size=64, max_detections=7)
    return found


def test_the_package_gives_it_out_and_imports_nothing_before() -> None:
    """Loss: every command of the package waits for PyTorch; or the import in the README does not work."""
    program = (
        "import sys, gai_yolo; assert not {'torch', 'numpy', 'cv2', 'PIL'} & sys.modules.keys();"
        "from gai_yolo import Detector, Result; assert Detector.load and Result.draw;"
        "assert not {'torchvision', 'rich', 'tensorboard', 'torch.utils.tensorboard', 'pycocotools'} & sys.modules.keys();"
        "assert not hasattr(gai_yolo, 'Detectors')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_program_in_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the first thing that a newcomer copies does not work."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        Image.fromarray(IMAGE).save(name)
    eager_file(tmp_path / "eager.safetensors")
    for name in ("README.md", "docs/predict.md"):
        (program,) = re.findall(r"```python\n(from gai_yolo import Detector\n.*?)```", (REPOSITORY / name).read_text(), re.DOTALL)
        assert program.count("experiments/shapes") == 1
        exec(program.replace("experiments/shapes", "eager.safetensors"), {})
        said = capsys.readouterr().out
        assert any(name in said for name in NAMES), said


def test_a_detector_is_read_from_a_file(tmp_path: Path) -> None:
    """Loss: a detector that forgets what it detects."""
    found = Detector.load(str(eager_file(tmp_path / "a.safetensors")), device="cpu")
    assert found.names == NAMES and found.size == 640 and found.device.type == "cpu"
    with pytest.raises(CheckpointError, match="nothing"):
        Detector.load(tmp_path / "nothing")


def test_one_image_gives_one_result_and_several_a_list(detector: Detector, tmp_path: Path) -> None:
    """Loss: a caller who has to ask what came back."""
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    tensor = torch.from_numpy(IMAGE).permute(2, 0, 1)
    for one in (IMAGE, tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(IMAGE), tensor):
        found = detector.predict(one, size=64)
        assert isinstance(found, Result) and np.array_equal(found.image, IMAGE)
        assert found.path == (tmp_path / "a.png" if isinstance(one, str | Path) else None)
    several: list[Any] = [[IMAGE], (IMAGE,), (one for one in [IMAGE]), IMAGE[None], tensor[None], [str(tmp_path / "a.png")]]
    for some in several:
        found = detector.predict(some, size=64)
        assert isinstance(found, list) and len(found) == 1 and np.array_equal(found[0].boxes, detector.predict(IMAGE, size=64).boxes)
    assert detector.predict([]) == []


def test_results_come_in_order_whatever_the_batch(detector: Detector) -> None:
    """Loss: boxes of one picture drawn on another."""
    images = [np.full((10 + number, 20, 3), 20 * number, np.uint8) for number in range(7)]
    found = detector.predict(images, size=64, batch_size=3)
    assert [one.image.shape[0] for one in found] == [10 + number for number in range(7)]
    assert [int(one.image[0, 0, 0]) for one in found] == [20 * number for number in range(7)]


def test_a_stream_takes_no_more_than_it_needs(detector: Detector) -> None:
    """Loss: a camera whose pictures are looked at a second late, or kept until there is no memory left."""
    taken = []

    def camera() -> Iterator[np.ndarray[Any, Any]]:
        for number in range(1_000_000):
            taken.append(number)
            yield IMAGE

    stream = detector.stream(camera(), size=64)
    for count in (1, 2, 3):
        assert isinstance(next(stream), Result) and len(taken) == count
    (alone,) = detector.stream(IMAGE, size=64)  # and not 48 grey pictures of a line each
    assert alone.image.shape == IMAGE.shape
    for wrong in (0, 2.5, "2"):  # of 2.5 no batch was ever full
        with pytest.raises(Refusal, match="batch_size"):
            detector.stream(camera(), batch_size=wrong)  # type: ignore[arg-type]
    for unknown in (1.0, np.int64(7), b"cell"):
        with pytest.raises(Refusal, match="classes: there is no"):
            detector.stream(camera(), classes=unknown)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="confidence"):
        detector.stream(camera(), confidence=25)


def test_the_first_wrong_image_of_several_is_named(detector: Detector, tmp_path: Path) -> None:
    """Loss: one of ten thousand is wrong, and nobody says which."""
    with pytest.raises(TypeError, match=r"^image 1: an array of float64"):
        detector.predict([IMAGE, IMAGE / 255], size=64)
    with pytest.raises(DataError, match=r"nothing\.jpg: cannot be read"):
        detector.predict([IMAGE, tmp_path / "nothing.jpg"], size=64)
    with pytest.raises(DataError, match="is a folder"):
        detector.predict(tmp_path)
    with pytest.raises(TypeError, match=r"^image 0: int is no image"):
        detector.predict(3)


def test_a_result_says_what_where_and_how_sure(result: Result, detector: Detector) -> None:
    """Loss: numbers of which nobody knows the order or the unit."""
    assert len(result) == 7 == len(result.boxes) == len(result.scores) == len(result.classes) == len(result.names)
    assert result.boxes.shape == (7, 4) and (np.diff(result.scores) <= 0).all()
    assert (result.boxes >= 0).all() and (result.boxes <= [64, 48, 64, 48]).all()
    assert result.names == [detector.names[number] for number in result.classes] and result.class_names == tuple(NAMES)
    assert repr(result) == "Result(7 detections in 64 x 48)"
    with pytest.raises(ValueError, match="read-only"):
        result.image[0, 0, 0] = 1
    with pytest.raises(AttributeError):
        result.boxes = result.boxes  # type: ignore[misc]


def test_drawing_leaves_the_image_alone(result: Result) -> None:
    """Loss: pictures with boxes on them looked at a second time."""
    before = result.image.copy()
    drawn = result.draw()
    assert drawn.shape == result.image.shape and drawn.flags.writeable
    assert not np.array_equal(drawn, before) and np.array_equal(result.image, before)


def test_coco_rows_are_those_of_its_results_format(result: Result) -> None:
    """Loss: boxes that COCO's tools read as corners, categories that are one off."""
    rows = result.to_coco(17, category_ids=[5, 9, 90])
    assert [row["category_id"] for row in rows] == [(5, 9, 90)[number] for number in result.classes]
    assert [row["category_id"] for row in result.to_coco(1)] == (result.classes + 1).tolist()
    for row, box, score in zip(rows, result.boxes.tolist(), result.scores.tolist(), strict=True):
        x, y, width, height = row["bbox"]
        assert row["image_id"] == 17 and row["score"] == score and [x, y, x + width, y + height] == pytest.approx(box)
    with pytest.raises(ValueError, match="2 ids for 3 classes"):
        result.to_coco(1, [1, 2])


def test_other_libraries_are_asked_for_by_name(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a traceback that does not say what to install."""
    for name, convert in (("pandas", result.to_frame), ("supervision", result.to_supervision)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"pip install {name}"):
            convert()
        given: dict[str, Any] = {}
        stand_in = types.ModuleType(name)
        stand_in.DataFrame = given.update  # type: ignore[attr-defined]
        stand_in.Detections = lambda given=given, **values: given.update(values)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, stand_in)
        convert()
        assert given, "their constructors take these names: see their documentation"
        if name == "pandas":
            assert list(given) == ["x1", "y1", "x2", "y2", "score", "class", "name"] and np.array_equal(given["x2"], result.boxes[:, 2])
        else:
            assert list(given) == ["xyxy", "confidence", "class_id", "data"] and given["data"]["class_name"].tolist() == result.names


def test_a_data_frame_holds_a_row_for_each_detection(result: Result) -> None:
    """Loss: columns that pandas does not take."""
    pytest.importorskip("pandas")
    frame = result.to_frame()
    assert len(frame) == len(result) and frame["name"].tolist() == result.names


def test_supervision_takes_them(result: Result) -> None:
    """Loss: arrays that supervision does not take."""
    pytest.importorskip("supervision")
    assert len(result.to_supervision()) == len(result)
