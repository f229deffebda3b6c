"""The files of a Pascal VOC data set: where xml and images lie, what stands in an xml, and which image it is of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from xml.etree import ElementTree

from gai_yolo.data.formats.check import SPLIT_NAMES, Split
from gai_yolo.data.formats.folders import IMAGE_SUFFIXES, Folders, is_picture, plain_name
from gai_yolo.data.formats.reading import Doubt, read_annotations
from gai_yolo.errors import DataError

Names = frozenset[str]

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
class Place:
    """Where a file lies below the folder of all that are like it."""

    split: Split | None
    """The split whose name the first folder has."""
    folder: tuple[str, ...]
    """The folders below that."""


@dataclass(frozen=True)
class VocFile:
    """One xml file; a broken one has no objects."""

    path: Path
    inside: PurePath
    """The path below the folder of all of them."""
    place: Place
    broken: bool = False
    file_name: str = ""
    size: tuple[float, float] | None = None
    objects: tuple[VocObject, ...] = ()

    @property
    def image_name(self) -> str:
        """Of the image, without its folders, as the xml has it."""
        return plain_name(PurePosixPath(self.file_name.replace("\\", "/")).name)


def place_in(path: PurePath) -> Place:
    """That of a file by its path relative to the folder of all xml files or of all images."""
    first, rest = path.parts[:1], path.parts[1:-1]
    split = next((split for split, names in SPLIT_NAMES.items() if first and first[0] in names), None) if len(path.parts) > 1 else None
    return Place(split, rest if split else path.parts[:-1])


def _relative(path: Path, root: Path) -> PurePath:
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


def parse_voc(path: Path, root: Path, doubt: Doubt) -> VocFile:
    """Read one xml file. Never raises for its content: what cannot be parsed is marked `broken`.

    Entities are refused: no annotation tool writes them, and expanding them is how a small file fills the memory.

    Raises:
        DataError: as `read_annotations`.
    """
    tree = parsed_voc(read_annotations(path, "xml", doubt))
    inside = _relative(path, root)
    place = place_in(inside)
    if tree is None:
        return VocFile(path, inside, place, broken=True)
    origin = f"{tree.findtext('source/annotation', '')} {tree.findtext('source/database', '')}"
    first = 1.0 if "PASCAL VOC" in origin or "The VOC" in origin else 0.0
    size = _numbers(tree.find("size"), ("width", "height"))
    objects = tuple(_object(element, first) for element in tree.iter("object"))
    file_name = tree.findtext("filename", "").strip()
    return VocFile(path, inside, place, False, file_name, (size[0], size[1]) if size else None, objects)


def parsed_voc(data: bytes) -> ElementTree.Element | None:
    """What an xml says; None if it cannot be parsed, or has entities."""
    try:
        if b"<!ENTITY" in data.replace(b"\0", b""):  # in UTF-16, too
            raise ValueError("entities")
        return _parsed(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        return None


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


def names_of(path: PurePath, bare: bool) -> Names:
    """What a list may call a file, given its path below the folder of all that are like it: with its folders, without the split's, or,
    where the list names no folders (`bare`), without any."""
    place, stem = place_in(path), path.stem
    return frozenset(plain_name(str(PurePosixPath(*parts, stem))) for parts in (path.parts[:-1], place.folder, *([()] if bare else [])))


def is_bare(names: Iterable[str]) -> bool:
    """Whether a list names files without their folders."""
    return not any("/" in name for name in names)


class VocImages:
    """The image files of a folder; of that and those below, unless it is the data set's own.

    Args:
        split: images in a folder below that is named after another split are not among them.
    """

    def __init__(self, folder: Path, root: Path, split: Split, folders: Folders) -> None:
        found = sorted(folder / name for name in folders.names(folder)) if folder == root else folders.files_under(folder)
        self.folder = folder
        self.places = {path: place_in(path.relative_to(folder)) for path in found if is_picture(path.name)}
        self.places = {path: place for path, place in self.places.items() if place.split in (None, split)}
        self.all = [path for path in self.places if path.suffix.lower() in IMAGE_SUFFIXES]
        self.others = [path for path in self.places if path.suffix.lower() not in IMAGE_SUFFIXES]
        """Of a kind that is not read."""
        self._by_stem: dict[str, list[Path]] = {}
        self._by_name: dict[str, list[Path]] = {}
        for path in self.all:
            self._by_stem.setdefault(plain_name(path.stem), []).append(path)
            self._by_name.setdefault(plain_name(path.name), []).append(path)

    def of(self, files: Sequence[VocFile]) -> dict[Path, Path]:
        """The images of some xml files, by the paths of these. Only names that the listing has are taken, so that an xml cannot lead out
        of the folder.

        The xml's own name comes first, because tools leave a `filename` without suffix, or of before a renaming; of `1.jpg` and `1.png` it
        says which. Of images of one name that lies in the folder that the xml's folder stands for.

        Raises:
            DataError: nothing says which of several an xml is of.
        """
        found: dict[Path, Path] = {}
        for by in (self._by_stem, self._by_name):  # of `1.jpg` the xml is `1.xml` or `1.jpg.xml`
            taken = set(found.values())
            for file in files:
                if file.path not in found and (image := self._beside(file, by, taken)):
                    found[file.path] = image
        # One beside a taken one of the same name is nobody's: the xml that says what is in it is that one's.
        taken = {path for image in found.values() for path in self._by_stem[plain_name(image.stem)] if path.parent == image.parent}
        left = [file for file in files if file.path not in found]
        stems = {plain_name(file.path.stem) for file in files}
        for file in left:
            own = self._by_stem.get(plain_name(file.path.stem)) or self._by_name.get(plain_name(file.path.stem), [])
            own = [path for path in own if path not in taken]
            free = [path for path in self._named(file) if path not in taken and not {plain_name(path.stem), plain_name(path.name)} & stems]
            if image := self._only(file, own or free):
                found[file.path] = image
        self._refuse_shared(found, left)
        return found

    def _beside(self, file: VocFile, images: dict[str, list[Path]], taken: Set[Path]) -> Path | None:
        folder = [*map(plain_name, file.place.folder)]
        same = [path for path in images.get(plain_name(file.path.stem), []) if path not in taken]
        return _best(file, [path for path in same if [*map(plain_name, self.places[path].folder)] == folder])

    def _named(self, file: VocFile) -> list[Path]:
        return self._by_name.get(file.image_name) or self._by_stem.get(plain_name(Path(file.image_name).stem), [])

    def _only(self, file: VocFile, images: Sequence[Path]) -> Path | None:
        if len({path.parent for path in images}) > 1:
            raise DataError(
                f"{file.path}: may be of {images[0]} or of {images[1]}; let xml and images lie in folders of the same names, below "
                f"that of all xml and {self.folder}."
            )
        return _best(file, images)

    def _refuse_shared(self, found: dict[Path, Path], files: Sequence[VocFile]) -> None:
        first: dict[Path, Path] = {}
        for file in files:
            image = found.get(file.path)
            if image is not None and (other := first.setdefault(image, file.path)).parent != file.path.parent:
                raise DataError(
                    f"{image}: may be of {other} or of {file.path}; let xml and images lie in folders of the same names, below that of "
                    f"all xml and {self.folder}."
                )

    def unused(self, chosen: Set[Path], named: Names | None) -> list[Path]:
        """Those that are not chosen, although they could be: beside one of the same name that is; and unless `named` is None those that
        nobody names."""
        beside = {(self.places[path], plain_name(path.stem)) for path in chosen}
        left = self.places.keys() - chosen
        unknown = set() if named is None else left - set(self.named(left, named))
        shadowed = [path for path in left if (self.places[path], plain_name(path.stem)) in beside]
        return sorted({*unknown, *shadowed})

    def named(self, paths: Iterable[Path], names: Names) -> Iterator[Path]:
        """Those that a list means."""
        bare = is_bare(names)
        for path in paths:
            inside = path.relative_to(self.folder)
            if any(names_of(one, bare) & names for one in (inside, inside.with_name(f"{inside.name}.xml"))):
                yield path


def _best(file: VocFile, images: Sequence[Path]) -> Path | None:
    return next((path for path in images if plain_name(path.name) == file.image_name), images[0] if images else None)
