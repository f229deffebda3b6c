"""What a data set holds beyond boxes, classes and sizes: it is counted, and is not in what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gai_yolo.data.formats import coco, yolo_txt
from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.reading import Doubt, read_file, read_text
from gai_yolo.data.formats.voc_files import find_xml, parsed_voc
from gai_yolo.data.index import Index
from gai_yolo.data_convert.part import WRITTEN_BY
from gai_yolo.data_convert.source import Source
from gai_yolo.errors import DataError

IS_LOST = "lost"
OUTLINE, KEYPOINTS = "outline of an object", "keypoints of an object"
"""Rows of YOLO with more than confidence and track behind the box; `kpt_shape` in the yaml says which they are."""
MOST_KINDS = 30
"""Different keys that are told of; of data sets with more the rest is one row."""
LONGEST_KEY = 40
"""Letters."""
NOTHING: tuple[Any, ...] = (None, "", [], {}, 0, False, {"description": WRITTEN_BY})
PLAIN_MARKS = frozenset({"", "0", "Unspecified", "Unknown", "No", WRITTEN_BY})
"""What an xml says of an object of which it says nothing."""


def beyond(source: Source) -> list[tuple[Split | None, Problems]]:
    """What is lost of each split, or of all of them (None) where files cannot be told apart by split.

    Raises:
        DataError, CannotRead: a file cannot be read any more.
    """
    if source.form == "bdd100k":
        return [*source.beyond]
    folders = Folders(Doubt())
    if source.form == "voc":
        return [(None, _of_voc(source.root, folders))]
    if source.form == "yolo":
        description = source.config.path if source.config.path.is_file() else yolo_txt.find_yaml(source.config.path, folders)
        assert description is not None
        of_all = Problems()
        keys = yolo_txt.other_keys(description, folders.doubt)
        for key in keys:
            if key != "kpt_shape":
                of_all.add(f"`{key[:LONGEST_KEY]}` of the description", str(description), IS_LOST)
        kind = KEYPOINTS if "kpt_shape" in keys else OUTLINE
        return [(None, of_all), *((split, _of_yolo(index, kind, folders)) for split, index in source.indexes.items())]
    return [(split, _of_coco(source, split, folders)) for split in source.indexes]


def _of_coco(source: Source, split: Split, folders: Folders) -> Problems:
    path = coco.find_annotations(source.root, source.place(split), split, folders)
    content = _object(path, folders.doubt)
    problems = Kinds(str(path))
    known: Mapping[str, tuple[str, Set[str]]] = {
        "annotations": ("an annotation", {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}),
        "images": ("an image", {"id", "file_name", "width", "height"}),
        "categories": ("a category", {"id", "name"}),
    }
    for key, (whose, read) in known.items():
        for number, record in enumerate(content[key]):
            if isinstance(record, dict):
                problems.count(record, read, whose, f"{key}[{number}]")
    problems.count(content, set(known), "the json", "")
    return problems.found


class Kinds:
    """Counts what is written under keys that are not read, of each key."""

    def __init__(self, where: str) -> None:
        self.found, self._where, self._keys = Problems(), where, set[str]()

    def count(self, record: Mapping[str, Any], read: Set[str], whose: str, which: str) -> None:
        """Count the keys of a record that have a value."""
        for key, value in record.items():
            if key in read or value in NOTHING:
                continue
            kind = f"`{key[:LONGEST_KEY]}` of {whose}"
            if kind not in self._keys and len(self._keys) >= MOST_KINDS:
                kind = f"other keys of {whose}"
            self._keys.add(kind)
            self.found.add(kind, f"{self._where}, {which}" if which else self._where, IS_LOST)


def coco_values(source: Source, split: Split, field: str) -> dict[int, str]:
    """What a field of the image records says (`video_id`, `attributes.weather`), by image id; images without it are left out."""
    from gai_yolo.data_convert.bdd100k import value_at

    folders = Folders(Doubt())
    path = coco.find_annotations(source.root, source.place(split), split, folders)
    records = _object(path, folders.doubt)["images"]
    return {record["id"]: value for record in records if (value := value_at(record, field)) is not None}


def _object(path: Path | None, doubt: Doubt) -> dict[str, Any]:
    assert path is not None, "the index was read from it"
    try:
        content: dict[str, Any] = json.loads(read_text(path, "COCO json", doubt))
    except ValueError:
        raise DataError(f"{path}: has changed since it was read; start again.") from None
    return content


def _of_yolo(index: Index, kind: str, folders: Folders) -> Problems:
    problems = Problems()
    for path in map(Path, index.images.paths()):
        labels = yolo_txt.label_file(path, folders)
        if not folders.holds(labels):
            continue
        for number, line in enumerate(read_file(labels).decode("utf-8-sig", errors="replace").splitlines(), start=1):
            if len(line) > 20 and len(line.split()) > 7:
                problems.add(kind, f"{labels}, line {number}", "lost; its box is kept")
    return problems


def _of_voc(root: Path, folders: Folders) -> Problems:
    problems = Problems()
    for path in find_xml(root, folders):
        tree = parsed_voc(read_file(path))
        if tree is None:
            continue
        for element in tree:
            if element.tag not in ("folder", "filename", "path", "size", "object") and _says(element):
                problems.add(f"`{str(element.tag)[:LONGEST_KEY]}` of an xml", str(path), IS_LOST)
        for number, item in enumerate(tree.iter("object"), start=1):
            for element in item:
                if element.tag not in ("name", "bndbox") and _says(element):
                    action = "lost; the object is kept" if element.tag == "difficult" else IS_LOST
                    problems.add(f"`{str(element.tag)[:LONGEST_KEY]}` of an object", f"{path}, object {number}", action)
    return problems


def _says(element: ElementTree.Element) -> bool:
    return any((one.text or "").strip() not in PLAIN_MARKS for one in element.iter())
