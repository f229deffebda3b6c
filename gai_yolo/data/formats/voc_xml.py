"""The xml files of a Pascal VOC data set: where they lie and what stands in one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from xml.etree import ElementTree

from gai_yolo.data.formats.check import SPLIT_NAMES, Split
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.reading import Doubt, read_annotations

USUAL_XML = "*.xml in Annotations, annotations, voc, xml, xmls, train, valid or the folder itself"

_XML_FOLDERS = ("Annotations", "annotations", "voc", "xml", "xmls", ".")
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
_BOX_KEYS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocObject:
    """One `object` element; `corners` is None if its box cannot be read."""

    name: str
    corners: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class VocFile:
    """One xml file; a broken one has no objects."""

    path: Path
    broken: bool = False
    file_name: str = ""
    size: tuple[float, float] | None = None
    objects: tuple[VocObject, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a file lies below the folder of all that are like it."""

    split: Split | None
    """The split whose name the first folder has."""
    folder: tuple[str, ...]
    """The folders below that."""


def place_in(path: PurePath) -> Place:
    """That of a file by its path relative to the folder of all xml files or of all images."""
    first, rest = path.parts[:1], path.parts[1:-1]
    split = next((split for split, names in SPLIT_NAMES.items() if first and first[0] in names), None) if len(path.parts) > 1 else None
    return Place(split, rest if split else path.parts[:-1])


def relative(path: Path, root: Path) -> PurePath:
    """An xml's path below the folder of all of them."""
    inside = path.relative_to(root)
    return PurePath(*inside.parts[1:]) if inside.parts[0] in _XML_FOLDERS and len(inside.parts) > 1 else inside


def find_xml(root: Path, folders: Folders) -> list[Path]:
    """All xml files of a data set, from the first usual folder that has any in it or below, or else from the folders of the splits."""
    for name in _XML_FOLDERS:
        found = _xml_under(root / name, folders) if name != "." else folders.matching(root, "*.[xX][mM][lL]")
        if found:
            return found
    return [path for names in SPLIT_NAMES.values() for name in names for path in _xml_under(root / name, folders)]


def _xml_under(folder: Path, folders: Folders) -> list[Path]:
    return [path for path in folders.files_under(folder) if path.suffix.lower() == ".xml"] if folder.is_dir() else []


def parse_voc(path: Path, doubt: Doubt) -> VocFile:
    """Read one xml file. Never raises for its content: what cannot be parsed is marked `broken`.

    Entities are refused: no annotation tool writes them, and expanding them is how a small file fills the memory.

    Raises:
        DataError: as `read_annotations`.
    """
    data = read_annotations(path, "xml", doubt)
    try:
        if b"<!ENTITY" in data.replace(b"\0", b""):  # in UTF-16, too
            return VocFile(path, broken=True)
        tree = _parsed(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        return VocFile(path, broken=True)
    origin = f"{tree.findtext('source/annotation', '')} {tree.findtext('source/database', '')}"
    first = 1.0 if "PASCAL VOC" in origin or "The VOC" in origin else 0.0
    size = _numbers(tree.find("size"), ("width", "height"))
    objects = tuple(_object(element, first) for element in tree.iter("object"))
    return VocFile(path, False, tree.findtext("filename", "").strip(), (size[0], size[1]) if size else None, objects)


def _parsed(data: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        declared = _DECLARATION.match(data)
        if declared is None:
            raise
        # Expat knows no encodings with several bytes for a letter but Unicode's.
        text = data.decode(declared[1].decode())
        return ElementTree.fromstring(text[text.index("?>") + 2 :].strip())


def _object(element: ElementTree.Element, first: float) -> VocObject:
    values = _numbers(element.find("bndbox"), _BOX_KEYS)
    corners = (values[0] - first, values[1] - first, values[2], values[3]) if values else None
    return VocObject(element.findtext("name", "").strip(), corners)


def _numbers(parent: ElementTree.Element | None, keys: Sequence[str]) -> list[float] | None:
    if parent is None:
        return None
    try:
        return [float(parent.findtext(key, "")) for key in keys]
    except ValueError:
        return None
