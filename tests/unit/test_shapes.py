"""The built-in data set is the same everywhere, complete or absent, and annotated where the pixels are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.data import shapes as drawing
from gai_yolo.data.shapes import CLASS_NAMES, NUM_IMAGES, draw_scene, ensure_shapes
from gai_yolo.errors import DataError
from tests.harness import REPOSITORY


def digest(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hasher.update(str(path.relative_to(folder)).encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("cache"))


FEW = {"train": 25, "val": 5}
TOGETHER = """
import json, sys
from pathlib import Path
from gai_yolo.data import shapes
shapes.NUM_IMAGES = json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(shapes.ensure_shapes(Path(sys.argv[1])))
"""


def test_concurrent_processes_write_one_equal_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss prevented: ranks that start together train on half-written or different data."""
    monkeypatch.setattr(drawing, "NUM_IMAGES", FEW)
    shapes = ensure_shapes(tmp_path)
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "new" / "cache"), json.dumps(FEW)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes, text=True, cwd=REPOSITORY) for _ in range(3)]  # type: ignore[call-overload]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert Path(outputs[0]).name == shapes.name
    assert digest(Path(outputs[0])) == digest(shapes)
    left_over = {path.name for path in Path(outputs[0]).parent.iterdir()} - {shapes.name, f"{shapes.name}.lock"}
    assert left_over == set()


def test_second_call_writes_nothing(shapes: Path) -> None:
    """Loss prevented: each start of each rank drawing for seconds, or replacing files under a running job."""
    before = shapes.stat().st_mtime_ns, digest(shapes)
    assert ensure_shapes(shapes.parent) == shapes
    assert (shapes.stat().st_mtime_ns, digest(shapes)) == before


def test_scene_is_a_function_of_its_number() -> None:
    """Loss prevented: an image that depends on what was drawn before it."""
    first = draw_scene(0, 5)
    draw_scene(1, 5)
    again = draw_scene(0, 5)
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels[:100, :100], draw_scene(1, 5).pixels[:100, :100])


def test_boxes_are_those_of_the_visible_pixels(shapes: Path) -> None:
    """Loss prevented: a detector blamed for boxes that the data set itself has wrong."""
    content = json.loads((shapes / "annotations" / "val.json").read_text())
    boxes: dict[int, list[tuple[int, list[int], int]]] = {}
    for record in content["annotations"]:
        boxes.setdefault(record["image_id"], []).append((record["category_id"] - 1, record["bbox"], record["area"]))
    for image in content["images"][:20]:
        scene = draw_scene(1, image["id"] - 1)
        assert scene.pixels.shape[:2] == (image["height"], image["width"])
        expected = []
        for class_position, visible in scene.objects:
            x, y, width, height = cv2.boundingRect(visible.astype(np.uint8))
            expected.append((class_position, [x, y, width, height], int(visible.sum())))
        assert boxes[image["id"]] == expected
        assert np.sum([visible for _, visible in scene.objects], axis=0).max() == 1
        stored = cv2.imread(str(shapes / "images" / "val" / image["file_name"]))
        assert stored is not None
        assert np.abs(stored.astype(float) - scene.pixels).mean() < 12


def test_every_class_is_there_often_enough_to_be_learnt(shapes: Path) -> None:
    """Loss prevented: an mAP over four classes of which one has hardly any objects."""
    for split, count in NUM_IMAGES.items():
        content = json.loads((shapes / "annotations" / f"{split}.json").read_text())
        assert len(content["images"]) == count == len(list((shapes / "images" / split).iterdir()))
        assert {record["image_id"] for record in content["annotations"]} == set(range(1, count + 1))
        counts = np.bincount([record["category_id"] - 1 for record in content["annotations"]], minlength=len(CLASS_NAMES))
        assert counts.min() > 0.15 * counts.sum()
        assert min(min(record["bbox"][2:]) for record in content["annotations"]) >= 12


def test_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Loss prevented: a traceback instead of the advice to set data.cache_folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the built-in data set.*set data\.cache_folder"):
        ensure_shapes(tmp_path / "file" / "cache")


def test_every_file_is_on_the_disk_before_the_data_set_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: after a power cut some pictures end in zeros, and are trained on from then on."""
    monkeypatch.setattr(drawing, "NUM_IMAGES", {"train": 2, "val": 1})
    synced: set[tuple[int, int]] = set()
    fsync, rename = os.fsync, Path.rename

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        missing = [path for path in source.rglob("*") if (path.stat().st_dev, path.stat().st_ino) not in synced]
        assert missing == []
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", renamed)
    assert len(list(ensure_shapes(tmp_path).rglob("*.jpg"))) == 3 and synced
