"""Reads Pascal VOC xml (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/index.html).

Layouts: `Annotations/*.xml`, `ImageSets/Main/{train,val}.txt` and `JPEGImages`, as VOC is published; or a folder of xml
files (`Annotations`, `voc`, `xml`, the data set folder itself, or the split's own) with images in `images/{train,val}` or
`{train,val}`, where an xml belongs to the split whose image folder holds its file; one in a split's own folder belongs to that split
only, because every split may number its images from 1. A line of a list of names is a name, with a column 1, 0 or -1 behind it or not.
Classes are sorted by name over all xml
files of the data set, so train and val agree; category ids are the positions + 1, image ids 1..N in sorted path order.

Coordinates. The files of the VOC challenge itself count pixels from 1 and include the last one, so their box is
(xmin - 1, ymin - 1, xmax, ymax); they are known by their `source` ("PASCAL VOC2007", "The VOC2007 Database"). Other tools
(LabelImg and what imitates it) write the edges they drew, and are taken as they are: so the xml of the blood cell data set
(bccd) gives exactly the boxes of its COCO and YOLO forms, and its two boxes with xmin = xmax have no area.

`difficult` objects are kept as ordinary ones (crowd = False): they are trained on, and a detector that misses one loses
recall, whereas VOC's own metric leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from gai_yolo.data.check import MISSING, SPLIT_NAMES, RawBox, RawImage, Split, build_index, expand, read_annotations, read_text
from gai_yolo.data.folders import IMAGE_SUFFIXES, Folders, is_hidden, plain_name
from gai_yolo.data.index import Category, Index
from gai_yolo.data.problems import Problems
from gai_yolo.data.reading import Doubt
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

LOOKED_FOR = "*.xml in Annotations, annotations, voc, xml, xmls, train, valid or the folder itself"
BROKEN_XML = "broken xml"
NO_XML = "no xml for an image"
SECOND_XML = "second xml of an image"
BAD_OBJECT = "unreadable object"

_XML_FOLDERS = ("Annotations", "annotations", "voc", "xml", "xmls", ".")
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
_CLASS_COLUMN = re.compile(r"\s+(1|0|-1)$")
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


def read_voc(root: Path, config: DataConfig, split: Split, folders: Folders) -> Index:
    """Read one split of a Pascal VOC data set.

    Raises:
        DataError: xml files, image folder or list of names are not found, an xml cannot be read, no xml names a class, or too many
            images are bad (a broken xml counts as a bad image).
    """
    files = [parse_voc(path, folders.doubt) for path in find_xml(root, folders)]
    names = sorted({item.name for file in files for item in file.objects if item.name})
    if not names:
        raise DataError(f"{root}: none of {len(files)} VOC xml files names an object (looked for {LOOKED_FOR}); correct data.path.")
    problems = Problems()
    chosen = _choose(root, config, split, [file for file in files if _split_of(file.path) in (None, split)], problems, folders)
    positions = {name: position for position, name in enumerate(names)}
    images = [_image(number, path, file, positions, problems) for number, (path, file) in enumerate(chosen, start=1)]
    categories = [Category(position + 1, name) for position, name in enumerate(names)]
    return build_index(f"{root} (VOC, {split})", categories, images, problems, config.max_bad_fraction, folders)


def find_xml(root: Path, folders: Folders) -> list[Path]:
    """All xml files of a data set, from the first usual folder that has any, or else from the folders of the splits."""
    for name in _XML_FOLDERS:
        found = folders.matching(root / name, "*.xml")
        if found:
            return found
    return [path for names in SPLIT_NAMES.values() for name in names for path in folders.matching(root / name, "*.xml")]


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


def _split_of(path: Path) -> Split | None:
    """The split in whose own folder an xml lies."""
    return next((split for split, names in SPLIT_NAMES.items() if path.parent.name in names), None)


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


def _choose(
    root: Path, config: DataConfig, split: Split, files: Sequence[VocFile], problems: Problems, folders: Folders
) -> list[tuple[Path, VocFile]]:
    """The image and xml of each usable image of a split, sorted by image path."""
    place = config.train if split == "train" else config.val
    listed = _list_of_names(root, place, split, {plain_name(file.path.stem) for file in files}, folders.doubt)
    if listed is not None:
        folder = _image_folder(root, place, split, ("JPEGImages",), ("images", "."))
        chosen = _choose_listed(listed, folder, files, problems, folders)
    else:
        chosen = _choose_by_folder(root, config, split, files, problems, folders)
    usable: dict[Path, VocFile] = {}
    for path, file in chosen:
        if file.broken:
            problems.add_bad_image(BROKEN_XML, f"{file.path} (of {path.name})", path)
        elif path in usable:
            problems.add(SECOND_XML, str(file.path), "second skipped", path)
        else:
            usable[path] = file
    return sorted(usable.items())


def _list_of_names(root: Path, place: SplitConfig, split: Split, known: Set[str], doubt: Doubt) -> list[str] | None:
    usual = [root / "ImageSets" / "Main" / f"{name}.txt" for name in SPLIT_NAMES[split]]
    candidates = [root / expand(place.annotations)] if place.annotations is not None else usual
    found = next((path for path in candidates if path.is_file()), None)
    if found is None and place.annotations is not None:
        raise DataError(f"{candidates[0]}: no such file; correct data.{split}.annotations (relative to data.path).")
    if found is None:
        return None
    lines = (plain_name(line.strip()) for line in read_text(found, "list of names", doubt).splitlines())
    return list(dict.fromkeys(line if line in known else _CLASS_COLUMN.sub("", line) for line in lines if line))


def _image_folder(root: Path, place: SplitConfig, split: Split, before: Sequence[str] = (), after: Sequence[str] = ()) -> Path:
    own = [name for alias in SPLIT_NAMES[split] for name in (f"images/{alias}", alias)]
    usual = [root / name for name in (*before, *own, *after)]
    candidates = [root / expand(place.images)] if place.images is not None else usual
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        looked = ", ".join(str(folder) for folder in candidates)
        raise DataError(f"{root}: found no image folder of the {split} split (looked for {looked}); set data.{split}.images.")
    return found


def _choose_listed(
    names: list[str], folder: Path, files: Sequence[VocFile], problems: Problems, folders: Folders
) -> list[tuple[Path, VocFile]]:
    images, by_name = _Images(folder, folders), {plain_name(file.path.stem): file for file in files}
    chosen = []
    for name in names:
        if name not in by_name:
            problems.add_bad_image(NO_XML, name)
            continue
        image = images.of(by_name[name])
        if image is None:
            absent = folder / (Path(by_name[name].file_name).name or f"{name}.jpg")
            problems.add_bad_image(MISSING, str(absent), absent)
        else:
            chosen.append((image, by_name[name]))
    return chosen


def _choose_by_folder(
    root: Path, config: DataConfig, split: Split, files: Sequence[VocFile], problems: Problems, folders: Folders
) -> list[tuple[Path, VocFile]]:
    place = config.train if split == "train" else config.val
    images = _Images(_image_folder(root, place, split), folders)
    pairs = [(images.of(file), file) for file in files]
    chosen = [(path, file) for path, file in pairs if path is not None]
    annotated = {path for path, _ in chosen}
    for path in sorted(set(images.all) - annotated):
        problems.add(NO_XML, str(path), "left out", path)
    if split == "train":
        _count_orphans(root, config.val, files, {file.path for _, file in chosen}, problems, folders)
    return chosen


def _count_orphans(root: Path, val: SplitConfig, files: Sequence[VocFile], taken: set[Path], problems: Problems, folders: Folders) -> None:
    """An xml whose image is in neither split's folder cannot say where it belongs; it is held against train."""
    try:
        others = _Images(_image_folder(root, val, "val"), folders)
    except DataError:  # there is no val split; reading that will tell
        return
    for file in files:
        if file.path not in taken and others.of(file) is None:
            problems.add_bad_image(MISSING, f"image of {file.path}")


class _Images:
    """The image files of a folder."""

    def __init__(self, folder: Path, folders: Folders) -> None:
        names = sorted(name for name in folders.names(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name))
        self.all = [folder / name for name in names]
        self._by_name = {plain_name(path.name): path for path in self.all}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self.all:
            self._by_stem.setdefault(plain_name(path.stem), []).append(path)

    def of(self, file: VocFile) -> Path | None:
        """That of an xml. Only names that the listing has are taken, so an xml cannot lead out of the folder. The xml's own name comes
        first, because tools leave a `filename` without suffix, or of before a renaming; of `1.jpg` and `1.png` it says which."""
        own = self._by_stem.get(plain_name(file.path.stem), [])
        named = self._by_name.get(plain_name(PurePosixPath(file.file_name.replace("\\", "/")).name))
        if named is not None and (named in own or not own):
            return named
        if own:
            return own[0]
        return self._by_name.get(plain_name(file.path.stem)) or next(
            iter(self._by_stem.get(plain_name(Path(file.file_name).stem), [])), None
        )


def _image(number: int, path: Path, file: VocFile, positions: dict[str, int], problems: Problems) -> RawImage:
    image = RawImage(number, path, f"{file.path}, object", size=file.size)
    for count, item in enumerate(file.objects, start=1):
        if item.corners is None or not item.name:
            problems.add(BAD_OBJECT, f"{file.path}, object {count}", "skipped", path)
        else:
            image.boxes.append(RawBox(item.corners, positions[item.name], count))
    return image
