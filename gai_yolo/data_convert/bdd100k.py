"""Reads the box labels of BDD100K (https://doc.bdd100k.com/format.html), in the three forms in which they were published.

- `labels/det_20/det_{train,val}.json`: a list of frames with `name`, `labels` of `category`, `box2d` (`x1`, `y1`, `x2`, `y2`) and
  `attributes`; or an object with this list under `frames`. `labels/bdd100k_labels_images_{train,val}.json`, of 2018, is alike and has lanes
  and areas (`poly2d`) among the labels.
- `labels/100k/{train,val}/*.json`: a file for each image, with `name` and the labels as `objects` of its only frame.

Images lie in `images/100k/{train,val}`, or `images/{train,val}`. Their sizes are not in the labels and come from their headers. Boxes are
taken as they are. Those that are marked `crowd` or `ignore` become crowd regions, because BDD100K's own metrics pass over them. Classes
are those that a box has, in the order of its detection challenge (pedestrian, rider, ... traffic sign) under the names that the labels
have; others come behind, by name. Image ids are 1..N in the order of names.

Dates: `timestamp` if it is a moment (see `dates`); else `startTime` in `info/100k/{train,val}/NAME.json`, where that has been downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gai_yolo.data.formats.check import Problems, RawBox, RawImage, Split, build_index
from gai_yolo.data.formats.coco import MALFORMED
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.reading import Doubt, is_text, read_annotations
from gai_yolo.data.index import Category, Index
from gai_yolo.data_convert.dates import Dates, moment_of
from gai_yolo.errors import DataError

LABEL_PLACES = ("labels/det_20/det_{}.json", "labels/bdd100k_labels_images_{}.json", "labels/100k/{}")
IMAGES = ("images/100k/{}", "images/{}", "{}")
CHALLENGE = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light", "traffic sign")
NAMES_OF_2018 = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle"}
"""Of the labels of 2018."""
PASSED_OVER = ("crowd", "ignore")

NO_BOX = "label without a box (lane, area, mask)"
OUTSIDE_DATES = "image outside the dates"
NO_DATE = "image without a date"
SECOND_FRAME = "second frame of one name"


@dataclass(frozen=True)
class Frame:
    """An image and its labels, as they stand in a file."""

    record: dict[str, Any]
    labels: list[Any]
    name: str
    where: str


@dataclass(frozen=True)
class Bdd100k:
    """What was read."""

    indexes: dict[Split, Index]
    beyond: tuple[tuple[Split, Problems], ...]


def is_there(root: Path) -> bool:
    """Whether a folder has labels of this kind."""
    return bool(splits_in(root))


def splits_in(root: Path) -> list[Split]:
    """Splits that there are labels of."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    return [split for split in splits if _labels_of(root, split) is not None]


def read_bdd100k(root: Path, splits: Sequence[Split], dates: Dates, max_bad_fraction: float) -> Bdd100k:
    """Read some splits.

    Raises:
        DataError: labels or images are not found, labels are damaged, no image is left by the dates, or too many images are bad.
    """
    if not splits:
        raise DataError(f"{root}: found no BDD100K labels there (looked for {', '.join(one.format('train') for one in LABEL_PLACES)}).")
    folders = Folders(Doubt())
    kept: dict[Split, list[tuple[Path, Frame]]] = {}
    found: dict[Split, Problems] = {}
    names: dict[str, None] = {}
    for split in splits:
        found[split], kept[split] = Problems(), []
        folder = _images_of(root, split)
        for frame in _once(_frames(root, split, folders), found[split]):
            names.update(dict.fromkeys(label["category"] for label in frame.labels if _box(label) is not None))
            if _is_taken(frame, root, split, dates, found[split]):
                kept[split].append((folders.path_inside(folder, frame.name, frame.where), frame))
        if not kept[split]:
            raise _nothing_left(root, split, dates, found[split])
    categories = _categories(names)
    beyond = tuple((split, _beyond(frame for _, frame in kept[split])) for split in splits)
    indexes: dict[Split, Index] = {}
    for split in splits:
        images = _raw_images(sorted(kept.pop(split), key=lambda one: one[0]), categories, found[split])
        indexes[split] = build_index(f"{root} (BDD100K, {split})", categories, images, found[split], max_bad_fraction, folders)
    return Bdd100k(indexes, beyond)


def frame_values(root: Path, split: Split, field: str) -> dict[str, str]:
    """What a field of the frames says (`videoName`, `attributes.weather`), by image name; frames without it are left out."""
    found: dict[str, str] = {}
    for frame in _frames(root, split, Folders(Doubt())):
        value = value_at(frame.record, field)
        if value is not None:
            found[frame.name] = value
    return found


def value_at(record: Any, field: str) -> str | None:
    """A value of nested objects as a text, by the names on the way to it with dots between; None if there is none."""
    for key in field.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return None if record is None or isinstance(record, (dict, list)) else str(record)


def _labels_of(root: Path, split: Split) -> Path | None:
    return next((path for one in LABEL_PLACES if (path := root / one.format(split)).exists()), None)


def _images_of(root: Path, split: Split) -> Path:
    found = next((folder for one in IMAGES if (folder := root / one.format(split)).is_dir()), None)
    if found is None:
        looked = ", ".join(one.format(split) for one in IMAGES)
        raise DataError(f"{root}: found no image folder of the {split} split (looked for {looked}); put the images there.")
    return found


def _frames(root: Path, split: Split, folders: Folders) -> Iterator[Frame]:
    place = _labels_of(root, split)
    assert place is not None
    files = [place] if place.is_file() else [path for path in folders.files_under(place) if path.suffix == ".json"]
    for path in files:
        text = read_annotations(path, "labels", folders.doubt)
        try:
            yield from _frames_in(text.decode("utf-8-sig"), path)
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not usable JSON ({error}); restore the file.") from None


def _frames_in(text: str, path: Path) -> Iterator[Frame]:
    """One frame at a time: all of a published file as objects takes several gigabytes."""
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        records: Iterable[Any] = _elements(text, start + 1)
    else:
        content = json.loads(text)
        listed = content.get("frames") if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise DataError(f"{path}: BDD100K labels are a list of frames, or an object with a list `frames`; restore the file.")
        if is_text(content.get("name")):  # of one image, or of a video
            name = content["name"] if Path(content["name"]).suffix == ".jpg" else f"{content['name']}.jpg"
            listed = [{**content, **one, "name": name} if isinstance(one, dict) else one for one in listed]
        records = listed
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not is_text(record.get("name")):
            raise DataError(f"{path}: frame {number} needs a text `name`; correct the record.")
        labels = record.get("labels", record.get("objects"))
        about = {key: value for key, value in record.items() if key not in ("labels", "objects", "frames")}
        yield Frame(about, labels if isinstance(labels, list) else [], record["name"], f"{path}, {record['name']}, label")


def _elements(text: str, place: int) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    while True:
        while text[place : place + 1] in (" ", "\n", "\r", "\t", ","):
            place += 1
        if text[place : place + 1] == "]":
            return
        element, place = decoder.raw_decode(text, place)
        yield element


def _once(frames: Iterable[Frame], problems: Problems) -> Iterator[Frame]:
    seen: set[str] = set()
    for frame in frames:
        if frame.name in seen:
            problems.add(SECOND_FRAME, frame.where, "skipped")
        else:
            seen.add(frame.name)
            yield frame


def _is_taken(frame: Frame, root: Path, split: Split, dates: Dates, problems: Problems) -> bool:
    moment = _moment(frame, root, split) if dates.are_asked_for else None
    is_taken = dates.hold(moment)
    if dates.are_asked_for and moment is None:
        example = f"{frame.name}, timestamp {str(frame.record.get('timestamp'))[:40]}"
        problems.add(NO_DATE, example, "kept all the same (--undated keep)" if is_taken else "left out; --undated keep takes it")
    elif moment is not None and not is_taken:
        problems.add(OUTSIDE_DATES, f"{frame.name}, {moment:%Y-%m-%d}", "left out")
    return is_taken


def _moment(frame: Frame, root: Path, split: Split) -> datetime | None:
    moment = moment_of(frame.record.get("timestamp"))
    info = root / "info" / "100k" / split / f"{Path(frame.name).stem}.json"
    if moment is not None or not info.is_file():
        return moment
    try:
        content = json.loads(read_annotations(info, "times of a video", Doubt()))
    except ValueError:
        return None
    return moment_of(content.get("startTime")) if isinstance(content, dict) else None


def _nothing_left(root: Path, split: Split, dates: Dates, problems: Problems) -> DataError:
    why = "; ".join(f"{one.count} x {one.kind} (first: {one.example})" for one in problems.freeze()) or "there are no frames"
    hint = " BDD100K's own timestamps count from a video's beginning: put info/100k beside labels for dates." if dates.are_asked_for else ""
    return DataError(f"{root}: no image of the {split} split is left: {why}.{hint}")


def _categories(names: Iterable[str]) -> list[Category]:
    def place(name: str) -> tuple[int, str]:
        usual = NAMES_OF_2018.get(name, name)
        return (CHALLENGE.index(usual) if usual in CHALLENGE else len(CHALLENGE), name)

    ordered = sorted(names, key=place)
    if not ordered:
        return [Category(number, name) for number, name in enumerate(CHALLENGE, start=1)]
    return [Category(number, name) for number, name in enumerate(ordered, start=1)]


def _raw_images(kept: Sequence[tuple[Path, Frame]], categories: Sequence[Category], problems: Problems) -> list[RawImage]:
    positions = {category.name: position for position, category in enumerate(categories)}
    images: list[RawImage] = []
    for number, (path, frame) in enumerate(kept, start=1):
        image = RawImage(number, path, frame.where)
        for place, label in enumerate(frame.labels):
            corners = _box(label)
            if corners is not None:
                image.boxes.append(
                    RawBox(corners, positions[label["category"]], place, crowd=any(_marks(label, one) for one in PASSED_OVER))
                )
            elif not isinstance(label, dict) or label.get("box2d") is not None:
                problems.add(MALFORMED, f"{frame.where} {place}", "skipped", path)
        images.append(image)
    return images


def _box(label: Any) -> tuple[float, float, float, float] | None:
    box = label.get("box2d") if isinstance(label, dict) and is_text(label.get("category")) else None
    values: list[Any] = [box.get(key) for key in ("x1", "y1", "x2", "y2")] if isinstance(box, dict) else []
    if not values or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return None
    try:
        x1, y1, x2, y2 = map(float, values)
    except OverflowError:
        return None
    return x1, y1, x2, y2


def _marks(label: dict[str, Any], name: str) -> bool:
    attributes = label.get("attributes")
    return isinstance(attributes, dict) and attributes.get(name) is True


def _beyond(frames: Iterable[Frame]) -> Problems:
    """What labels say beside boxes."""
    problems = Problems()
    for frame in frames:
        attributes = frame.record.get("attributes")
        for name in attributes if isinstance(attributes, dict) else ():
            problems.add(f"`{str(name)[:40]}` of an image", frame.name, "lost")
        for place, label in enumerate(frame.labels):
            if not isinstance(label, dict):
                continue
            if label.get("box2d") is None:
                problems.add(NO_BOX, f"{frame.where} {place} ({str(label.get('category'))[:40]})", "lost")
                continue
            attributes = label.get("attributes")
            for name, value in attributes.items() if isinstance(attributes, dict) else ():
                if name not in PASSED_OVER and value not in (False, None, "", "none", "NA"):
                    problems.add(f"`{str(name)[:40]}` of a box", f"{frame.where} {place}", "lost")
    return problems
