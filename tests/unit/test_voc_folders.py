"""Pascal VOC data sets in folders below folders: each xml is of its own image, or the data set is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

A, B = [16.0, 12.0, 32.0, 24.0], [40.0, 12.0, 60.0, 24.0]


def write(root: Path, xml: dict[str, list[float]], images: list[str], lists: dict[str, str] | None = None, **names: str) -> DataConfig:
    """Xml with one box each, by their paths without suffix; `names` are the `filename`s of those that have one."""
    for stem, box in xml.items():
        edges = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        path = root / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        named = f"<filename>{names.get(path.stem, '')}</filename>"
        path.write_text(f"<annotation>{named}<object><name>a</name><bndbox>{edges}</bndbox></object></annotation>")
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(root / name)
    for split, lines in (lists or {}).items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return DataConfig(path=root, cache_folder=root / "cache", max_bad_fraction=0.6)


def read(config: DataConfig) -> tuple[Index, Index]:
    return load_index(config, "train"), load_index(config, "val")


def counted(index: Index) -> dict[str, int]:
    return {problem.kind: problem.count for problem in index.problems}


def boxes(index: Index, root: Path) -> dict[str, Any]:
    return {str(image.path.relative_to(root)): image.boxes.tolist() for image in index.images}


@pytest.mark.parametrize("images", ["JPEGImages", "images"])
def test_folders_of_splits_below_annotations(images: str, tmp_path: Path) -> None:
    """Loss: "found no data set there" for one that is there."""
    xml = {"Annotations/train/cam 1/1": A, "Annotations/train/cam 2/1": B, "Annotations/val/1": B}
    config = write(tmp_path, xml, [f"{images}/{name}.jpg" for name in ("train/cam 1/1", "train/cam 2/1", "val/1")])
    train, val = read(config)
    assert boxes(train, tmp_path / images) == {"train/cam 1/1.jpg": [A], "train/cam 2/1.jpg": [B]}
    assert boxes(val, tmp_path / images) == {"val/1.jpg": [B]}
    assert not train.problems and not val.problems


@pytest.mark.parametrize("lists", [("cam 1/1\n", "cam 2/1\n"), ("train/cam 1/1\n", "val/cam 2/1\n"), ("1\n", "1\n")])
def test_lists_may_name_folders_or_not(lists: tuple[str, str], tmp_path: Path) -> None:
    """Loss: every image of a list is said to have no xml."""
    xml = {"Annotations/train/cam 1/1": A, "Annotations/val/cam 2/1": B}
    images = ["JPEGImages/train/cam 1/1.jpg", "JPEGImages/val/cam 2/1.jpg"]
    train, val = read(write(tmp_path, xml, images, {"train": lists[0], "val": lists[1]}))
    assert boxes(train, tmp_path / "JPEGImages" / "train") == {"cam 1/1.jpg": [A]}
    assert boxes(val, tmp_path / "JPEGImages" / "val") == {"cam 2/1.jpg": [B]}
    assert not train.problems and not val.problems


def test_flat_xml_of_images_in_folders_and_the_reverse(tmp_path: Path) -> None:
    """Loss: all images are missing, although no two have one name."""
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    lists = {"train": "1\n", "val": "2\n"}
    for root, xml, images in (
        (flat, {"Annotations/1": A, "Annotations/2": B}, ["JPEGImages/x/1.jpg", "JPEGImages/y/2.jpg"]),
        (deep, {"Annotations/x/1": A, "Annotations/y/2": B}, ["JPEGImages/1.jpg", "JPEGImages/2.jpg"]),
    ):
        train, val = read(write(root, xml, images, lists))
        assert [list(boxes(index, root).values()) for index in (train, val)] == [[[A]], [[B]]]
        assert not train.problems and not val.problems


@pytest.mark.parametrize(
    ("xml", "images", "line"),
    [
        (["x/1", "y/1"], ["1.jpg"], "x/1"),
        (["1"], ["x/1.jpg", "y/1.jpg"], "1"),
        (["x/1", "y/1"], ["x/1.jpg", "y/1.jpg"], "1"),
    ],
)
def test_what_may_be_of_several_is_refused_with_both(xml: list[str], images: list[str], line: str, tmp_path: Path) -> None:
    """Loss: boxes of one picture on another."""
    config = write(tmp_path, {f"Annotations/{name}": A for name in xml}, [f"JPEGImages/{name}" for name in images], {"train": line})
    with pytest.raises(
        DataError, match=r"may be (of )?.*1\.(jpg|xml) or (of )?.*1\.(jpg|xml); (let xml and images lie in|write names with)"
    ):
        load_index(config, "train")


def test_an_image_belongs_to_the_xml_of_its_own_name(tmp_path: Path) -> None:
    """Loss: boxes of a lost picture on another one, which an old `filename` names, and that one's own boxes are left out."""
    xml = {"Annotations/1": A, "Annotations/3": B, "Annotations/9": A}
    config = write(tmp_path, xml, ["JPEGImages/3.jpg", "JPEGImages/9.jpg"], {"train": "1\n3\n", "val": "9\n"}, **{"1": "3.jpg"})
    train = load_index(config, "train")
    assert boxes(train, tmp_path / "JPEGImages") == {"3.jpg": [B]} and counted(train) == {"image file missing": 1}


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_xml_in_a_splits_own_folder_misses_its_image(split: str, tmp_path: Path) -> None:
    """Loss: an annotated picture is lost without a word, in val always, in train if val has one of its name."""
    other = "val" if split == "train" else "train"
    config = write(tmp_path, {f"{split}/1": A, f"{split}/2": A, f"{other}/2": B}, [f"{split}/1.jpg", f"{other}/2.jpg"])
    indexes = dict(zip(("train", "val"), read(config), strict=True))
    assert counted(indexes[split]) == {"image file missing": 1} and not indexes[other].problems


def test_pictures_that_no_list_names_are_told_once(tmp_path: Path) -> None:
    """Loss: half of the pictures are not learned because a list broke off, and nothing says so."""
    xml = {f"Annotations/{number}": A for number in range(4)}
    images = ["JPEGImages/0.jpg", "JPEGImages/1.jpg", "JPEGImages/1.png", "JPEGImages/2.jpg", "JPEGImages/3.jpg", "JPEGImages/new.jpg"]
    config = write(tmp_path, xml, images, {"train": "0\n", "val": "1\n", "test": "2\n"})
    (tmp_path / "JPEGImages" / "phone.heic").write_bytes(b"?")
    train, val = read(config)
    assert counted(train) == {"image that no annotation names": 2, "file that may be an image, of a kind that is not read": 1}
    assert train.problems[0].example == str(tmp_path / "JPEGImages" / "3.jpg")
    assert counted(val) == {"image that no annotation names": 1}  # 1.png beside 1.jpg


def test_names_of_a_list_that_repeat_are_told(tmp_path: Path) -> None:
    """Loss: somebody lists rare images ten times and believes that they are seen ten times."""
    train = load_index(write(tmp_path, {"Annotations/1": A}, ["JPEGImages/1.jpg"], {"train": "1\n1  1\n"}), "train")
    assert len(train) == 1 and counted(train) == {"image that is named twice": 1}


def test_xml_in_capitals_is_read_and_other_kinds_of_pictures_are_told(tmp_path: Path) -> None:
    """Loss: xml of a camera's computer, and pictures of a phone, are not seen at all."""
    config = write(tmp_path, {"Annotations/1": A}, ["images/train/1.jpg"])
    (tmp_path / "Annotations" / "1.xml").rename(tmp_path / "Annotations" / "1.XML")
    (tmp_path / "images" / "train" / "2.heic").write_bytes(b"?")
    train = load_index(config, "train")
    assert boxes(train, tmp_path / "images" / "train") == {"1.jpg": [A]}
    assert counted(train) == {"file that may be an image, of a kind that is not read": 1}


def test_a_data_set_folder_called_val_has_a_train_split(tmp_path: Path) -> None:
    """Loss: all xml are taken for val's, because of a name that is none of the data set's."""
    root = tmp_path / "val"
    train, val = read(write(root, {"1": A, "2": B}, ["images/train/1.jpg", "images/val/2.jpg"]))
    assert boxes(train, root / "images") == {"train/1.jpg": [A]} and boxes(val, root / "images") == {"val/2.jpg": [B]}


def test_one_configured_folder_of_both_splits(tmp_path: Path) -> None:
    """Loss: every picture of val is told to have no xml."""
    config = write(
        tmp_path, {"Annotations/train/1": A, "Annotations/val/2": B}, ["JPEGImages/1.jpg", "JPEGImages/2.jpg", "JPEGImages/3.jpg"]
    )
    place = SplitConfig(images=Path("JPEGImages"))
    train, val = read(config.model_copy(update={"train": place, "val": place}))
    assert list(boxes(train, tmp_path)) == ["JPEGImages/1.jpg"] and list(boxes(val, tmp_path)) == ["JPEGImages/2.jpg"]
    assert counted(train) == counted(val) == {"no xml for an image": 1}


def test_an_xml_of_a_whole_name_leaves_the_image_to_the_one_of_its_stem(tmp_path: Path) -> None:
    """Loss: boxes of a lost 1.jpg.png on 1.jpg, because `1.jpg.xml` comes before `1.xml`."""
    xml = {"Annotations/1.jpg": B, "Annotations/1": A, "Annotations/2.jpg": B}
    train = load_index(write(tmp_path, xml, ["JPEGImages/1.jpg", "JPEGImages/2.jpg"], {"train": "1\n1.jpg\n2.jpg\n"}), "train")
    assert boxes(train, tmp_path / "JPEGImages") == {"1.jpg": [A], "2.jpg": [B]} and counted(train) == {"image file missing": 1}


def test_an_xml_without_image_takes_none_from_another_folder_that_has_an_xml(tmp_path: Path) -> None:
    """Loss: boxes of a lost picture on one of another folder."""
    config = write(tmp_path, {"Annotations/x/1": A, "Annotations/1": B}, ["images/train/1.jpg", "images/train/1.png", "images/val/2.jpg"])
    train = load_index(config, "train")
    assert boxes(train, tmp_path / "images" / "train") == {"1.jpg": [B]}
    assert counted(train) == {"no xml for an image": 1, "image file missing": 1}
