"""Writes Pascal VOC xml: `Annotations/{split}`, `JPEGImages/{split}` and `ImageSets/Main/{split}.txt`.

Edges are written as they are, from 0 and with decimals where they lie between pixels: the files of the VOC challenge itself count from 1,
which is told by their `source`, and these name none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape

from gai_yolo.data.formats.check import Problems
from gai_yolo.data.index import ImageRecord
from gai_yolo.data_convert.part import CLASS_ID, WRITTEN_BY, Corners, Part, decimal
from gai_yolo.errors import DataError

NAMELESS = "class without a box"
ONE_NAME = "classes of one name"
BETWEEN_PIXELS = "box with an edge between pixels"
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write."""


def write_voc(root: Path, parts: Sequence[Part]) -> None:
    """Xml files and lists of names; images are not written. Raises `OSError`."""
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for part in parts:
        folder = root / "Annotations" / part.split
        stems = [PurePosixPath(name).with_suffix("") for name in part.names]
        for parent in sorted({folder / stem.parent for stem in stems}):
            parent.mkdir(parents=True, exist_ok=True)
        for image, name, stem in zip(part.index.images, part.names, stems, strict=True):
            (folder / f"{stem}.xml").write_text(_xml(part, image, name), encoding="utf-8")
        lines = "".join(f"{part.split}/{stem}\n" for stem in stems)
        (root / "ImageSets" / "Main" / f"{part.split}.txt").write_text(lines, encoding="utf-8")


def check_voc(parts: Sequence[Part], problems: Problems) -> None:
    """Tell what it cannot hold of all splits.

    Raises:
        DataError: there is no box, so that no class is named anywhere, or a class has a name that xml cannot hold.
    """
    categories = parts[0].index.categories
    boxes = Counter[str]()
    for part in parts:
        for category, count in zip(categories, part.index.images.class_counts(len(categories)).tolist(), strict=True):
            boxes[category.name] += count
    named = sorted(name for name, count in boxes.items() if count)
    if not named:
        raise DataError(
            f"{parts[0].index.source}: there is no box, and VOC xml names classes by their boxes only; convert to coco or yolo."
        )
    for name in named:
        if _NO_XML.search(name) or name != name.strip():
            raise DataError(
                f"{parts[0].index.source}: VOC xml cannot hold the class name {name!r}; give it another one (--map, --classes)."
            )
    seen: set[str] = set()
    for category in categories:
        if not boxes[category.name]:
            problems.add(NAMELESS, category.name, "lost; xml names classes by their boxes only")
        elif category.name in seen:
            problems.add(ONE_NAME, f"{category.name} ({category.id})", "one class")
        elif category.id != named.index(category.name) + 1:
            problems.add(CLASS_ID, f"{category.name}: {category.id}, now {named.index(category.name) + 1}", "classes are numbered by name")
        seen.add(category.name)
    for part in parts:
        part.tell_of_image_ids()


def _xml(part: Part, image: ImageRecord, name: str) -> str:
    names = [category.name for category in part.index.categories]

    def line(position: int, corners: Corners, _crowd: bool, _area: float) -> str:
        edges = "".join(f"<{key}>{decimal(value)}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        marks = "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        return f"\t<object><name>{_text(names[position])}</name>{marks}<bndbox>{edges}</bndbox></object>\n"

    objects = part.lines(image, name, line)
    between = sum("." in one or "e-" in one for one in map(_edges, objects))
    part.problems.add_many(BETWEEN_PIXELS, between, name, "written with decimals, which readers of whole numbers do not take")
    path = PurePosixPath(name)
    head = f"\t<folder>{_text('/'.join((part.split, *path.parts[:-1])))}</folder>\n\t<filename>{_text(path.name)}</filename>\n"
    source = f"\t<source><database>{WRITTEN_BY}</database></source>\n"
    size = f"\t<size><width>{image.width}</width><height>{image.height}</height><depth>3</depth></size>\n\t<segmented>0</segmented>\n"
    return f"<annotation>\n{head}{source}{size}{''.join(objects)}</annotation>\n"


def _edges(line: str) -> str:
    return line.partition("<bndbox>")[2]


def _text(text: str) -> str:
    return escape(text, {"\r": "&#13;"})
