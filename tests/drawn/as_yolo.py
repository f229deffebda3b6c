"""Writes a drawn data set as YOLO text labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.drawn.expected import Expected, Written
from tests.drawn.model import Box, DataSet, Picture, encoded, plain

IMAGES = ("images/{}", "images/{}", "{}", "{}/images")
LABELS = ("labels/{}", "labels/{}", "{}", "{}/labels")
LISTED = 1
"""The layout in which a text file lists the images."""
JUNK = (
    "0 0.5 0.5 0.5",
    "dog 0.5 0.5 0.5 0.5",
    "0.5 0.5 0.5 0.5 0.5",
    "nan 0.5 0.5 0.5 0.5",
    "0 0,5 0,5 0,5 0,5",
    "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4",
    "0",
    "inf 0.5 0.5 0.5 0.5",
    "0 0.5 0.5 0.5 0.5px",
    "0;0.5;0.5;0.5;0.5",
)
SPOILED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"nc": 99}, "`nc` is 99 but `names` has"),
    ({"nc": 2.0}, "`nc` is 2.0 but `names` has"),
    ({"names": {0: "a", 2: "b"}}, "without gaps"),
    ({"names": []}, "`names` must be a list"),
    ({"path": "nowhere"}, "`path` leads to"),
    ({"train": "nowhere", "val": "nowhere"}, "which is not there"),
    ({"train": [], "val": []}, "must be a folder"),
    ({"kpt_shape": [3, 4]}, "`kpt_shape` must be"),
)


def write_yolo(drawn: DataSet, root: Path) -> Expected:
    """The split, and another one of one image."""
    images, labels = root / IMAGES[drawn.layout].format(drawn.split), root / LABELS[drawn.layout].format(drawn.split)
    expected = Expected(drawn.split, list(drawn.names), drawn.max_bad_fraction)
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Picture]] = {}
    for picture in drawn.pictures:
        picture.write(images, root / "store")
        groups.setdefault(plain(f"{picture.folder}/{picture.stem}"), []).append(picture)
    named, labelled = 0, 0
    for group in groups.values():
        first, used = group[0], [one for one in group if (one.named != "never" if drawn.layout == LISTED else one.there)]
        rows = _write_labels(drawn, labels, first)
        named, labelled = named + len(used), labelled + (len(used) if rows else 0)
        if rows and not used:
            lists = first.stem == "train" and not drawn.capitals  # `train.txt` lies among the labels of many data sets
            expected.counts["label file without an image"] += drawn.layout != LISTED and not lists
        if rows and used:
            expected.counts["image that shares its label file with another"] += len(used) - 1
        for picture in used:
            if drawn.layout == LISTED and picture.named == "twice":
                expected.counts["image that is named twice"] += 1
            written = _expect_rows(drawn, first, expected) if rows else []
            expected.picture(images / picture.inside, picture, None, written)
    if named and not labelled:
        expected.counts["no label file at all"] += 1
    _write_strays(drawn, images, labels, expected)
    _write_description(drawn, root, expected)
    return expected


def _write_labels(drawn: DataSet, labels: Path, picture: Picture) -> bool:
    """Whether there are any."""
    if picture.notes == "none":
        return False
    folder = picture.folder if IMAGES[drawn.layout] == LABELS[drawn.layout] else drawn.spelled(picture.folder)
    path = labels / folder / (drawn.spelled(picture.stem) + (".TXT" if drawn.capitals else ".txt"))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row for box in picture.boxes for row in box.copies * [_row(drawn, picture, box)]]
    text = "\n\n".join([*lines, *(JUNK[number] for number in picture.junk)]) + "\n" * drawn.flat
    path.write_bytes(b"\xff\xfe0\0" if picture.notes == "broken" else drawn.bytes(text))
    return True


def _fractions(picture: Picture, box: Box) -> tuple[float, float, float, float]:
    (width, height), (x1, y1, x2, y2) = picture.seen, box.corners
    return x1 / width, y1 / height, x2 / width, y2 / height


def _form(box: Box) -> str:
    """An outline has no sides the wrong way round."""
    x1, y1, x2, y2 = box.corners
    return box.form if box.form != "outline" or (x1 < x2 and y1 < y2) else "box"


def _row(drawn: DataSet, picture: Picture, box: Box) -> str:
    x1, y1, x2, y2 = _fractions(picture, box)
    position = len(drawn.names) + 2 if box.name is None else drawn.names.index(box.name)
    values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    form = _form(box)
    if form == "outline":
        values = [x1, y1, x2, y1, x2, y2, x1, y2]
    values += {"confidence": [0.75], "track": [0.75, 17]}.get(form, [])
    if form == "decimals":
        values += [0.5, 0.5, 2, 0, 0, 0] * drawn.keypoints
        return f"{position}\t" + "  ".join(f"{value:.6f}" for value in values)
    return f"{position} " + " ".join(map(repr, values))


def _expect_rows(drawn: DataSet, picture: Picture, expected: Expected) -> list[Written]:
    """The boxes, whose corners are to be those of the image that they are read for."""
    if picture.notes == "broken":
        expected.counts["unreadable label file"] += 1
        return []
    expected.counts["unparsable label row"] += len(picture.junk)
    return list(_expect_boxes(drawn, picture, expected))


def _expect_boxes(drawn: DataSet, picture: Picture, expected: Expected) -> Iterator[Written]:
    for box in picture.boxes:
        form = _form(box)
        if drawn.keypoints and form not in ("box", "decimals"):
            expected.counts["unparsable label row"] += box.copies
            continue
        if form in ("confidence", "track"):
            expected.counts["label row with a confidence or track"] += box.copies
        if box.name is None:
            expected.counts["box of an unknown class"] += box.copies
        else:
            yield Written(box, (box.corners, box.name, form == "outline"))


def _write_strays(drawn: DataSet, images: Path, labels: Path, expected: Expected) -> None:
    if drawn.strays:
        (images / "._1.jpg").write_bytes(b"?")
        (images / "phone.heic").write_bytes(b"?")
        (labels / "classes.txt").write_text("cat\n")
        (labels / "lost.txt").write_text("0 0.5 0.5 0.5 0.5\n")
        (labels / "some where").mkdir()
        (labels / "some where" / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
        if drawn.layout != LISTED:
            expected.counts["file that may be an image, of a kind that is not read"] += 1
            expected.counts["label file without an image"] += 2


def _write_description(drawn: DataSet, root: Path, expected: Expected) -> None:
    other = "val" if drawn.split == "train" else "train"
    path = root / IMAGES[drawn.layout].format(other) / "of the other split.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded((32, 32), ".jpg", 1))
    place: str | list[str] = IMAGES[drawn.layout].format(drawn.split)
    if drawn.layout == LISTED:
        lines = [
            drawn.spelled(f"{place}/{one.inside}") for one in drawn.pictures for _ in range({"never": 0, "twice": 2}.get(one.named, 1))
        ]
        place = f"{drawn.split}.txt"
        (root / place).write_bytes(drawn.bytes("\n".join([*lines, ""])))
    names = dict(enumerate(drawn.names)) if drawn.flat else list(drawn.names)
    content: dict[str, Any] = {drawn.split: place, other: IMAGES[drawn.layout].format(other), "names": names, "nc": len(drawn.names)}
    content |= {"kpt_shape": [2, 3]} if drawn.keypoints else {}
    path = root / "data.yaml"
    if drawn.spoiled is not None:
        damage, expected.spoiled = SPOILED[drawn.spoiled]
        content |= damage
    path.write_bytes(drawn.bytes("\n".join(f"{key}: {json.dumps(value)}" for key, value in content.items())))
