"""Writes a drawn data set as COCO json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.drawn.expected import Expected, Written
from tests.drawn.model import NAN, Box, DataSet, encoded, plain

ANNOTATIONS = ("annotations/{}.json", "annotations/instances_{}2017.json", "{}/_annotations.coco.json", "annotations/{}.json")
IMAGES = ("images/{}", "{}2017", "{}", "images")
SHARED = 3
"""The layout in which both splits have one folder of images."""
UNREADABLE: tuple[dict[str, Any], ...] = (
    {"bbox": "1,2,3,4"},
    {"bbox": [1, 2, 3]},
    {"bbox": [1, 2, 3, "4"]},
    {"bbox": None},
    {"image_id": "1"},
    {"image_id": 1.0},
    {"category_id": None},
    {"category_id": "cat"},
    {"iscrowd": "no"},
)
"""What makes an annotation malformed; number 9 is of an image that there is not."""


def write_coco(drawn: DataSet, root: Path) -> Expected:
    """The split, and another one of one image."""
    folder, count = root / IMAGES[drawn.layout].format(drawn.split), len(drawn.names)
    category = dict(zip(drawn.names, drawn.ids[:count], strict=True))
    expected = Expected(drawn.split, sorted(drawn.names, key=category.__getitem__), drawn.max_bad_fraction)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    folder.mkdir(parents=True)
    for number, picture in enumerate(drawn.pictures):
        picture.write(folder, root / "store")
        if picture.named == "never":
            continue
        ids = drawn.ids[count + 2 * number :][: 2 if picture.named == "twice" else 1]
        names = [drawn.spelled(picture.inside), "./" + drawn.spelled(picture.inside).replace("/", "\\")]
        for image_id, name in zip(ids, names, strict=False):
            size = {} if picture.told_size is None else dict(zip(("width", "height"), picture.told_size, strict=True))
            images.append({"id": image_id, "file_name": name, **size})
        written = []
        for place, box in enumerate(picture.boxes):
            annotations += [_annotation(box, ids[place % len(ids)], category) for _ in range(box.copies)]
            if box.name is None:
                expected.counts["box of an unknown class"] += box.copies
            else:
                area = annotations[-1].get("area")
                number_of = area if isinstance(area, (int, float)) else 0.0
                usable = number_of if 0 < number_of < float("inf") else 0.0
                written.append(
                    Written(box, (box.corners, box.name, box.crowd, None if area is None else usable), None if area is None else usable)
                )
        for junk in picture.junk:
            good = {"image_id": ids[0], "category_id": category[drawn.names[0]], "bbox": [1, 1, 2, 2]}
            annotations.append(good | (UNREADABLE[junk] if junk < len(UNREADABLE) else {"image_id": 2**50}))
            expected.counts["malformed annotation" if junk < len(UNREADABLE) else "annotation of an unknown image"] += 1
        if len(ids) == 2:
            expected.counts["image that is named twice"] += 1
            expected.total += 1
        expected.picture(folder / picture.inside, picture, picture.told_size, written, crowds=True)
        if folder / picture.inside in expected.images:
            expected.ids[folder / picture.inside] = min(ids)
    _expect_unnamed(drawn, expected)
    _write_strays(drawn, folder, expected)
    if drawn.crlf:  # the order of nothing matters
        images.reverse()
    categories = [{"id": category[name], "name": name} for name in drawn.names]
    content: dict[str, Any] = {"images": images, "annotations": _numbered(annotations), "categories": categories}
    _write_json(drawn, root, drawn.split, content)
    if drawn.spoiled is not None:
        expected.spoiled = _spoil(drawn, root, drawn.spoiled)
    _write_other(drawn, root, categories)
    return expected


def _spoil(drawn: DataSet, root: Path, number: int) -> str:
    path = root / ANNOTATIONS[drawn.layout].format(drawn.split)
    text = path.read_bytes().decode("utf-8-sig")
    content = json.loads(text)
    good = {"id": 2**41, "file_name": "added.jpg"}
    match number:
        case 0:
            content["images"] += [good | {"id": "2"}]
        case 1:
            content["images"] += [good, good]
        case 2:
            content["images"] += [good | {"file_name": "../1.jpg"}]
        case 3:
            content["images"] += [good | {"file_name": ""}]
        case 4:
            content["categories"] += content["categories"][:1]
        case 5:
            del content["annotations"]
        case 6:
            content["images"] += [good | {"id": 3.0}]
    path.write_text(json.dumps(content) if number < 7 else text[: len(text) // 2])
    return (
        "needs a whole number `id` and a text `file_name`",
        "occurs twice",
        "leads out of",
        "needs a whole number `id` and a text `file_name`",
        "occurs twice",
        "the key `annotations` is missing",
        "needs a whole number `id` and a text `file_name`",
        "not valid JSON",
    )[number]


def _annotation(box: Box, image_id: int, category: dict[str, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = box.corners
    width, height = x2 - x1, y2 - y1
    record: dict[str, Any] = {"image_id": image_id, "bbox": [x1, y1, width, height]}
    record["category_id"] = 2**60 if box.name is None else category[box.name]
    record |= {"iscrowd": 1} if box.crowd else {}
    areas = {"own": width * height, "mask": 0.6 * width * height, "zero": 0, "text": "12", "nan": NAN, "huge": 1e12}
    return record | ({"area": areas[box.area]} if box.area in areas else {})


def _numbered(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Ids are numbers, texts or missing; none of them occurs twice.
    ids: list[dict[str, Any]] = [{"id": n} if n % 3 else {"id": str(n)} if n % 2 else {} for n in range(len(annotations))]
    return [number | record for number, record in zip(ids, annotations, strict=True)]


def _expect_unnamed(drawn: DataSet, expected: Expected) -> None:
    looked_at = {""} | {plain(one.folder) for one in drawn.pictures if one.named != "never"}
    for one in drawn.pictures:
        if one.named == "never" and one.there and plain(one.folder) in looked_at and not _others_business(drawn):
            expected.counts["image that no annotation names"] += 1


def _others_business(drawn: DataSet) -> bool:
    return drawn.layout == SHARED and drawn.split == "val"


def _write_strays(drawn: DataSet, folder: Path, expected: Expected) -> None:
    if drawn.strays:
        for name in ("._1.jpg", "notes.md", "phone.heic"):
            (folder / name).write_bytes(b"?")
        expected.counts["image that no annotation names"] += not _others_business(drawn)


def _write_json(drawn: DataSet, root: Path, split: str, content: dict[str, Any]) -> None:
    path = root / ANNOTATIONS[drawn.layout].format(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn.bytes(json.dumps(content, ensure_ascii=drawn.flat, indent=1)))


def _write_other(drawn: DataSet, root: Path, categories: list[dict[str, Any]]) -> None:
    split = "val" if drawn.split == "train" else "train"
    path = root / IMAGES[drawn.layout].format(split) / "of the other split.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded((32, 32), ".jpg", 1))
    annotation = {"id": 1, "image_id": 1, "category_id": categories[0]["id"], "bbox": [1, 1, 9, 9]}
    content = {"images": [{"id": 1, "file_name": path.name}], "annotations": [annotation], "categories": categories}
    _write_json(drawn, root, split, content)
