"""Reads COCO detection json (https://cocodataset.org/#format-data).

What is taken: `images` (id, file_name; width and height are compared with the file), `annotations` (image_id,
category_id, bbox [x, y, width, height] in pixels, iscrowd, area) and `categories` (id, name). Category ids may be sparse;
classes are their positions in ascending order of id. Segmentations are not read. Images are ordered by id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gai_yolo.data.formats.check import (
    NO_AREA,
    NOT_NAMED,
    SPLIT_NAMES,
    UNKNOWN_CLASS,
    RawBox,
    RawImage,
    Split,
    build_index,
    expand,
    is_text,
    read_text,
)
from gai_yolo.data.formats.coco_images import image_folder, is_of_one_split, unnamed
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.problems import Problems
from gai_yolo.data.formats.reading import Doubt
from gai_yolo.data.index import Category, Index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

USUAL_JSON = "annotations/train.json, annotations/instances_train*.json, train/_annotations.coco.json"
MALFORMED = "malformed annotation"
UNKNOWN_IMAGE = "annotation of an unknown image"
DUPLICATE = "duplicate annotation id"


def read_coco(root: Path, config: DataConfig, split: Split, folders: Folders) -> Index:
    """Read one split of a COCO data set.

    Raises:
        DataError: json or image folder is not found, the json is damaged or lacks what every COCO file has, an image id
            occurs twice, a file name leads out of the image folder, or too many images are bad.
    """
    place = config.train if split == "train" else config.val
    source = find_annotations(root, place, split, folders)
    if source is None:
        raise DataError(f"{root}: found no COCO json of the {split} split (usual: {USUAL_JSON}); set data.{split}.annotations.")
    content = _load(source, folders.doubt)
    categories = _categories(content["categories"], source)
    names = _file_names(content["images"], source)
    folder = image_folder(names, root, place, split, source, folders)
    images = _images(content["images"], folder, source, folders)
    problems = Problems()
    _count_not_named(images, folder, root, config, split, source, folders, problems)
    _attach_boxes(content["annotations"], images, categories, problems, source)
    ordered = [images[key] for key in sorted(images)]
    return build_index(str(source), categories, ordered, problems, config.max_bad_fraction, folders)


def find_annotations(root: Path, place: SplitConfig, split: Split, folders: Folders) -> Path | None:
    """The json of a split: where the configuration says, or in a usual place; None if there is none.

    Raises:
        DataError: the configured file is not there, or several usual ones are.
    """
    if place.annotations is not None:
        path = root / expand(place.annotations)
        if not path.is_file():
            raise DataError(f"{path}: no such file; correct data.{split}.annotations (relative to data.path).")
        return path if path.suffix.lower() == ".json" else None
    for name in SPLIT_NAMES[split]:
        plain, roboflow = root / "annotations" / f"{name}.json", root / name / "_annotations.coco.json"
        several = folders.matching(root / "annotations", f"instances_{name}*.json")
        if plain.is_file():
            return plain
        if len(several) > 1:
            names = ", ".join(path.name for path in several)
            raise DataError(f"{root / 'annotations'}: several files could be the {split} split ({names}); set data.{split}.annotations.")
        if several:
            return several[0]
        if roboflow.is_file():
            return roboflow
    return None


def _load(source: Path, doubt: Doubt) -> dict[str, Any]:
    text = read_text(source, "COCO json", doubt)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); restore the file.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not usable JSON ({error}); restore the file.") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{source}: a COCO file is an object with images, annotations and categories, this is a {type(content).__name__}; "
            "give the ground truth, not results."
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            state = f"is a {type(content[key]).__name__}, not a list" if key in content else "is missing"
            raise DataError(f"{source}: the key `{key}` {state}; a COCO file has lists images, annotations and categories.")
    return content


def _categories(records: list[Any], source: Path) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for position, record in enumerate(records):
        if not isinstance(record, dict) or not _is_id(record.get("id")) or not is_text(record.get("name")):
            raise DataError(f"{source}: categories[{position}] needs a whole number `id` and a text `name`; correct the record.")
        if record["id"] in found:
            raise DataError(f"{source}: category id {record['id']} occurs twice; give each class its own id.")
        found[record["id"]] = Category(record["id"], record["name"])
    if not found:
        raise DataError(f"{source}: the list of categories is empty; there is nothing to learn.")
    return tuple(found[key] for key in sorted(found))


def _file_names(records: list[Any], source: Path) -> list[str]:
    for position, record in enumerate(records):
        if not isinstance(record, dict) or not _is_id(record.get("id")) or not is_text(record.get("file_name")):
            raise DataError(f"{source}: images[{position}] needs a whole number `id` and a text `file_name`; correct the record.")
    return [record["file_name"] for record in records]


def _images(records: list[Any], folder: Path, source: Path, folders: Folders) -> dict[int, RawImage]:
    where = f"{source}, annotation"
    images: dict[int, RawImage] = {}
    for record in records:
        key = record["id"]
        if key in images:
            raise DataError(f"{source}: image id {key} occurs twice; boxes could not be told apart, give each image its own id.")
        path = folders.path_inside(folder, record["file_name"], f"{source}, image {key}")
        size = (_number(record.get("width")), _number(record.get("height")))
        known = None if size[0] is None or size[1] is None else (size[0], size[1])
        images[key] = RawImage(key, path, where, size=known)
    return images


def _count_not_named(
    images: dict[int, RawImage],
    folder: Path,
    root: Path,
    config: DataConfig,
    split: Split,
    source: Path,
    folders: Folders,
    problems: Problems,
) -> None:
    """Count what lies among a split's images and is none of them; in a folder of both splits that is held against train."""
    named = [image.path for image in images.values()]
    if not is_of_one_split(folder, root, config, split, source):
        if split != "train":
            return
        try:
            other = find_annotations(root, config.val, "val", folders)
            names = [] if other is None else _file_names(_load(other, folders.doubt)["images"], other)
            named += [folders.path_inside(folder, name, str(other)) for name in names]
        except DataError:  # reading that split will tell
            return
    for path in unnamed(named, folder, folders):
        problems.add(NOT_NAMED, str(path), "not used")


def _attach_boxes(
    records: list[Any], images: dict[int, RawImage], categories: tuple[Category, ...], problems: Problems, source: Path
) -> None:
    positions = {category.id: position for position, category in enumerate(categories)}
    seen: set[int | str] = set()
    for number, record in enumerate(records):
        key = record.get("id") if isinstance(record, dict) else None
        example = f"{source}, annotation {key!r}" if isinstance(key, (int, str)) else f"{source}, annotations[{number}]"
        image = images.get(record["image_id"]) if isinstance(record, dict) and _is_id(record.get("image_id")) else None
        path = None if image is None else image.path
        if not isinstance(record, dict) or not _is_id(record.get("image_id")) or not _is_id(record.get("category_id")):
            problems.add(MALFORMED, example, "skipped", path)
        elif isinstance(key, (int, str)) and key in seen:
            problems.add(DUPLICATE, example, "second skipped", path, _corners(record))
        elif image is None:
            problems.add(UNKNOWN_IMAGE, f"{example} (image {record['image_id']})", "skipped")
        elif record["category_id"] not in positions:
            problems.add(UNKNOWN_CLASS, f"{example} (category {record['category_id']})", "skipped", path, _corners(record))
        elif (box := _box(record, positions[record["category_id"]], key if isinstance(key, (int, str)) else number)) is None:
            problems.add(MALFORMED, example, "skipped", path)
        else:
            image.boxes.append(box)
            if isinstance(key, (int, str)):
                seen.add(key)


def _box(record: dict[str, Any], position: int, key: int | str) -> RawBox | None:
    bbox, crowd, area = record.get("bbox"), record.get("iscrowd") or 0, _number(record.get("area"))
    if not isinstance(bbox, list) or len(bbox) != 4 or crowd not in (0, 1):
        return None
    values = list(_numbers(bbox))
    if len(values) != 4:
        return None
    x, y, width, height = values
    # An area that is not a number is no reason to lose the box.
    usable = area if area is not None and 0.0 < area < float("inf") else NO_AREA
    return RawBox((x, y, x + width, y + height), position, key, bool(crowd), None if record.get("area") is None else usable)


def _corners(record: dict[str, Any]) -> tuple[float, ...]:
    """Of a record that is not used, for whoever wants to see it; empty if it has no box."""
    box = _box(record, 0, 0)
    return () if box is None else box.corners


def _numbers(values: list[Any]) -> Iterator[float]:
    for value in values:
        number = _number(value)
        if number is not None:
            yield number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
