"""Reads YOLO text labels: a data.yaml and, for each image, a text file of rows `class cx cy width height`.

data.yaml: `path` (relative to the yaml; default its own folder), `train` and `val` (each a folder, a list of folders, or
text files that list images, one path in each line, relative to the list), `names` (a list, or a dict numbered from 0) and
optionally `nc`, which must then agree. Label files: the image path's last `images` component becomes `labels` (without
one, the label lies beside the image) and the suffix `.txt`; an image without a label file is a background image.

Values are fractions of the image's sides. Class names are the texts that stand in the yaml (`yes`, `010`), however YAML would read them.
Longer rows: with `kpt_shape: [K, D]` in the yaml a box and K keypoints of D values, of which the box is taken; a box and one value
(confidence), or two the last of which is no fraction (confidence and track), of which the box is taken and told; otherwise an outline
`class x1 y1 x2 y2 ...` (oriented boxes and masks), of which the bounding box is taken. Where all outlines of a split could be boxes
with keypoints as well, it is refused, because nothing says which they are. Image ids are 1..N in sorted path order, and a missing image
keeps its number. Category ids are the class number + 1, as the COCO form of the same data set usually has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gai_yolo.data.formats.check import SAME_IMAGE, SPLIT_NAMES, Problems, RawImage, Split, build_index
from gai_yolo.data.formats.folders import IMAGE_SUFFIXES, NOT_READ, OTHER_SUFFIXES, Folders, is_hidden
from gai_yolo.data.formats.reading import Doubt, expand, is_text, read_annotations, read_file, read_text
from gai_yolo.data.formats.yolo_rows import Rows, append_row
from gai_yolo.data.index import Category, Index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig

USUAL_YAML = "data.yaml, or a single other *.yaml with `names` and `train`"
NO_LABELS = "no label file at all"
UNREADABLE_LABELS = "unreadable label file"
NO_IMAGE = "label file without an image"
SHARED_LABELS = "image that shares its label file with another"
NO_LABELS_OF_IMAGES = frozenset({"classes.txt", "train.txt", "val.txt", "test.txt", "README.txt"})
"""What tools leave among the labels."""


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
    problems = Problems()
    places = _places(given, root, split, source)
    found = Counter(path for place in places for path in _images_of(place, folders, problems))
    for path, count in found.items():
        for _ in range(count - 1):
            problems.add(SAME_IMAGE, f"{path} ({split} in {source})", "counted once")
    paths = sorted(found)
    rows = Rows(len(categories), _keypoints(content, source))
    images = [_image(number, path, rows, folders, problems) for number, path in enumerate(paths, start=1)]
    rows.check(source)
    if all(place.is_dir() for place in places):  # a list may choose among images
        _count_unused(images, places, folders, problems)
    _count_shared(paths, folders, problems)
    if paths and not any(folders.holds(label_file(path, folders)) for path in paths):
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


def leads_to(source: Path, doubt: Doubt) -> list[Path]:
    """The folder that a yaml describes, and the folders and lists of its splits, which may lie elsewhere.

    Raises:
        DataError: as `read_yolo`, for what is in the yaml.
    """
    content = _load(source, doubt)
    root = _root(content, source)
    trained: tuple[Split, ...] = ("train", "val")  # a `test` that leads nowhere is no obstacle
    return [root, *(place for split in trained if content.get(split) for place in _places(content[split], root, split, source))]


def named_splits(source: Path, doubt: Doubt) -> list[Split]:
    """The splits that a yaml names, whether there is something or not. Raises as `read_yolo`, for what is in the yaml."""
    content = _load(source, doubt)
    return [split for split in SPLIT_NAMES if content.get(split)]


def root_of_yaml(source: Path, doubt: Doubt) -> Path:
    """The folder that a yaml describes. Raises as `read_yolo`."""
    return _root(_load(source, doubt), source)


def other_keys(source: Path, doubt: Doubt) -> list[str]:
    """What a yaml says beside places and names, `kpt_shape` among it. Raises as `read_yolo`."""
    return [str(key) for key in _load(source, doubt) if key not in ("path", "names", "nc", *SPLIT_NAMES)]


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
        content = yaml.load(text, yaml.BaseLoader)  # all scalars are texts
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
        numbered = {_number(key): name for key, name in names.items()}
        if set(numbered) != set(range(len(names))):
            raise DataError(f"{source}: `names` must be numbered 0 to {len(names) - 1} without gaps; correct the numbers.")
        names = [numbered[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(map(is_text, names)):
        raise DataError(f"{source}: `names` must be a list (or numbered dict) of class names; add it.")
    if "nc" in content and _number(content["nc"]) != len(names):
        raise DataError(f"{source}: `nc` is {content['nc']} but `names` has {len(names)} classes; make them agree.")
    return tuple(Category(number + 1, name) for number, name in enumerate(names))


def _number(text: Any) -> int | None:
    """A whole number that is written so."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() else None


def _keypoints(content: dict[str, Any], source: Path) -> int | None:
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    numbers = [_number(one) for one in shape] if isinstance(shape, list) else []
    match numbers:
        case [int(points), (2 | 3) as dimensions]:
            return points * dimensions
    raise DataError(f"{source}: `kpt_shape` must be [number of keypoints, 2 or 3]; correct it.")


def _root(content: dict[str, Any], source: Path) -> Path:
    given = content.get("path") or "."
    if not isinstance(given, str):
        raise DataError(f"{source}: `path` must be a folder name; correct it.")
    root = source.parent / expand(Path(given))
    if not root.is_dir():
        raise DataError(f"{source}: `path` leads to {root}, which is not a folder; write it relative to the yaml or absolute.")
    return root


def _places(given: Any, root: Path, split: str, source: Path) -> list[Path]:
    """The folders and lists that a split is made of."""
    entries: Sequence[Any] = given if isinstance(given, list) else [given]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{source}: `{split}` must be a folder, a list of folders, or a text file that lists images; add it.")
    return [_locate(entry, root, split, source) for entry in entries]


def _locate(entry: str, root: Path, split: str, source: Path) -> Path:
    path = root / expand(Path(entry))
    # Roboflow writes `../train/images` for folders that lie beside the yaml.
    beside = root / entry.removeprefix("../")
    for candidate in (path, beside):
        if candidate.exists():
            return candidate
    raise DataError(f"{source}: `{split}` leads to {path}, which is not there; correct `{split}` or `path`.")


def _images_of(path: Path, folders: Folders, problems: Problems) -> list[Path]:
    if path.is_dir():
        found = folders.files_under(path)
        for other in found:
            if other.suffix.lower() in OTHER_SUFFIXES:
                problems.add(NOT_READ, str(other), "left out; convert them to jpg or png", other)
        return [image for image in found if image.suffix.lower() in IMAGE_SUFFIXES]
    # The list is the user's own file: absolute paths in it are usual, so it may point anywhere.
    folders.look_into(path.parent)
    lines = (line.strip() for line in read_text(path, "list of images", folders.doubt).replace("\0", "").splitlines())
    listed = [path.parent / line for line in lines if line]
    if not all(image.name for image in listed):
        raise DataError(f"{path}: a line names no file but `/`; correct the list of images.")
    return [folders.spelled(image) for image in listed]


def label_file(image: Path, folders: Folders) -> Path:
    """Where an image's labels lie, under whatever form of the name; where they would, if there are none."""
    usual = folders.spelled(label_path(image))
    if folders.holds(usual):
        return usual
    upper = folders.spelled(usual.with_suffix(".TXT"))
    return upper if folders.holds(upper) else usual


def _count_unused(images: Sequence[RawImage], image_folders: Sequence[Path], folders: Folders, problems: Problems) -> None:
    """Count label files that belong to no image: beside those of images, or where those of the image folders would be."""
    used = {label_file(image.path, folders) for image in images}
    beside = {folder / name for folder in {path.parent for path in used} for name in folders.names(folder)}
    roots = {folders.spelled(label_path(folder / "x").parent) for folder in image_folders}
    below = {path for root in roots if root.is_dir() for path in folders.files_under(root)}
    for path in sorted((beside | below) - used):
        if path.suffix.lower() == ".txt" and not is_hidden(path.name) and path.name not in NO_LABELS_OF_IMAGES:
            problems.add(NO_IMAGE, str(path), "not used")


def _count_shared(paths: Sequence[Path], folders: Folders, problems: Problems) -> None:
    """Count images whose labels are another's as well, because their names differ in the suffix only."""
    first: dict[Path, Path] = {}
    for path in paths:
        labels = label_file(path, folders)
        other = first.setdefault(labels, path)
        if other != path and folders.holds(labels):
            problems.add(SHARED_LABELS, f"{path} (and {other.name})", "the same boxes for both")


def _image(number: int, path: Path, rows: Rows, folders: Folders, problems: Problems) -> RawImage:
    labels = label_file(path, folders)
    image = RawImage(number, path, f"{labels}, line", fractions=True)
    if not folders.holds(labels):
        return image
    try:
        text = read_annotations(labels, "labels", folders.doubt).decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.add(UNREADABLE_LABELS, str(labels), "its boxes skipped", path)
        return image
    for line_number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            append_row(image, line, line_number, rows, problems)
    return image
