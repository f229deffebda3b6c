"""Names, folders and numbers that drawn data sets have stumbled over: each is read right, or counted, or refused with its place."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

WIDTH, HEIGHT = 64, 48
ROW = "0 0.375 0.375 0.25 0.25"
BOX, OTHER = [16.0, 12.0, 32.0, 24.0], [40.0, 12.0, 60.0, 24.0]
NFC, NFD = (unicodedata.normalize(form, "Stück") for form in ("NFC", "NFD"))


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(folder / name)


def write_coco(root: Path, names: list[str], split: str = "train", **annotation: Any) -> DataConfig:
    """A box for each image."""
    bbox = {"category_id": 1, "bbox": [16, 12, 16, 12]}
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"id": number, "image_id": number} | bbox | annotation for number in range(len(names))],
        "categories": [{"id": 1, "name": "a"}],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return DataConfig(path=root, cache_folder=root / "cache")


def write_yolo(root: Path, labels: dict[str, str], train: str = "images/train") -> DataConfig:
    for name, text in labels.items():
        path = root / "labels" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "data.yaml").write_text(f"train: {train}\nval: images/train\nnames: [a]\n")
    return DataConfig(path=root, cache_folder=root / "cache")


def counted(index: Index) -> dict[str, int]:
    return {problem.kind: problem.count for problem in index.problems}


def boxes(index: Index, folder: Path) -> dict[str, Any]:
    return {str(image.path.relative_to(folder)): image.boxes.tolist() for image in index.images}


# --- names -----------------------------------------------------------------------------------------------------------------------


def test_folders_in_another_form_of_unicode_are_the_same_folders(tmp_path: Path) -> None:
    """Loss: "restore the files", although all are there: only the folder's name went through macOS."""
    write_images(tmp_path / "images" / "train", f"{NFD}/day/1.jpg")
    index = load_index(write_coco(tmp_path, [f"{NFC}/day/1.jpg"]), "train")
    assert boxes(index, tmp_path / "images" / "train") == {f"{NFD}/day/1.jpg": [BOX]} and not index.problems


def test_labels_in_capitals_may_be_in_another_form_too(tmp_path: Path) -> None:
    """Loss: images without boxes, for two oddities that are each provided for."""
    write_images(tmp_path / "images" / "train", f"{NFC}.jpg")
    index = load_index(write_yolo(tmp_path, {f"{NFD}.TXT": ROW}), "train")
    assert boxes(index, tmp_path / "images" / "train") == {f"{NFC}.jpg": [BOX]} and not index.problems


def test_the_image_folder_is_the_one_that_holds_the_most(tmp_path: Path) -> None:
    """Loss: boxes of 1.jpg on another picture, train/1.jpg, because `images/train` holds a file of the first name."""
    folder = tmp_path / "images"
    write_images(folder, "1.jpg", "train/1.jpg", "train/2.jpg", "train/3.jpg")
    index = load_index(write_coco(tmp_path, ["1.jpg", "train/2.jpg", "train/3.jpg"]), "train")
    assert list(boxes(index, folder)) == ["1.jpg", "train/2.jpg", "train/3.jpg"]


def test_the_image_folder_is_found_by_names_of_windows(tmp_path: Path) -> None:
    """Loss: `images/train` is taken for the folder of `train\\1.jpg`, and every image is missing."""
    write_images(tmp_path / "images" / "train", "1.jpg")
    index = load_index(write_coco(tmp_path, ["train\\1.jpg"]), "train")
    assert boxes(index, tmp_path / "images") == {"train/1.jpg": [BOX]}


def test_a_list_with_a_line_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """Loss: a traceback of pathlib's."""
    write_images(tmp_path / "images" / "train", "1.jpg")
    (tmp_path / "train.txt").write_text("images/train/1.jpg\n/\n")
    with pytest.raises(DataError, match=r"train\.txt: a line names no file"):
        load_index(write_yolo(tmp_path, {"1.txt": ROW}, "train.txt"), "train")


# --- nothing left out in silence ---------------------------------------------------------------------------------------------------


def test_pictures_that_a_json_does_not_name_are_told(tmp_path: Path) -> None:
    """Loss: half of the pictures are not learned because an export broke off, and nothing says so."""
    folder = tmp_path / "images" / "train"
    write_images(folder, "1.jpg", "2.jpg", "cam 1/3.jpg", "cam 1/4.jpg", "not asked for/5.jpg", "._6.jpg")
    (folder / "7.heic").write_bytes(b"?")
    index = load_index(write_coco(tmp_path, ["1.jpg", "cam 1/3.jpg"]), "train")
    assert counted(index) == {"image that no annotation names": 3}
    assert index.problems[0].example == str(folder / "2.jpg")


@pytest.mark.parametrize("configured", [False, True])
def test_in_a_folder_of_both_splits_each_picture_is_told_once(configured: bool, tmp_path: Path) -> None:
    """Loss: as above; or every picture of val is told as left out of train."""
    write_images(tmp_path / ("pictures" if configured else "images"), "1.jpg", "2.jpg", "3.jpg")
    write_coco(tmp_path, ["2.jpg"], "val")
    config = write_coco(tmp_path, ["1.jpg"])
    if configured:
        place = SplitConfig(images=Path("pictures"))
        config = config.model_copy(update={"train": place, "val": place})
    train, val = (load_index(config, "train"), load_index(config, "val"))
    assert counted(train) == {"image that no annotation names": 1} and "3.jpg" in train.problems[0].example
    assert not val.problems


def test_labels_in_a_folder_without_images_are_told(tmp_path: Path) -> None:
    """Loss: a whole folder of pictures was lost, and its labels do not speak up."""
    write_images(tmp_path / "images" / "train", "1.jpg")
    index = load_index(write_yolo(tmp_path, {"1.txt": ROW, "cam 1/2.txt": ROW, "cam 1/classes.txt": "a"}), "train")
    assert counted(index) == {"label file without an image": 1}


def test_pictures_that_share_their_labels_are_told(tmp_path: Path) -> None:
    """Loss: boxes of 1.jpg are learned on 1.png, another picture."""
    write_images(tmp_path / "images" / "train", "1.jpg", "1.png", "2.jpg")
    index = load_index(write_yolo(tmp_path, {"1.txt": ROW}), "train")
    assert counted(index) == {"image that shares its label file with another": 1}
    assert "1.png (and 1.jpg)" in index.problems[0].example


def test_a_list_that_names_an_image_twice_is_told(tmp_path: Path) -> None:
    """Loss: somebody lists rare images ten times and believes that they are seen ten times."""
    write_images(tmp_path / "images" / "train", "1.jpg")
    (tmp_path / "train.txt").write_text("images/train/1.jpg\n./images/train/1.jpg\n")
    index = load_index(write_yolo(tmp_path, {"1.txt": ROW}, "train.txt"), "train")
    assert len(index) == 1 and counted(index) == {"image that is named twice": 1}


# --- numbers -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("area", "told"), [(100, False), (None, False), (0, True), (-1, True), ("192", True), (float("nan"), True), (1e12, True)]
)
def test_an_area_that_cannot_be_is_told_and_not_used(area: Any, told: bool, tmp_path: Path) -> None:
    """Loss: an area of more than 1e10 takes the box out of COCO's metrics; a perfect detector has no mAP."""
    write_images(tmp_path / "images" / "train", "1.jpg")
    index = load_index(write_coco(tmp_path, ["1.jpg"], area=area), "train")
    assert index.images[0].areas.tolist() == [100 if area == 100 else 192]
    assert counted(index) == ({"area that no object in the image can have": 1} if told else {})


def test_an_annotation_whose_first_of_its_id_is_malformed_is_read(tmp_path: Path) -> None:
    """Loss: a good box, for the bad one before it."""
    write_images(tmp_path / "images" / "train", "1.jpg")
    config = write_coco(tmp_path, ["1.jpg"])
    path = tmp_path / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"].insert(0, content["annotations"][0] | {"bbox": "?"})
    path.write_text(json.dumps(content))
    index = load_index(config, "train")
    assert boxes(index, tmp_path / "images" / "train") == {"1.jpg": [BOX]} and counted(index) == {"malformed annotation": 1}
