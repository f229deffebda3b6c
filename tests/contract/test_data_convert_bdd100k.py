"""`gai-yolo data convert` from BDD100K: the three forms of its labels, dates, and what is no box."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gai_yolo.data_convert.dates import moment_of
from tests.contract.test_data_convert import data, document, read, rows, said

DAYS = {"a": "2017-09-01T23:30:00Z", "b": 1504310400000, "c": 10000}
"""Of images: 1, 2 September, and none: what BDD100K's own labels say of all."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is thrown away at once."""
    monkeypatch.setattr(os, "sync", lambda: None)


def box(category: str, *corners: float, **attributes: Any) -> dict[str, Any]:
    return {"id": 1, "category": category, "attributes": attributes, "box2d": dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))}


LABELS: dict[str, list[Any]] = {
    "a": [
        box("car", 10.5, 20, 60.25, 70, occluded=True, truncated=False, trafficLightColor="none"),
        box("pedestrian", 1, 2, 3, 40, occluded=True, trafficLightColor="none"),
        {"category": "lane", "poly2d": [{"vertices": [[1, 2], [3, 4]]}], "attributes": {"laneStyle": "solid"}},
        {"category": "drivable area", "box2d": None},
    ],
    "b": [
        box("car", 5, 5, 20, 20, crowd=True),
        box("trailer", 30, 30, 50, 50),
        box("car", 90, 90, 90, 95),
        {"category": "car", "box2d": {"x1": 3}},
    ],
    "c": [],
}


def frame(name: str, labels: str = "labels", suffix: str = ".jpg") -> dict[str, Any]:
    return {"name": name + suffix, "attributes": {"weather": "rainy"}, "timestamp": DAYS[name], labels: LABELS[name]}


def write_images(root: Path) -> None:
    for split, names in (("train", "abc"), ("val", "a")):
        folder = root / "images" / "100k" / split
        folder.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (128, 72)).save(folder / f"{name}.jpg")


def write_det_20(root: Path) -> None:
    (root / "labels" / "det_20").mkdir(parents=True)
    (root / "labels" / "det_20" / "det_train.json").write_text(json.dumps([frame(name) for name in "abc"], indent=1))
    (root / "labels" / "det_20" / "det_val.json").write_text(json.dumps({"frames": [frame("a")], "config": {}}))


def write_of_2018(root: Path) -> None:
    (root / "labels").mkdir()
    for split, names in (("train", "cab"), ("val", "a")):
        (root / "labels" / f"bdd100k_labels_images_{split}.json").write_text(json.dumps([frame(name) for name in names]))


def write_file_for_each(root: Path) -> None:
    for split, names in (("train", "abc"), ("val", "a")):
        folder = root / "labels" / "100k" / split
        folder.mkdir(parents=True)
        for name in names:
            one = frame(name, "objects")
            content = {
                "name": name,
                "attributes": one["attributes"],
                "frames": [{"timestamp": one["timestamp"], "objects": one["objects"]}],
            }
            (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("write", [write_det_20, write_of_2018, write_file_for_each])
def test_all_forms_of_its_labels_give_the_same(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: boxes of one of its three publications cannot be had, or are others."""
    root = tmp_path / "bdd"
    write_images(root)
    write(root)
    summary = document(capsys, "convert", root, tmp_path / "out", "--to", "coco")
    assert summary["source_format"] == "bdd100k"
    index = read(tmp_path / "out", "train")
    assert [(one.id, one.name) for one in index.categories] == [(1, "pedestrian"), (2, "car"), (3, "trailer")], "the challenge's order"
    assert said(index) == {
        "a.jpg": [("car", [10.5, 20, 60.25, 70]), ("pedestrian", [1, 2, 3, 40])],
        "b.jpg": [("car", [5, 5, 20, 20]), ("trailer", [30, 30, 50, 50])],
        "c.jpg": [],
    }
    assert [image.crowd.tolist() for image in index.images] == [[False, False], [True, False], []]
    assert {(image.width, image.height) for image in index.images} == {(128, 72)}
    assert rows(summary, "wrong") == {"box without area": 1, "malformed annotation": 1}
    assert rows(summary) == {"`weather` of an image": 4, "`occluded` of a box": 4, "label without a box (lane, area, mask)": 4}


def test_dates_choose_and_what_has_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a season that was to be left out is trained on, or images go because their time counts from a video's beginning."""
    root = tmp_path / "bdd"
    write_images(root)
    write_det_20(root)
    more = ("convert", root)
    day = ("--to", "yolo", "--since", "2017-09-01", "--until", "2017-09-01")
    summary = document(capsys, *more, tmp_path / "1", *day)
    assert list(said(read(tmp_path / "1", "train"))) == ["a.jpg"]
    assert rows(summary, "wrong") == {"image outside the dates": 1, "image without a date": 1}
    assert [row["action"] for row in summary["wrong"]] == ["left out", "left out; --undated keep takes it"]
    assert [one["name"] for one in summary["classes"]] == ["pedestrian", "car", "trailer"], "the dates do not choose classes"
    document(capsys, *more, tmp_path / "2", *day, "--undated", "keep")
    assert list(said(read(tmp_path / "2", "train"))) == ["a.jpg", "c.jpg"]
    (root / "info" / "100k" / "train").mkdir(parents=True)
    (root / "info" / "100k" / "train" / "c.json").write_text(json.dumps({"startTime": 1504224000123, "rideID": "x"}))
    document(capsys, *more, tmp_path / "3", *day)
    assert list(said(read(tmp_path / "3", "train"))) == ["a.jpg", "c.jpg"], "the start of the video is known"
    code, _, errors = data(capsys, *more, tmp_path / "4", "--to", "yolo", "--since", "2019-01-01")
    assert code == 2 and "no image of the train split is left: 3 x image outside the dates" in errors
    code, _, errors = data(capsys, "convert", tmp_path / "1", tmp_path / "4", "--to", "coco", "--since", "2019-01-01")
    assert code == 2 and "only BDD100K has dates" in errors


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1506800843, "2017-09-30T19:47:23"),
        (1506800843701, "2017-09-30T19:47:23.701000"),
        (1506800843701000, "2017-09-30T19:47:23.701000"),
        (1506800843701000000, "2017-09-30T19:47:23.701000"),
        ("2017-09-30", "2017-09-30T00:00:00"),
        ("2017-09-30T21:47:23+02:00", "2017-09-30T21:47:23"),
        *((value, None) for value in (10000, 0, -5, None, True, "yesterday", "", float("nan"), float("inf"), 10**40, [1])),
    ],
)
def test_a_time_is_a_moment_or_none(value: Any, expected: str | None) -> None:
    """Loss: milliseconds are taken for seconds, and an image is from the year 49000."""
    moment = moment_of(value)
    assert (None if moment is None else moment.replace(tzinfo=None).isoformat()) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[{", "not usable JSON"),
        ('[{"name": "a.jpg"}', "not usable JSON"),
        ("{}", "a list of frames, or an object with a list `frames`"),
        ('[{"labels": []}]', "frame 0 needs a text `name`"),
        ('[{"name": "../a.jpg"}]', "leads out of"),
        ("[]", "no image of the train split is left: there are no frames"),
    ],
)
def test_damaged_labels_are_refused(text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback, or half of the labels without a word."""
    root = tmp_path / "bdd"
    write_images(root)
    write_det_20(root)
    (root / "labels" / "det_20" / "det_train.json").write_text(text)
    code, _, errors = data(capsys, "convert", root, tmp_path / "out", "--to", "coco")
    assert code == 2 and sentence in errors and str(root) in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_frames_of_a_kind_stay_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: --group-by looks into COCO only."""
    root = tmp_path / "bdd"
    write_images(root)
    write_det_20(root)
    summary = document(capsys, "split", root, tmp_path / "out", "--val", "0.3", "--group-by", "timestamp")
    assert {split: one["images"] for split, one in summary["splits"].items()} == {"train": 3, "val": 1}
