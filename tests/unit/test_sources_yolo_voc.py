"""YOLO text labels and Pascal VOC xml: usual spellings, and everything that is wrong in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_index, load_indexes
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig

WIDTH, HEIGHT = 40, 30


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(path)


def counted(index: Index) -> dict[tuple[str, str], int]:
    return {(problem.kind, problem.action): problem.count for problem in index.problems}


def write_yolo(root: Path, rows: str = "1 0.5 0.5 0.5 0.5\n", **keys: Any) -> DataConfig:
    for name in ("b", "a"):
        write_image(root / "images" / "train" / f"{name}.jpg")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "a.txt").write_text(rows)
    content = {"train": "images/train", "val": "images/train", "names": ["cat", "dog"]} | keys
    (root / "data.yaml").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return DataConfig(path=root)


def test_yolo_rows_become_pixel_boxes(tmp_path: Path) -> None:
    """Loss prevented: boxes off by half a side, outlines dropped, and images without objects left out."""
    rows = "1 0.5 0.5 0.5 0.4\n\n0 0.25 0.2 0.75 0.1 0.5 0.9\n"
    index = load_index(write_yolo(tmp_path, rows), "train")
    assert [(image.image_id, image.path.name) for image in index.images] == [(1, "a.jpg"), (2, "b.jpg")]
    np.testing.assert_allclose(index.images[0].boxes, [[10, 9, 30, 21], [10, 3, 30, 27]], atol=1e-5)
    assert index.images[0].classes.tolist() == [1, 0]
    assert len(index.images[1].boxes) == 0
    assert [(c.id, c.name) for c in index.categories] == [(1, "cat"), (2, "dog")]
    assert index.problems == ()


@pytest.mark.parametrize(
    ("row", "kind", "action"),
    [
        ("0 0.5 0.5 0.5", "unparsable label row", "skipped"),
        ("dog 0.5 0.5 0.5 0.5", "unparsable label row", "skipped"),
        ("0.5 0.5 0.5 0.5 0.5", "unparsable label row", "skipped"),
        ("nan 0.5 0.5 0.5 0.5", "unparsable label row", "skipped"),
        ("inf 0.5 0.5 0.5 0.5", "unparsable label row", "skipped"),
        ("2 0.5 0.5 0.5 0.5", "box of an unknown class", "skipped"),
        ("-1 0.5 0.5 0.5 0.5", "box of an unknown class", "skipped"),
        ("0 0.5 nan 0.5 0.5", "box with a number that is not finite", "skipped"),
        ("0 0.1 0.1 nan 0.2 0.3 0.3", "box with a number that is not finite", "skipped"),
        ("0 0.5 0.5 0 0.5", "box without area", "skipped"),
        ("0 20 15 8 8", "box without area", "skipped"),
        ("0 1.0 0.5 0.5 0.5", "box outside the image", "clipped"),
    ],
)
def test_wrong_label_row_is_counted_with_its_line(row: str, kind: str, action: str, tmp_path: Path) -> None:
    """Loss prevented: labels in pixels or of another class list vanishing without a word."""
    index = load_index(write_yolo(tmp_path, f"1 0.5 0.5 0.5 0.5\n{row}\n"), "train")
    assert counted(index) == {(kind, action): 1}
    assert "a.txt, line 2" in index.problems[0].example
    assert len(index.images[0].boxes) == (2 if action == "clipped" else 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"names": None}, "`names` must be a list"),
        ({"names": []}, "`names` must be a list"),
        ({"names": [["cat"]]}, "`names` must be a list"),
        ({"nc": 3}, "`nc` is 3 but `names` has 2 classes"),
        ({"train": None}, "`train` must be a folder"),
        ({"train": [[3]]}, "`train` must be a folder"),
        ({"train": "images/nowhere"}, "`train` leads to .*nowhere, which is not there"),
        ({"path": "nowhere"}, "`path` leads to .*nowhere"),
        ({"path": ["a"]}, "`path` must be a folder name"),
    ],
)
def test_inconsistent_yolo_description_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Loss prevented: a class list that is one short, found after the training."""
    with pytest.raises(DataError, match=rf"data\.yaml: {message}"):
        load_index(write_yolo(tmp_path, **keys), "train")


def test_yolo_description_in_its_other_spellings(tmp_path: Path) -> None:
    """Loss prevented: numbered names, lists of folders or files, and Roboflow's `../` refused or read in another order."""
    expected = load_index(write_yolo(tmp_path), "train")
    (tmp_path / "train.txt").write_text("./images/train/b.jpg\nimages/train/a.jpg\n\n")
    for train in ("train.txt", ["images/train"], "../images/train", str(tmp_path / "images" / "train")):
        (tmp_path / "data.yaml").unlink(missing_ok=True)
        (tmp_path / "cells.yaml").write_text(f"train: {json.dumps(train)}\nnames:\n  0: cat\n  1: dog\n")
        index = load_index(DataConfig(path=tmp_path), "train")
        assert index.digest() == expected.digest()
        assert load_index(DataConfig(path=tmp_path / "cells.yaml"), "train").digest() == expected.digest()
    (tmp_path / "cells.yaml").write_text("train: images/train\nnames: {0: cat, 2: dog}\n")
    with pytest.raises(DataError, match="numbered 0 to 1 without gaps"):
        load_index(DataConfig(path=tmp_path), "train")
    (tmp_path / "cells.yaml").write_text("train: [images\nnames: 3: 4\n")
    with pytest.raises(DataError, match=r"cells\.yaml, line 2: not valid YAML"):
        load_index(DataConfig(path=tmp_path / "cells.yaml"), "train")


def test_yolo_without_any_label_says_where_it_looked(tmp_path: Path) -> None:
    """Loss prevented: a misplaced labels folder that trains a detector of nothing."""
    config = write_yolo(tmp_path)
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(DataError, match=r"none of the 2 training images.*looked for .*labels/train/a\.txt"):
        load_index(config, "train")


def voc_xml(name: str, objects: str, source: str = "") -> str:
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"<annotation><filename>{name}</filename>{source}{size}{objects}</annotation>"


def voc_object(name: str, box: tuple[Any, Any, Any, Any], extra: str = "") -> str:
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{tags}</bndbox></object>"


def write_voc(root: Path, files: dict[str, str], train: list[str]) -> DataConfig:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, text in files.items():
        (root / "Annotations" / f"{name}.xml").write_text(text)
        write_image(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{name}\n" for name in train))
    (root / "ImageSets" / "Main" / "val.txt").write_text("".join(f"{name} 1\n" for name in files if name not in train))
    return DataConfig(path=root)


def test_voc_as_published_counts_from_one_and_other_tools_from_zero(tmp_path: Path) -> None:
    """Loss prevented: every box of VOC shifted by a pixel, or every box of LabelImg."""
    published = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    files = {
        "b": voc_xml("b.jpg", voc_object("dog", (1, 1, 40, 30), "<difficult>1</difficult>" + part), published),
        "a": voc_xml("wrong name", voc_object("cat", (1, 2, 40.5, 30)) + voc_object("dog", (5, 5, 5, 9))),
        "c": voc_xml("c.jpg", voc_object("ant", (3, 3, 9, 9))),
    }
    train, val = load_indexes(write_voc(tmp_path, files, ["b", "a"]))
    assert train.class_names == ["ant", "cat", "dog"] == val.class_names
    assert [image.path.name for image in train.images] == ["a.jpg", "b.jpg"]
    assert train.images[0].boxes.tolist() == [[1, 2, 40, 30]]
    assert train.images[1].boxes.tolist() == [[0, 0, 40, 30]]
    assert not train.images[1].crowd.any()
    assert counted(train) == {("box without area", "skipped"): 1, ("class without a box", "not learned"): 1}


BILLION_LAUGHS = '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]><annotation><filename>&y;</filename></annotation>'


@pytest.mark.parametrize("broken", ["", "<annotation><object>", "\x00", BILLION_LAUGHS])
def test_broken_xml_counts_as_a_bad_image(broken: str, tmp_path: Path) -> None:
    """Loss prevented: one xml of thousands ending the job, or an entity bomb filling the memory."""
    files = {"a": voc_xml("a.jpg", voc_object("cat", (1, 1, 9, 9))), "b": broken}
    config = write_voc(tmp_path, files, ["a", "b"])
    index = load_index(config.model_copy(update={"max_bad_fraction": 0.5}), "train")
    assert counted(index) == {("broken xml", "image skipped"): 1}
    assert "b.xml" in index.problems[0].example
    with pytest.raises(DataError, match=r"1 of 2 images are missing or unreadable.*broken xml.*b\.xml"):
        load_index(config, "train")


def test_wrong_voc_records_are_counted(tmp_path: Path) -> None:
    """Loss prevented: objects and listed images that vanish without a word."""
    objects = (
        voc_object("cat", (1, 1, 9, 9))
        + voc_object("cat", ("x", 1, 9, 9))
        + "<object><name>cat</name></object>"
        + voc_object("", (1, 1, 9, 9))
    )
    config = write_voc(tmp_path, {"a": voc_xml("a.jpg", objects), "b": voc_xml("../../b.jpg", "")}, ["a", "b", "c"])
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    write_image(tmp_path.parent / "b.jpg")
    index = load_index(config.model_copy(update={"max_bad_fraction": 0.7}), "train")
    assert counted(index) == {
        ("no xml for an image", "image skipped"): 1,
        ("image file missing", "image skipped"): 1,
        ("unreadable object", "skipped"): 3,
    }
    assert len(index) == 1
    assert len(index.images[0].boxes) == 1


def test_voc_split_follows_the_image_folders(tmp_path: Path) -> None:
    """Loss prevented: validation images trained on, and xml files whose image is lost not being missed."""
    (tmp_path / "voc").mkdir()
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        write_image(tmp_path / "images" / split / f"{name}.jpg")
    for name in ("a", "c", "lost"):
        (tmp_path / "voc" / f"{name}.xml").write_text(voc_xml(f"{name}.jpg", voc_object("cat", (1, 1, 9, 9))))
    config = DataConfig(path=tmp_path, max_bad_fraction=0.5)
    train, val = load_indexes(config)
    assert [image.path.name for image in train.images] == ["a.jpg"]
    assert [image.path.name for image in val.images] == ["c.jpg"]
    assert counted(train) == {("no xml for an image", "left out"): 1, ("image file missing", "image skipped"): 1}
    assert val.problems == ()
    with pytest.raises(DataError, match=r"1 of 2 images.*lost\.xml"):
        load_index(DataConfig(path=tmp_path), "train")
