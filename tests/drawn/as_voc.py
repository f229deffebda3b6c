"""Writes a drawn data set as Pascal VOC xml."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from tests.drawn.expected import Expected, Written
from tests.drawn.model import Box, DataSet, Picture, encoded, plain

XML = ("Annotations", "Annotations", "{}", "Annotations/{}")
IMAGES = ("JPEGImages", "images/{}", "{}", "JPEGImages/{}")
LISTED, LOOSE = 0, 1
"""The layouts with lists of names, and in which an xml without image is of no split."""
UNREADABLE = (
    "<object><name>{}</name></object>",
    "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax></bndbox></object>",
    "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>x</xmax><ymax>9</ymax></bndbox></object>",
    "<object><name></name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>",
    "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>",
)
SOURCE = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"


@dataclass
class Group:
    """Pictures that one xml may be of: their names differ in the suffix only. It is written for the first."""

    pictures: list[Picture]
    file_name: str = ""
    """What the xml says."""
    alone: bool = True
    """No other folder has one of its name: a list that calls it by that alone would mean the other, if only that has an xml."""

    @property
    def first(self) -> Picture:
        return self.pictures[0]

    @property
    def has_xml(self) -> bool:
        return self.first.notes != "none" or not self.alone

    def picture(self) -> Picture | None:
        """The one that the xml is read for."""
        there = sorted((one for one in self.pictures if one.there), key=lambda one: one.name)
        told = (one for one in there if plain(one.name) == plain(self.file_name.split("\\")[-1]))
        return next(told, next(iter(there), None))


def write_voc(drawn: DataSet, root: Path) -> Expected:
    """The split, and another one of one image."""
    images, xml = root / IMAGES[drawn.layout].format(drawn.split), root / XML[drawn.layout].format(drawn.split)
    expected = Expected(drawn.split, sorted(drawn.names), drawn.max_bad_fraction)
    groups = _groups(drawn)
    images.mkdir(parents=True)
    for group in groups:
        for picture in group.pictures:
            picture.write(images, root / "store")
        if group.has_xml:
            _write_xml(drawn, group, _xml_path(drawn, xml, group, groups))
        (_expect_listed if drawn.layout == LISTED else _expect_by_folder)(drawn, group, images, expected)
    if drawn.strays:
        for name in ("._1.jpg", "notes.md", "phone.heic"):
            (images / name).write_bytes(b"?")
        expected.counts["file that may be an image, of a kind that is not read"] += drawn.layout != LISTED or drawn.split == "train"
    _write_other(drawn, root)
    if drawn.layout == LISTED:
        _write_list(drawn, root, groups)
    if drawn.spoiled is not None:
        expected.spoiled = _spoil(drawn, root)
    return expected


def _spoil(drawn: DataSet, root: Path) -> str:
    if drawn.layout == LISTED:
        (root / "ImageSets" / "Main" / f"{drawn.split}.txt").write_bytes("Stück".encode("utf-16"))
        return "the list of names is not UTF-8 text"
    for path in root.rglob("*.[xX][mM][lL]"):
        path.write_text("<annotation/>")
    return "VOC xml files names an object"


def _groups(drawn: DataSet) -> list[Group]:
    found: dict[str, Group] = {}
    for picture in drawn.pictures:
        found.setdefault(plain(f"{picture.folder}/{picture.stem}"), Group([])).pictures.append(picture)
    stems = Counter(plain(group.first.stem) for group in found.values())
    for group in found.values():
        group.alone = stems[plain(group.first.stem)] == 1
    groups = list(found.values())
    for number, group in enumerate(groups):
        group.file_name = _file_name(drawn, group, groups[number - 1])
    return groups


def _is_flat(drawn: DataSet, groups: list[Group]) -> bool:
    """Beside each other only where their names say all: `1.jpg` may be an image's whole name, too."""
    names = Counter(name for group in groups for name in {plain(group.first.stem), *(plain(one.name) for one in group.pictures)})
    return drawn.flat and max(names.values()) == 1


def _xml_path(drawn: DataSet, folder: Path, group: Group, groups: list[Group]) -> Path:
    place = folder if _is_flat(drawn, groups) else folder / drawn.spelled(group.first.folder)
    return place / (drawn.spelled(group.first.stem) + (".XML" if drawn.capitals else ".xml"))


def _file_name(drawn: DataSet, group: Group, other: Group) -> str:
    name = group.first.name
    stale = other.first.name if other.has_xml else name
    return {"right": name, "none": "", "stem": group.first.stem, "windows": f"C:\\data\\{name}", "stale": stale}[drawn.file_names]


def _write_xml(drawn: DataSet, group: Group, path: Path) -> None:
    picture = group.first
    size = picture.told_size
    parts = [
        f"<filename>{escape(drawn.spelled(group.file_name))}</filename>",
        SOURCE if drawn.published else "",
        "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>",
        *(_object(drawn, box) for box in picture.boxes for _ in range(box.copies if box.name is not None else 0)),
        *(UNREADABLE[number % len(UNREADABLE)].format(escape(drawn.names[0])) for number in picture.junk),
    ]
    text = "<annotation>" + "\n".join(parts) + ("" if picture.notes == "broken" else "</annotation>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(drawn, text))


def _encoded(drawn: DataSet, text: str) -> bytes:
    encoding = drawn.encoding
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        encoding = "utf-8"
    declared = f'<?xml version="1.0" encoding="{encoding}"?>\n{text}' if encoding else text
    return drawn.bytes(declared) if encoding in ("", "utf-8") else declared.encode(encoding)


def _object(drawn: DataSet, box: Box) -> str:
    x1, y1, x2, y2 = box.corners
    first = 1 if drawn.published else 0
    values = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + first, y1 + first, x2, y2), strict=True)
    edges = "".join(f"<{key}>{int(value) if value % 1 == 0 else repr(value)}</{key}>" for key, value in values)
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>" if box.form == "outline" else ""
    return f"<object><name> {escape(box.name or '')}\n</name>{part}<difficult>{int(box.crowd)}</difficult><bndbox>{edges}</bndbox></object>"


def _written(group: Group) -> list[Written]:
    return [Written(box, (box.corners, box.name)) for box in group.first.boxes if box.name is not None]


def _expect_read(group: Group, images: Path, expected: Expected) -> None:
    picture = group.picture()
    assert picture is not None
    if group.first.notes == "broken":
        expected.bad_image("broken xml")
    else:
        expected.counts["unreadable object"] += len(group.first.junk)
        expected.picture(images / picture.inside, picture, group.first.told_size, _written(group))


def _expect_listed(drawn: DataSet, group: Group, images: Path, expected: Expected) -> None:
    named, picture = group.first.named != "never", group.picture()
    expected.counts["image that is named twice"] += group.first.named == "twice"
    if named and not group.has_xml:
        expected.bad_image("no xml for an image")
    elif named and picture is None:
        expected.bad_image("image file missing")
    elif named:
        _expect_read(group, images, expected)
        expected.counts["image that no annotation names"] += sum(one.there for one in group.pictures) - 1
    elif drawn.split == "train":
        expected.counts["image that no annotation names"] += sum(one.there for one in group.pictures)


def _expect_by_folder(drawn: DataSet, group: Group, images: Path, expected: Expected) -> None:
    count = sum(one.there for one in group.pictures)
    expected.counts["no xml for an image"] += count - (group.has_xml and count > 0)
    if group.has_xml and count:
        _expect_read(group, images, expected)
    elif group.has_xml and (drawn.layout != LOOSE or drawn.split == "train"):
        expected.bad_image("image file missing")


def _write_list(drawn: DataSet, root: Path, groups: list[Group]) -> None:
    other = "val" if drawn.split == "train" else "train"
    lines, flat = [], _is_flat(drawn, groups)
    for number, group in enumerate(groups):
        name = drawn.spelled(f"{'' if flat else group.first.folder}/{group.first.stem}".lstrip("/"))
        lines += {"never": 0, "twice": 2}.get(group.first.named, 1) * [f"{name} {' 1' if group.has_xml and number % 2 else ''}"]
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True)
    (folder / f"{drawn.split}.txt").write_bytes(drawn.bytes("\n".join(lines)))
    (folder / f"{other}.txt").write_text("of the other split\n")


def _write_other(drawn: DataSet, root: Path) -> None:
    split = "val" if drawn.split == "train" else "train"
    image = root / IMAGES[drawn.layout].format(split) / "of the other split.jpg"
    xml = root / XML[drawn.layout].format(split) / "of the other split.xml"
    for path in (image, xml):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(encoded((32, 32), ".jpg", 1))
    edges = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    objects = "".join(f"<object><name>{escape(name)}</name>{edges}</object>" for name in drawn.names)
    xml.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")
