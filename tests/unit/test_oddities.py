"""Data sets as people have them, modelled on public bug reports: each oddity is read right, or counted, or refused with its place."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from gai_yolo.config import load_config
from gai_yolo.data.dataset import EvaluationSet
from gai_yolo.data.images import ImageSource, check_decodable
from gai_yolo.data.index import Index
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.data.sources import load_index, load_indexes
from gai_yolo.detector import YOLO12
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.world import World
from gai_yolo.errors import DataError
from gai_yolo.evaluation.coco_metrics import coco_metrics
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.sections import DataConfig, EvaluationConfig

WIDTH, HEIGHT = 64, 48
ROW = "0 0.375 0.375 0.25 0.25"
BOX = [16.0, 12.0, 32.0, 24.0]


def write_image(path: Path, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(path, kind)


def write_yolo(root: Path, rows: dict[str, str], yaml: str = "names: [a]\n") -> DataConfig:
    """Both splits alike: labels by the name of an image."""
    for split in ("train", "val"):
        for name, text in rows.items():
            write_image(root / "images" / split / f"{name}.jpg")
            label = root / "labels" / split / f"{name}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\n{yaml}", encoding="utf-8")
    return DataConfig(path=root, cache_folder=root.parent / "cache")


def write_voc(root: Path, boxes: dict[str, tuple[int, int, int, int]]) -> DataConfig:
    """An xml, and unless that is there an image beside it, for each path without suffix."""
    for stem, corners in boxes.items():
        edges = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        xml = root / f"{stem}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(
            f"<annotation><filename>{xml.stem}.jpg</filename><object><name>a</name><bndbox>{edges}</bndbox></object></annotation>"
        )
    return DataConfig(path=root, cache_folder=root.parent / "cache")


def counted(index: Index) -> dict[str, int]:
    return {problem.kind: problem.count for problem in index.problems}


def boxes(index: Index) -> dict[str, Any]:
    return {image.path.name: image.boxes.round(3).tolist() for image in index.images}


# --- right boxes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "yaml"),
    [
        (f"{ROW} 0.3 0.3 0.4 0.4 0 0", "names: [a]\nkpt_shape: [3, 2]\n"),
        (f"{ROW} 0.3 0.3 2 0 0 0", "names: [a]\nkpt_shape: [2, 3]\n"),
        (f"{ROW} 0.91", "names: [a]\n"),
        (f"{ROW} 0.91 17", "names: [a]\n"),
        ("0 0.25 0.25 0.5 0.25 0.5 0.5 0.25 0.5", "names: [a]\n"),
        ("0 0.25 0.25 0.5 0.25 0.5 0.5 0.375 0.5 0.25 0.5", "names: [a]\n"),
    ],
    ids=["keypoints", "keypoints with visibility", "confidence", "confidence and track", "oriented", "mask"],
)
def test_rows_of_other_tasks_give_the_box_that_their_format_says(row: str, yaml: str, tmp_path: Path) -> None:
    """Loss: a box of all numbers in the row, from the corner of the image to the farthest keypoint."""
    train, _ = load_indexes(write_yolo(tmp_path / "data", {"1": row}, yaml))
    assert boxes(train) == {"1.jpg": [BOX]}


@pytest.mark.parametrize("points", ["0.3 0.3 0.4 0.4 0 0", "0.3 0.3 2 0.4 0.4 1 0 0 0"])
def test_rows_that_may_be_keypoints_or_outlines_are_refused_with_their_line(points: str, tmp_path: Path) -> None:
    """Loss: as above, because the yaml does not say what they are."""
    with pytest.raises(DataError, match=r"1\.txt, line 2: may be a box with keypoints or an outline; write `kpt_shape"):
        load_indexes(write_yolo(tmp_path / "data", {"1": f"{ROW}\n{ROW} {points}"}))


def test_a_mask_that_may_be_keypoints_among_others_that_cannot_is_a_mask(tmp_path: Path) -> None:
    """Loss: a good data set that is refused for one row."""
    doubtful, plain = f"{ROW} 0.3 0.3 0.4 0.4 0.35 0.35", "0 0.1 0.1 0.9 0.1 0.9 0.9 0.5 0.95 0.1 0.9"
    train, _ = load_indexes(write_yolo(tmp_path / "data", {"1": doubtful, "2": f"{plain}\n0 0.2 0.1 0.9 0.1 0.9 0.9 0.5 0.95 0.1 0.9"}))
    assert len(train.images[0].boxes) == 1 and len(train.images[1].boxes) == 2


def turned_back(picture: Image.Image, orientation: int) -> Image.Image:
    """As a camera stores it that was held so."""
    moves = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of PIL.Image.Transpose; those of 6 and 8 undo each other
    return picture if orientation == 1 else picture.transpose(Image.Transpose(moves[orientation]))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_refer_to_what_the_annotator_saw(orientation: int, suffix: str, tmp_path: Path) -> None:
    """Loss: a phone's pictures are learned lying on their side, with boxes that stand."""
    config = write_yolo(tmp_path / "data", {"1": ROW})
    seen = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    seen[12:24, 16:32] = (250, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("train", "val"):
        (tmp_path / "data" / "images" / split / "1.jpg").unlink()
        path = tmp_path / "data" / "images" / split / f"1.{suffix}"
        turned_back(Image.fromarray(seen), orientation).save(path, exif=exif)
        assert np.abs(np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int) - seen).mean() < 9
    train, _ = load_indexes(config)
    (record,) = train.images
    assert (record.width, record.height, record.boxes.tolist()) == (WIDTH, HEIGHT, [BOX])
    for cache in ("none", "ram", "disk"):
        image = ImageSource([record], WIDTH, cache, tmp_path / "cache").load(0)
        assert image is not None and np.abs(image.astype(int) - seen).mean() < 9
    assert counted(train) == ({} if orientation == 1 else {"image that its EXIF data turns": 1})


def test_an_annotated_size_says_whether_boxes_are_of_the_pixels_as_stored(tmp_path: Path) -> None:
    """Loss: boxes of COCO's own images, whose sizes are those of the pixels, are turned away from their objects."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, size in (("train", (WIDTH, HEIGHT)), ("val", (HEIGHT, WIDTH))):
        write_image(tmp_path / "images" / split / "1.jpg")
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / split / "1.jpg", exif=exif)
        content = {
            "images": [{"id": 1, "file_name": "1.jpg", "width": size[0], "height": size[1]}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [16, 12, 16, 12]}],
            "categories": [{"id": 1, "name": "a"}],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    train, val = load_indexes(DataConfig(path=tmp_path, cache_folder=tmp_path / "cache"))
    assert [(one.images[0].width, one.images[0].height, one.images[0].orientation) for one in (train, val)] == [(64, 48, 1), (48, 64, 6)]
    assert [one.problems[0].action for one in (train, val)] == [
        "not turned, as its annotated size wants it",
        "turned upright, which its boxes refer to",
    ]


def test_a_box_that_is_written_twice_counts_once(tmp_path: Path) -> None:
    """Loss: a perfect detector gets half of the precision."""
    config = write_yolo(tmp_path / "data", {"1": f"{ROW}\n{ROW}\n1 0.375 0.375 0.25 0.25"}, "names: [a, b]\n")
    train, _ = load_indexes(config)
    assert train.images[0].classes.tolist() == [0, 1] and counted(train) == {"box that is there twice": 1}


def test_an_image_of_two_ids_is_one_image(tmp_path: Path) -> None:
    """Loss: an epoch that sees it twice, and each time without half of its boxes."""
    for split in ("train", "val"):
        write_image(tmp_path / "images" / split / "1.jpg")
        content = {
            "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "./1.jpg"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [16, 12, 16, 12]},
                {"id": 2, "image_id": 2, "category_id": 1, "bbox": [16, 12, 16, 12]},
                {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 8, 8]},
            ],
            "categories": [{"id": 1, "name": "a"}],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    train, _ = load_indexes(DataConfig(path=tmp_path, cache_folder=tmp_path / "cache"))
    assert boxes(train) == {"1.jpg": [BOX, [0, 0, 8, 8]]}
    assert counted(train) == {"image that is named twice": 1, "box that is there twice": 1}


def test_splits_that_number_their_images_alike_keep_their_own_boxes(tmp_path: Path) -> None:
    """Loss: every split begins with frame 1, and train is learned with the boxes of valid."""
    config = write_voc(tmp_path / "data", {"train/1": (16, 12, 32, 24), "valid/1": (40, 12, 60, 24)})
    for split in ("train", "valid"):
        write_image(tmp_path / "data" / split / "1.jpg")
    train, val = load_indexes(config)
    assert boxes(train) == {"1.jpg": [BOX]} and boxes(val) == {"1.jpg": [[40, 12, 60, 24]]}


def test_of_two_pictures_of_one_stem_the_xml_says_which(tmp_path: Path) -> None:
    """Loss: one of them is lost without a word, and it may be the annotated one."""
    config = write_voc(tmp_path / "data", {"train/1": (16, 12, 32, 24), "val/2": (1, 1, 9, 9)})
    for name in ("train/1.jpg", "train/1.png", "val/2.jpg"):
        write_image(tmp_path / "data" / name)
    train, _ = load_indexes(config)
    assert boxes(train) == {"1.jpg": [BOX]} and counted(train) == {"no xml for an image": 1}


def test_names_are_the_texts_that_stand_in_the_file(tmp_path: Path) -> None:
    """Loss: the classes `yes`, `no`, `010` and `12:30` are called True, False, 8 and 750; so is an experiment."""
    rows = "\n".join(f"{number} 0.375 0.375 0.25 0.25" for number in range(5))
    train, _ = load_indexes(
        write_yolo(tmp_path / "data", {"1": rows}, "names:\n  0: yes\n  1: no\n  2: 010\n  3: 12:30\n  4: '~'\nnc: 5\n")
    )
    assert train.class_names == ["yes", "no", "010", "12:30", "~"]
    path = tmp_path / "config.yaml"
    path.write_text("experiment:\n  name: 010\ndata:\n  path: 1_0\n")
    config = load_config(path)
    assert (config.experiment.name, str(config.data.path)) == ("010", "1_0")
    assert load_config(path, ["experiment.name=1e3"]).experiment.name == "1e3"
    path.write_text("loss:\n  class_weights: {no: 2, 010: 3.0, '~': 1, 12:30: 4}\n")
    assert load_config(path).loss.class_weights == {"no": 2.0, "010": 3.0, "~": 1.0, "12:30": 4.0}
    assert load_config(path, ["loss.class_weights={yes: 5, 0: 1}"]).loss.class_weights == {"yes": 5.0, "0": 1.0}
    one_more = {"no": 2.0, "010": 3.0, "~": 1.0, "12:30": 4.0, "0": 7.0}
    assert load_config(path, ["loss.class_weights.0=7"]).loss.class_weights == one_more
    assert load_config(path, ["loss.class_weights=auto"]).loss.class_weights == "auto"
    assert load_config(path, ["model.weights=null"]).model.weights is None


# --- nothing left out in silence --------------------------------------------------------------------------------------------------


def test_usual_suffixes_are_read_and_others_counted(tmp_path: Path) -> None:
    """Loss: half of the labelled images are left out, and nothing says so."""
    config = write_yolo(tmp_path / "data", {"1": ROW})
    folder = tmp_path / "data" / "images" / "train"
    write_image(folder / "2.jfif", "JPEG")
    for name in ("3.heic", "4.AVIF", "notes.md", "._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "__MACOSX/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    train, _ = load_indexes(config)
    assert list(boxes(train)) == ["1.jpg", "2.jfif"]
    assert counted(train) == {"file that may be an image, of a kind that is not read": 2}


@pytest.mark.parametrize(("side", "kinds"), [(13_500, {}), (33_000, {"image with more pixels than OpenCV decodes": 1})])
def test_huge_images_are_read_or_told_without_a_librarys_warning(side: int, kinds: dict[str, int], tmp_path: Path) -> None:
    """Loss: a page of an aerial survey is left out as unreadable, or a warning of Pillow's makes people doubt their results."""
    config = write_yolo(tmp_path / "data", {"1": ROW})
    (tmp_path / "data" / "images" / "train" / "2.pgm").write_bytes(f"P5 {side} {side} 255\n".encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, _ = load_indexes(config.model_copy(update={"max_bad_fraction": 0.5}))
    assert counted(train) == kinds and len(train) == 2 - len(kinds)


def test_labels_in_capitals_count_and_those_without_image_are_told(tmp_path: Path) -> None:
    """Loss: images without boxes, because a camera's computer wrote 1.TXT; or labels whose images were lost."""
    config = write_yolo(tmp_path / "data", {"1": ROW})
    labels = tmp_path / "data" / "labels" / "train"
    (labels / "1.txt").rename(labels / "1.TXT")
    (labels / "lost.txt").write_text(ROW)
    (labels / "classes.txt").write_text("a")
    train, _ = load_indexes(config)
    assert boxes(train) == {"1.jpg": [BOX]} and counted(train) == {"label file without an image": 1}


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    """Loss: eight of ten images are left out without a word; or a start that never ends."""
    config = write_yolo(tmp_path / "data", {"1": ROW})
    folder = tmp_path / "data" / "images" / "train"
    write_image(tmp_path / "store" / "2.jpg")
    (folder / "part").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "store" / "back").symlink_to(folder, target_is_directory=True)
    (tmp_path / "data" / "labels" / "train" / "part").mkdir()
    (tmp_path / "data" / "labels" / "train" / "part" / "2.txt").write_text(ROW)
    train, _ = load_indexes(config)
    assert boxes(train) == {"1.jpg": [BOX], "2.jpg": [BOX]}


def test_names_in_another_form_of_unicode_are_the_same_names(tmp_path: Path) -> None:
    """Loss: a data set that went through macOS, where every name with an accent is missing."""
    composed, apart = (unicodedata.normalize(form, "Stück") for form in ("NFC", "NFD"))
    config = write_yolo(tmp_path / "data", {composed: ROW})
    for split in ("train", "val"):
        labels = tmp_path / "data" / "labels" / split
        (labels / f"{composed}.txt").rename(labels / f"{apart}.txt")
        (tmp_path / "data" / f"{split}.txt").write_text(f"images/{split}/{apart}.jpg\n", encoding="utf-8")
    for listed in (False, True):
        if listed:
            (tmp_path / "data" / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [a]\n")
        train, _ = load_indexes(config)
        assert boxes(train) == {f"{composed}.jpg": [BOX]}


def test_names_that_are_no_text_can_be_worked_with(tmp_path: Path) -> None:
    """Loss: a traceback for an umlaut in a zip of another system."""
    config = write_yolo(tmp_path / "data", {"1": ROW})
    for folder in (tmp_path / "data" / kind / "train" for kind in ("images", "labels")):
        for path in list(folder.iterdir()):
            path.rename(folder / os.fsdecode(b"St\xfcck" + os.fsencode(path.suffix)))
    train, _ = load_indexes(config)
    assert [os.fsencode(image.path.name) for image in train.images] == [b"St\xfcck.jpg"] and len(train.images[0].boxes) == 1
    assert len(train.digest()) == 64


def test_backslashes_of_windows_part_folders(tmp_path: Path) -> None:
    """Loss: "restore the files", although all are there."""
    for split in ("train", "val"):
        write_image(tmp_path / "images" / split / "cam 1" / "1.jpg")
        content = {
            "images": [{"id": 1, "file_name": "cam 1\\1.jpg"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [16, 12, 16, 12]}],
            "categories": [{"id": 1, "name": "a"}],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    train, _ = load_indexes(DataConfig(path=tmp_path, cache_folder=tmp_path / "cache"))
    assert boxes(train) == {"1.jpg": [BOX]}


def test_lists_of_names_with_blanks_and_class_columns(tmp_path: Path) -> None:
    """Loss: one of ten images is left, because a name ends at its first blank."""
    root = tmp_path / "data"
    config = write_voc(root, {f"Annotations/{name}": (16, 12, 32, 24) for name in ("site A 1", "b", "c")})
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, lines in (("train", "site A 1\nb -1\n"), ("val", "c  1\n")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    for name in ("site A 1", "b", "c"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
    train, val = load_indexes(config)
    assert list(boxes(train)) == ["b.jpg", "site A 1.jpg"] and list(boxes(val)) == ["c.jpg"]


@pytest.mark.parametrize("encoding", ["utf-16", "gb2312", "cp1251", "shift_jis", "latin-1"])
def test_xml_in_whatever_encoding_it_names(encoding: str, tmp_path: Path) -> None:
    """Loss: a tool of another country wrote it, and every file is called broken."""
    root = tmp_path / "data"
    config = write_voc(root, {"train/1": (16, 12, 32, 24), "val/2": (16, 12, 32, 24)})
    name = {"gb2312": "猫", "cp1251": "кот", "shift_jis": "猫", "latin-1": "Kätzchen", "utf-16": "猫"}[encoding]
    for path in root.rglob("*.xml"):
        text = path.read_text().replace("<name>a<", f"<name>{name}<")
        path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'.encode(encoding))
        write_image(path.with_suffix(".jpg"))
    train, _ = load_indexes(config)
    assert train.class_names == [name] and boxes(train) == {"1.jpg": [BOX]}


@pytest.mark.parametrize(("bad", "refused"), [(1, False), (2, True), (10, True)])
def test_what_only_the_decoder_finds_is_held_against_max_bad_fraction(bad: int, refused: bool, tmp_path: Path) -> None:
    """Loss: a training of days on grey without boxes, because the headers of TIFFs of 32 bits are in order."""
    config = write_yolo(tmp_path / "data", {str(number): ROW for number in range(10)})
    for number in range(bad):
        path = tmp_path / "data" / "images" / "train" / f"{number}.jpg"
        path.unlink()
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(path.with_suffix(".tif"))
    train, _ = load_indexes(config)
    assert len(train) == 10
    if refused:
        with pytest.raises(DataError, match=rf"{bad} of 10 images that were tried cannot be decoded, .*\(first: .*0\.tif\)"):
            check_decodable(train, WIDTH, config.max_bad_fraction)
    else:
        check_decodable(train, WIDTH, config.max_bad_fraction)


def test_a_validation_image_that_cannot_be_decoded_is_left_out_of_the_metrics(tmp_path: Path, world: World) -> None:
    """Loss: its boxes count as missed, and a data set with damaged files has a worse model."""
    config = write_yolo(tmp_path / "data", {str(number): ROW for number in range(4)})
    path = tmp_path / "data" / "images" / "val" / "2.jpg"
    path.unlink()
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(path.with_suffix(".tif"))
    _, val = load_indexes(config)
    loader = EvaluationLoader(EvaluationSet(ImageSource(val.images, WIDTH, "none", tmp_path)), 2, 0, 1, 0, False)
    evaluation = Evaluator(loader, val, DetectionLoss(), world, EvaluationConfig(), "none", False)(YOLO12("n", 1).eval())
    assert evaluation.unreadable == [3]
    rest = replace(val, images=val.images.without({3}))
    assert evaluation.metrics.stats == coco_metrics(rest, evaluation.detections).stats


# --- nothing to learn or to measure --------------------------------------------------------------------------------------------------


def test_only_crowds_are_nothing_to_learn(tmp_path: Path) -> None:
    """Loss: a training of days with a box loss of 0."""
    write_image(tmp_path / "images" / "train" / "1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [16, 12, 16, 12], "iscrowd": 1}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"none of the 1 training images has a usable box \(1 x crowd region, not learned\)"):
        load_index(DataConfig(path=tmp_path, cache_folder=tmp_path / "cache"), "train")


def test_what_cannot_be_measured_or_learned_is_said_before_training(tmp_path: Path) -> None:
    """Loss: dashes in place of metrics, and no best.pt, at the end of a training of days."""
    config = write_yolo(tmp_path / "data", {"1": ROW}, "names: [a, b]\n")
    train, val = load_indexes(config)
    assert counted(train) == counted(val) == {"class without a box": 1}
    (tmp_path / "data" / "labels" / "val" / "1.txt").write_text("")
    _, val = load_indexes(config)
    assert counted(val) == {"validation image in a set without any box": 1}
    assert "no best.pt" in val.problems[0].action


def test_without_a_home_there_is_no_cache_and_no_complaint(tmp_path: Path) -> None:
    """Loss: a container's user without a home folder is refused for a cache that is not needed."""
    config = write_yolo(tmp_path / "data", {"1": ROW}).model_copy(update={"cache_folder": Path("~nobody-of-that-name/cache")})
    train, _ = load_indexes(config)
    np.testing.assert_allclose(train.images[0].boxes, [BOX])
