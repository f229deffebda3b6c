"""Reads YOLO text labels: a data.yaml and, for each image, a text file of rows `class cx cy width height`.

data.yaml: `path` (relative to the yaml; default its own folder), `train` and `val` (each a folder, a list of folders, or
text files that list images, one path in each line, relative to the list), `names` (a list, or a dict numbered from 0) and
optionally `nc`, which must then agree. Label files: the image path's last `images` component becomes `labels` (without
one, the label lies beside the image) and the suffix `.txt`; an image without a label file is a background image.

Values are fractions of the image's sides. Rows of more than five values are outlines `class x1 y1 x2 y2 ...`, of which the
bounding box is taken. Image ids are 1..N in sorted path order, and a missing image keeps its number. Category ids are the
class number + 1, as the COCO form of the same data set usually has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gai_yolo.data.check import (
    UNKNOWN_CLASS,
    Folders,
    Problems,
    RawBox,
    RawImage,
    Split,
    build_index,
    expand,
    images_under,
    is_text,
    read_annotations,
    read_text,
)
from gai_yolo.data.index import Category, Index
from gai_yolo.data.reading import Doubt, read_file
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig

LOOKED_FOR = "data.yaml, or a single other *.yaml with `names` and `train`"
UNPARSABLE_ROW = "unparsable label row"
NO_LABELS = "no label file at all"
UNREADABLE_LABELS = "unreadable label file"


def read_yolo(source: Path, config: DataConfig, split: Split, folders: Folders) -> Index:
    """Read one split of a YOLO data set; `source` is its yaml.

    Raises:
        DataError: the yaml is damaged or inconsistent, a folder or list is not there, a label file that is there cannot be read, or too
            many images are bad.
    """
    place = config.train if split == "train" else config.val
    if place.annotations is not None:
        raise DataError(f"{source}: data.{split}.annotations has no meaning for YOLO labels; remove it.")
    content = _load(source, folders.doubt)
    categories = _categories(content, source)
    root = _root(content, source)
    given = str(root / expand(place.images)) if place.images is not None else content.get(split)
    paths = _image_paths(given, root, split, source, folders.doubt)
    problems = Problems()
    images = [_image(number, path, len(categories), folders, problems) for number, path in enumerate(paths, start=1)]
    if paths and not any(folders.holds(label_path(path)) for path in paths):
        problems.add(NO_LABELS, f"looked for {label_path(paths[0])}", "all images taken as background")
    return build_index(f"{source} ({split})", categories, images, problems, config.max_bad_fraction, folders)


def find_yaml(root: Path, folders: Folders) -> Path | None:
    """The folder's data.yaml, or its only other yaml that describes a data set; None if there is none.

    Raises:
        DataError: several other yaml files describe a data set.
    """
    if (root / "data.yaml").is_file():
        return root / "data.yaml"
    found = [path for path in folders.matching(root, "*.yaml", "*.yml") if _describes_data(path, folders.doubt)]
    if len(found) > 1:
        raise DataError(f"{root}: several files describe a data set ({', '.join(p.name for p in found)}); set data.path to one of them.")
    return found[0] if found else None


def label_path(image: Path) -> Path:
    """Where an image's labels lie."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _describes_data(path: Path, doubt: Doubt) -> bool:
    try:
        content = yaml.safe_load(read_file(path, doubt).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # some other yaml; not ours to complain about
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def _load(source: Path, doubt: Doubt) -> dict[str, Any]:
    text = read_text(source, "data set description", doubt)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else str(source)
        raise DataError(f"{where}: not valid YAML; correct the data set description.") from None
    if not isinstance(content, dict):
        raise DataError(f"{source}: a data set description has the keys train, val and names, this is a {type(content).__name__}.")
    return content


def _categories(content: dict[str, Any], source: Path) -> tuple[Category, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(f"{source}: `names` must be numbered 0 to {len(names) - 1} without gaps; correct the numbers.")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(is_text(name) or isinstance(name, (int, float)) for name in names):
        raise DataError(f"{source}: `names` must be a list (or numbered dict) of class names; add it.")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{source}: `nc` is {content['nc']!r} but `names` has {len(names)} classes; make them agree.")
    return tuple(Category(number + 1, str(name)) for number, name in enumerate(names))


def _root(content: dict[str, Any], source: Path) -> Path:
    given = content.get("path") or "."
    if not isinstance(given, str):
        raise DataError(f"{source}: `path` must be a folder name; correct it.")
    root = source.parent / expand(Path(given))
    if not root.is_dir():
        raise DataError(f"{source}: `path` leads to {root}, which is not a folder; write it relative to the yaml or absolute.")
    return root


def _image_paths(given: Any, root: Path, split: Split, source: Path, doubt: Doubt) -> list[Path]:
    entries: Sequence[Any] = given if isinstance(given, list) else [given]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{source}: `{split}` must be a folder, a list of folders, or a text file that lists images; add it.")
    paths: set[Path] = set()
    for entry in entries:
        paths.update(_images_of(_locate(entry, root, split, source), doubt))
    return sorted(paths)


def _locate(entry: str, root: Path, split: Split, source: Path) -> Path:
    path = root / expand(Path(entry))
    # Roboflow writes `../train/images` for folders that lie beside the yaml.
    beside = root / entry.removeprefix("../")
    for candidate in (path, beside):
        if candidate.exists():
            return candidate
    raise DataError(f"{source}: `{split}` leads to {path}, which is not there; correct `{split}` or `path`.")


def _images_of(path: Path, doubt: Doubt) -> list[Path]:
    if path.is_dir():
        return images_under(path, doubt)
    # The list is the user's own file: absolute paths in it are usual, so it may point anywhere.
    lines = (line.strip() for line in read_text(path, "list of images", doubt).replace("\0", "").splitlines())
    return [path.parent / line for line in lines if line]


def _image(number: int, path: Path, num_classes: int, folders: Folders, problems: Problems) -> RawImage:
    labels = label_path(path)
    image = RawImage(number, path, f"{labels}, line", fractions=True)
    if not folders.holds(labels):
        return image
    try:
        text = read_annotations(labels, "labels", folders.doubt).decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.add(UNREADABLE_LABELS, str(labels), "its boxes skipped")
        return image
    for line_number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            _append_row(image, line, line_number, num_classes, problems)
    return image


def _append_row(image: RawImage, line: str, number: int, num_classes: int, problems: Problems) -> None:
    try:
        first, *values = map(float, line.split())
        position = int(first)
    except (ValueError, OverflowError):
        first, position, values = 0.5, 0, []
    outline = len(values) >= 6 and len(values) % 2 == 0
    if position != first or not (len(values) == 4 or outline):
        problems.add(UNPARSABLE_ROW, f"{image.where} {number}", "skipped")
    elif not 0 <= position < num_classes:
        problems.add(UNKNOWN_CLASS, f"{image.where} {number} (class {position})", "skipped")
    else:
        image.boxes.append(RawBox(_corners(values), position, number))


def _corners(values: list[float]) -> tuple[float, float, float, float]:
    if len(values) == 4:
        cx, cy, width, height = values
        return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    xs, ys = values[0::2], values[1::2]
    if not all(map(math.isfinite, values)):  # min and max would pass over a NaN that is not first
        return math.nan, math.nan, math.nan, math.nan
    return min(xs), min(ys), max(xs), max(ys)
