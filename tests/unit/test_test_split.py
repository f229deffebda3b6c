"""The test split of a data set, which training never reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from gai_yolo.data.sources import load_index, read_any
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig

SPLITS = ("train", "val", "test")


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)


def coco(root: Path, place: str, images: str) -> None:
    """One image in each split, with a number of boxes that says which split it is."""
    for number, split in enumerate(SPLITS, start=1):
        name = place.format(split)
        write_image(root / images.format(split) / f"{number}.png")
        boxes = [{"id": i, "image_id": number, "category_id": 1, "bbox": [i, i, 9, 9], "area": 81, "iscrowd": 0} for i in range(number)]
        content = {"images": [{"id": number, "file_name": f"{number}.png", "width": 40, "height": 30}], "annotations": boxes}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({**content, "categories": [{"id": 1, "name": "cat"}]}))


def yolo(root: Path, test: object) -> None:
    """The same as YOLO txt; `test` is what the yaml says."""
    for number, split in enumerate(SPLITS, start=1):
        write_image(root / "images" / split / f"{number}.png")
        label = root / "labels" / split / f"{number}.txt"
        label.parent.mkdir(parents=True)
        label.write_text("".join(f"0 0.5 0.5 0.{i + 1} 0.2\n" for i in range(number)))
    (root / "data.yaml").write_text(json.dumps({"train": "images/train", "val": "images/val", "names": ["cat"], "test": test}))


def voc(root: Path) -> None:
    """The same as VOC."""
    for number, split in enumerate(SPLITS, start=1):
        write_image(root / "JPEGImages" / f"{number}.png")
        box = "<object><name>cat</name><bndbox><xmin>{0}</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"
        size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
        xml = f"<annotation><filename>{number}.png</filename>{size}{''.join(box.format(i + 1) for i in range(number))}</annotation>"
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{number}.xml").write_text(xml)
        names = root / "ImageSets" / "Main" / f"{split}.txt"
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text(f"{number}\n")


@pytest.mark.parametrize(
    "kind",
    ["coco plain", "coco instances", "roboflow", "yolo", "yolo yaml", "voc"],
)
def test_it_is_found_in_each_format(kind: str, tmp_path: Path) -> None:
    """Loss: the number that counts in the end is that of the validation set under another name."""
    root = tmp_path / "data"
    if kind == "coco plain":
        coco(root, "annotations/{}.json", "images/{}")
    elif kind == "coco instances":
        coco(root, "annotations/instances_{}2017.json", "{}2017")
    elif kind == "roboflow":
        coco(root, "{}/_annotations.coco.json", "{}")
    elif kind.startswith("yolo"):
        yolo(root, ["images/test"])
    else:
        voc(root)
    config = DataConfig(path=root / "data.yaml" if kind == "yolo yaml" else root, cache_folder=tmp_path / "cache")
    index = read_any(config, "test")
    assert len(index) == 1 and len(index.images[0].boxes) == 3 and index.images.name(0) == "3.png"
    assert len(load_index(config, "val", from_cache=False).images[0].boxes) == 2, "the validation set is what it was"


def test_where_it_is_missing_that_is_said(tmp_path: Path) -> None:
    """Loss: another split is measured in its place."""
    coco(tmp_path / "a", "annotations/{}.json", "images/{}")
    (tmp_path / "a" / "annotations" / "test.json").unlink()
    yolo(tmp_path / "b", "")
    voc(tmp_path / "c")
    (tmp_path / "c" / "ImageSets" / "Main" / "test.txt").unlink()
    for path in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        with pytest.raises(DataError, match=f"data.path {path}: has no test split"):
            read_any(DataConfig(path=path), "test")
    with pytest.raises(DataError, match="the built-in data set has the splits train and val"):
        read_any(DataConfig(path=Path("shapes")), "test")
