"""A share that refuses for a moment while an index is read changes nothing of what is trained on; what stays unread is told or refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import pytest

from gai_yolo.data import index_cache
from gai_yolo.data.formats import reading
from gai_yolo.data.sources import load_index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig

NAMES = ("a", "b", "c", "d")
XML = """<annotation><filename>{0}.jpg</filename><object><name>{0}</name>
<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in NAMES:
        assert cv2.imwrite(str(folder / f"{name}.jpg"), np.zeros((40, 60, 3), np.uint8))


def write_yolo(root: Path) -> None:
    write_images(root / "images" / "train")
    (root / "labels" / "train").mkdir(parents=True)
    for name in NAMES:
        (root / "labels" / "train" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text(json.dumps({"train": "images/train", "val": "images/train", "names": ["cat"]}))


def write_voc(root: Path) -> None:
    write_images(root / "images" / "train")
    (root / "voc").mkdir()
    for name in NAMES:
        (root / "voc" / f"{name}.xml").write_text(XML.format(name))


def write_coco(root: Path) -> None:
    write_images(root / "images" / "train")
    (root / "annotations").mkdir()
    images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate(NAMES)]
    boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [5, 5, 20, 20]} for number in range(len(NAMES))]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


WRITERS: dict[str, Callable[[Path], None]] = {"yolo": write_yolo, "voc": write_voc, "coco": write_coco}
ANNOTATIONS = {"yolo": "b.txt", "voc": "b.xml", "coco": "instances_train2017.json"}


class Share:
    """Refuses to open files, and to list folders, of some names for so many times each."""

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}
        self.error = errno.EACCES
        self.struck: list[str] = []

    def open_file(self, path: Path) -> BinaryIO:
        self.check(path)
        return path.open("rb")

    def check(self, path: Path) -> None:
        if self.failures.get(path.name, 0):
            self.failures[path.name] -= 1
            self.struck.append(path.name)
            raise OSError(self.error, os.strerror(self.error), str(path))

    def refuse(self, names: Iterable[str], times: int) -> None:
        self.failures = dict.fromkeys(names, times)
        self.struck = []


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Share:
    monkeypatch.setattr(index_cache, "LEAST_IMAGES", 1)
    monkeypatch.setattr(reading, "DOUBT_PATIENCE", 1.0)
    monkeypatch.setattr(reading, "PATIENCE", 1.0)
    share = Share()
    listdir, scandir = os.listdir, os.scandir

    def checked_listdir(path: str) -> list[str]:
        share.check(Path(path))
        return listdir(path)

    def checked_scandir(path: str) -> object:
        share.check(Path(path))
        return scandir(path)

    monkeypatch.setattr(reading, "open_file", share.open_file)
    monkeypatch.setattr(os, "listdir", checked_listdir)
    monkeypatch.setattr(os, "scandir", checked_scandir)
    return share


def config_of(root: Path) -> DataConfig:
    return DataConfig(path=root, cache_folder=root.parent / "cache", max_bad_fraction=0.5)


def caches(root: Path) -> list[Path]:
    return list((root.parent / "cache" / "index").glob("*.index"))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.ENXIO, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_hiccup_makes_no_other_data_set(error: int, kind: str, share: Share, tmp_path: Path) -> None:
    """Loss: an image is trained on as background, or not at all, or with the class numbers of a list that is one short."""
    root = tmp_path / "set"
    WRITERS[kind](root)
    share.error = error
    share.refuse(["b.jpg", "c.jpg", ANNOTATIONS[kind]], 2)
    index = load_index(config_of(root), "train")
    assert sorted(set(share.struck)) == sorted(["b.jpg", "c.jpg", ANNOTATIONS[kind]]), "refused it has"
    assert index.problems == () and [len(image.boxes) for image in index.images] == [1, 1, 1, 1]
    assert len(caches(root)) == 1


@pytest.mark.parametrize(
    ("kind", "folder"), [("yolo", "train"), ("voc", "voc"), ("voc", "set"), ("coco", "annotations"), ("coco", "train")]
)
def test_a_folder_that_cannot_be_listed_for_a_moment_is_not_empty(kind: str, folder: str, share: Share, tmp_path: Path) -> None:
    """Loss: another format is found in the data set than at the last start, or nothing, which is refused."""
    root = tmp_path / "set"
    WRITERS[kind](root)
    share.refuse([folder], 3)
    index = load_index(config_of(root), "train")
    assert share.struck and index.problems == () and len(index) == len(NAMES)


@pytest.mark.parametrize("kind", WRITERS)
def test_annotations_that_stay_unreadable_are_refused(kind: str, share: Share, tmp_path: Path) -> None:
    """Loss: nothing is said but a line among others, and the images in question train as background for the life of the run."""
    root = tmp_path / "set"
    WRITERS[kind](root)
    share.refuse([ANNOTATIONS[kind]], 10**6)
    with pytest.raises(DataError, match=rf"{ANNOTATIONS[kind]}: cannot read the .* \(Permission denied\)") as caught:
        load_index(config_of(root), "train")
    assert not caught.value.is_transient, "somebody has to see to it"
    assert caches(root) == []
    share.refuse([], 0)
    assert load_index(config_of(root), "train").problems == ()


def test_labels_that_lead_nowhere_are_refused_at_once(tmp_path: Path) -> None:
    """Loss: a link farm of which the labels were not fetched trains as background."""
    root = tmp_path / "set"
    write_yolo(root)
    (root / "labels" / "train" / "b.txt").unlink()
    (root / "labels" / "train" / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"b\.txt: cannot read the labels \(No such file or directory\)"):
        load_index(config_of(root), "train")


def test_images_that_stay_unreadable_are_told_and_not_remembered(share: Share, tmp_path: Path) -> None:
    """Loss: a data set whose rights were mended stays without these images."""
    root = tmp_path / "set"
    write_coco(root)
    share.refuse(["b.jpg", "c.jpg"], 10**6)
    (problem,) = load_index(config_of(root), "train").problems
    assert (problem.kind, problem.count, problem.action) == ("image file cannot be opened", 2, "image skipped")
    assert problem.example == str(root / "images" / "train" / "b.jpg")
    assert caches(root) == []
    share.refuse([], 0)
    assert load_index(config_of(root), "train").problems == () and len(caches(root)) == 1
