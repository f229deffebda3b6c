"""Reads COCO detection json (https://cocodataset.org/#format-data).

What is taken: `images` (id, file_name; width and height are compared with the file), `annotations` (image_id,
category_id, bbox [x, y, width, height] in pixels, iscrowd, area) and `categories` (id, name). Category ids may be sparse;
classes are their positions in ascending order of id. Segmentations are not read. Images are ordered by id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from gai_yolo.data.formats.check import NOT_NAMED, SPLIT_NAMES, UNKNOWN_CLASS, Problems, RawBox, RawImage, Split, build_index
from gai_yolo.data.formats.folders import Folders, is_picture
from gai_yolo.data.formats.reading import Doubt, expand, is_text, read_text
from gai_yolo.data.index import Category, Index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

USUAL_JSON = "annotations/train.json, annotations/instances_train*.json, train/_annotations.coco.json"
MALFORMED = "malformed annotation"
UNKNOWN_IMAGE = "annotation of an unknown image"
DUPLICATE = "duplicate annotation id"
_PROBED_NAMES = 20
"""So many file names decide which of the usual image folders is meant."""


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
    categories = _categories(content, source)
    names = _file_names(content, source)
    folder = _image_folder(names, root, place, split, source, folders)
    images = _images(content["images"], folder, source, folders)
    problems = Problems()
    for path in _not_named(images.values(), folder, root, config, split, source, folders):
        problems.add(NOT_NAMED, str(path), "not used")
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


def _records(content: dict[str, Any], key: str, name: str, source: Path) -> Iterator[dict[str, Any]]:
    for position, record in enumerate(content[key]):
        if not isinstance(record, dict) or not _is_id(record.get("id")) or not is_text(record.get(name)):
            raise DataError(f"{source}: {key}[{position}] needs a whole number `id` and a text `{name}`; correct the record.")
        yield record


def _categories(content: dict[str, Any], source: Path) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for record in _records(content, "categories", "name", source):
        if record["id"] in found:
            raise DataError(f"{source}: category id {record['id']} occurs twice; give each class its own id.")
        found[record["id"]] = Category(record["id"], record["name"])
    if not found:
        raise DataError(f"{source}: the list of categories is empty; there is nothing to learn.")
    return tuple(found[key] for key in sorted(found))


def _file_names(content: dict[str, Any], source: Path) -> list[str]:
    return [record["file_name"] for record in _records(content, "images", "file_name", source)]


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


def _image_folder(names: list[str], root: Path, place: SplitConfig, split: Split, source: Path, folders: Folders) -> Path:
    """The folder that the file names of a split are relative to: of the usual ones that which holds the most of some of them.

    Raises:
        DataError: the configured one is not there, or none of the usual ones is.
    """
    if place.images is not None:
        folder = root / expand(place.images)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; correct data.{split}.images (relative to data.path).")
        return folder
    candidates = [folder for folder in _usual_folders(root, split, source) if folder.is_dir()]
    if not candidates:
        usual = ", ".join(str(folder.relative_to(root)) for folder in _usual_folders(root, split, source))
        raise DataError(f"{root}: found no image folder of the {split} split (looked for {usual}); set data.{split}.images.")
    probed = names[:_PROBED_NAMES]
    return max(candidates, key=lambda folder: sum(_holds(folder, name, folders) for name in probed))


def _holds(folder: Path, name: str, folders: Folders) -> bool:
    try:
        return folders.holds(folders.path_inside(folder, name, ""))
    except DataError:  # it leads out of this folder
        return False


def _usual_folders(root: Path, split: Split, source: Path) -> list[Path]:
    suffix = source.stem.removeprefix("instances_")
    names = [*SPLIT_NAMES[split], f"{split}2017"] if source.stem.startswith("_") else [suffix, *SPLIT_NAMES[split], f"{split}2017"]
    usual = [root / base / name for name in names for base in ("images", ".")] + [root / "images"]
    if source.is_relative_to(root):
        usual.append(source.parent)
    return list(dict.fromkeys(usual))


def _not_named(
    images: Iterable[RawImage], folder: Path, root: Path, config: DataConfig, split: Split, source: Path, folders: Folders
) -> Iterator[Path]:
    """What lies among a split's images and is none of them; in a folder of several splits that is held against train.

    Folders that hold no named image are not looked at: nobody has asked for what is in them, and they may be huge.
    """
    named = [image.path for image in images]
    if not _is_of_one_split(folder, root, config, split, source):
        if split != "train":
            return
        others: dict[Split, SplitConfig] = {"val": config.val, "test": SplitConfig()}
        try:
            for name, its_place in others.items():
                other = find_annotations(root, its_place, name, folders)
                names = [] if other is None else _file_names(_load(other, folders.doubt), other)
                named += [folders.path_inside(folder, one, str(other)) for one in names]
        except DataError:  # reading that split will tell
            return
    known: dict[Path, set[str]] = {folders.real(folder / "x").parent: set()}
    for real in map(folders.real, named):
        known.setdefault(real.parent, set()).add(real.name)
    for parent in sorted(known):
        yield from (parent / name for name in sorted(folders.names(parent) - known[parent]) if is_picture(name))


def _is_of_one_split(folder: Path, root: Path, config: DataConfig, split: Split, source: Path) -> bool:
    """Whether the other split's images lie elsewhere, as far as the names of folders say."""
    place, other = (config.train, config.val) if split == "train" else (config.val, config.train)
    if place.images is None:
        return folder in _usual_folders(root, split, source) and folder not in (root, root / "images", root / "annotations")
    if other.images is None:
        return False
    theirs = root / expand(other.images)
    return not folder.is_relative_to(theirs) and not theirs.is_relative_to(folder)


def _attach_boxes(
    records: list[Any], images: dict[int, RawImage], categories: tuple[Category, ...], problems: Problems, source: Path
) -> None:
    positions = {category.id: position for position, category in enumerate(categories)}
    seen: set[int | str] = set()
    for number, record in enumerate(records):
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        key, image_id, category = fields.get("id"), fields.get("image_id"), fields.get("category_id")
        key = key if isinstance(key, (int, str)) else None
        example = f"{source}, annotations[{number}]" if key is None else f"{source}, annotation {key!r}"
        image = images.get(image_id) if _is_id(image_id) else None
        path = None if image is None else image.path
        if not _is_id(image_id) or not _is_id(category):
            problems.add(MALFORMED, example, "skipped", path)
        elif key in seen:
            problems.add(DUPLICATE, example, "second skipped", path, _corners(fields))
        elif image is None:
            problems.add(UNKNOWN_IMAGE, f"{example} (image {image_id})", "skipped")
        elif category not in positions:
            problems.add(UNKNOWN_CLASS, f"{example} (category {category})", "skipped", path, _corners(fields))
        elif (box := _box(fields, positions[category], number if key is None else key)) is None:
            problems.add(MALFORMED, example, "skipped", path)
        else:
            image.boxes.append(box)
            if key is not None:
                seen.add(key)


def _box(record: dict[str, Any], position: int, key: int | str) -> RawBox | None:
    bbox, crowd, area = record.get("bbox"), record.get("iscrowd") or 0, _number(record.get("area"))
    match [_number(value) for value in bbox] if isinstance(bbox, list) and crowd in (0, 1) else []:
        case [float(x), float(y), float(width), float(height)]:
            # An area that is not a number is no reason to lose the box; 0 is taken for none.
            usable = area if area is not None and 0.0 < area < float("inf") else 0.0
            return RawBox((x, y, x + width, y + height), position, key, bool(crowd), None if record.get("area") is None else usable)
    return None


def _corners(record: dict[str, Any]) -> tuple[float, ...]:
    """Of a record that is not used, for whoever wants to see it; empty if it has no box."""
    box = _box(record, 0, 0)
    return () if box is None else box.corners


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
