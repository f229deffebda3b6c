"""Reads Pascal VOC xml (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/index.html).

Layouts: `Annotations/*.xml`, `ImageSets/Main/{train,val}.txt` and `JPEGImages`, as VOC is published; or a folder of xml
files (`Annotations`, `voc`, `xml`, the data set folder itself, or the split's own) with images in `JPEGImages/{train,val}`,
`images/{train,val}` or `{train,val}`, where an xml belongs to the split whose image folder holds its file; one in a folder of a split's
name (`Annotations/train`, `train`) belongs to that split only, because every split may number its images from 1. Xml and images may lie
in folders below: an xml is of the image of its name in the folder of its folder's name, or of the only one of its name. A line of a list of
names is a name, with its folders or without, and with a column 1, 0 or -1 behind it or not. Classes are sorted by name over all xml
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
from pathlib import Path

from gai_yolo.data.formats.check import MISSING, NOT_NAMED, SAME_IMAGE, SPLIT_NAMES, Problems, RawBox, RawImage, Split, build_index
from gai_yolo.data.formats.folders import IMAGE_SUFFIXES, NOT_READ, Folders, plain_name
from gai_yolo.data.formats.reading import Doubt, expand, read_text
from gai_yolo.data.formats.voc_files import USUAL_XML, Names, VocFile, VocImages, find_xml, is_bare, names_of, parse_voc
from gai_yolo.data.index import Category, Index
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

BROKEN_XML = "broken xml"
NO_XML = "no xml for an image"
SECOND_XML = "second xml of an image"
BAD_OBJECT = "unreadable object"

_CLASS_COLUMN = re.compile(r"\s+(1|0|-1)$")

Chosen = list[tuple[Path, VocFile]]
"""Images and their xml."""


def read_voc(root: Path, config: DataConfig, split: Split, folders: Folders) -> Index:
    """Read one split of a Pascal VOC data set.

    Raises:
        DataError: xml files, image folder or list of names are not found, an xml cannot be read, no xml names a class, it cannot be told
            of which image an xml is, or too many images are bad (a broken xml counts as a bad image).
    """
    files = [parse_voc(path, root, folders.doubt) for path in find_xml(root, folders)]
    names = sorted({item.name for file in files for item in file.objects if item.name})
    if not names:
        raise DataError(f"{root}: none of {len(files)} VOC xml files names an object (looked for {USUAL_XML}); correct data.path.")
    problems = Problems()
    chosen = _choose(root, config, split, files, problems, folders)
    positions = {name: position for position, name in enumerate(names)}
    images = [_image(number, path, file, positions, problems) for number, (path, file) in enumerate(chosen, start=1)]
    categories = [Category(position + 1, name) for position, name in enumerate(names)]
    return build_index(f"{root} (VOC, {split})", categories, images, problems, config.max_bad_fraction, folders)


def has_split(root: Path, place: SplitConfig, split: Split) -> bool:
    """Whether there is a list of names of a split, or a folder of its images."""
    try:
        return _list_of_names(root, place, split) is not None or _image_folder(root, place, split).is_dir()
    except DataError:
        return False


def _choose(root: Path, config: DataConfig, split: Split, files: Sequence[VocFile], problems: Problems, folders: Folders) -> Chosen:
    """The image and xml of each usable image of a split, sorted by image path."""
    place = config.train if split == "train" else config.val
    source = _list_of_names(root, place, split)
    if source is None:
        chosen = _choose_by_folder(root, config, split, files, problems, folders)
    else:
        chosen = _choose_listed(source, root, config, split, files, problems, folders)
    usable: dict[Path, VocFile] = {}
    for path, file in chosen:
        if file.broken:
            problems.add_bad_image(BROKEN_XML, f"{file.path} (of {path.name})", path)
        elif path in usable:
            problems.add(SECOND_XML, str(file.path), "second skipped", path)
        else:
            usable[path] = file
    return sorted(usable.items())


def _list_of_names(root: Path, place: SplitConfig, split: Split) -> Path | None:
    usual = [root / "ImageSets" / "Main" / f"{name}.txt" for name in SPLIT_NAMES[split]]
    candidates = [root / expand(place.annotations)] if place.annotations is not None else usual
    found = next((path for path in candidates if path.is_file()), None)
    if found is None and place.annotations is not None:
        raise DataError(f"{candidates[0]}: no such file; correct data.{split}.annotations (relative to data.path).")
    return found


def _listed(source: Path, known: Set[str], doubt: Doubt) -> list[str]:
    lines = (plain_name(line.strip().removeprefix("./")) for line in read_text(source, "list of names", doubt).splitlines())
    return [line if line in known else _CLASS_COLUMN.sub("", line) for line in lines if line]


def _image_folder(root: Path, place: SplitConfig, split: Split, before: Sequence[str] = (), after: Sequence[str] = ()) -> Path:
    own = [name for alias in SPLIT_NAMES[split] for name in (f"JPEGImages/{alias}", f"images/{alias}", alias)]
    usual = [root / name for name in (*before, *own, *after)]
    candidates = [root / expand(place.images)] if place.images is not None else usual
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        looked = ", ".join(str(folder) for folder in candidates)
        raise DataError(f"{root}: found no image folder of the {split} split (looked for {looked}); set data.{split}.images.")
    return found


def _choose_listed(
    source: Path, root: Path, config: DataConfig, split: Split, files: Sequence[VocFile], problems: Problems, folders: Folders
) -> Chosen:
    place = config.train if split == "train" else config.val
    images = VocImages(_image_folder(root, place, split, ("JPEGImages",), ("images", ".")), root, split, folders)
    ours = [file for file in files if file.place.split in (None, split)]
    by_name: dict[str, list[VocFile]] = {}
    for one in ours:
        for name in names_of(one.inside, bare=True):
            by_name.setdefault(name, []).append(one)
    names = _listed(source, by_name.keys(), folders.doubt)
    if not is_bare(names):
        by_name = {name: [one for one in found if name in names_of(one.inside, bare=False)] for name, found in by_name.items()}
    image_of = images.of(ours)
    chosen: Chosen = []
    seen: set[Path | str] = set()
    for name in names:
        file = _named(name, by_name.get(name, []), source)
        key = file.path if file else name
        if key in seen:
            problems.add(SAME_IMAGE, f"{source}: {name}", "counted once")
        elif file is None:
            problems.add_bad_image(NO_XML, name)
        elif file.path in image_of:
            chosen.append((image_of[file.path], file))
        else:
            absent = images.folder / (Path(file.file_name).name or f"{name}.jpg")
            problems.add_bad_image(MISSING, str(absent), absent)
        seen.add(key)
    unused = images.unused({path for path, _ in chosen}, _all_names(root, config, folders, split))
    for path in sorted({*unused, *images.named(images.others, frozenset(names))}):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            problems.add(NOT_NAMED, str(path), "not used", path)
        else:
            problems.add(NOT_READ, str(path), "left out; convert them to jpg or png", path)
    return chosen


def _named(name: str, found: Sequence[VocFile], source: Path) -> VocFile | None:
    """The xml that a list calls so."""
    exactly = [file for file in found if plain_name(str(file.inside.with_suffix(""))) == name]
    if not exactly and len(found) > 1:
        raise DataError(f"{source}: {name} may be {found[0].path} or {found[1].path}; write names with their folders.")
    return next(iter(exactly or found), None)


def _all_names(root: Path, config: DataConfig, folders: Folders, split: Split) -> Names | None:
    """What any split's list names; None for other splits than train, against which it is held what no list names."""
    if split != "train":
        return None
    usual = [root / "ImageSets" / "Main" / f"{name}.txt" for names in (*SPLIT_NAMES.values(), ("trainval",)) for name in names]
    given = [root / expand(place.annotations) for place in (config.train, config.val) if place.annotations is not None]
    lists = [read_text(path, "list of names", folders.doubt) for path in (*usual, *given) if path.is_file()]
    lines = [plain_name(line.strip().removeprefix("./")) for text in lists for line in text.splitlines()]
    return frozenset(lines) | {_CLASS_COLUMN.sub("", line) for line in lines}


def _choose_by_folder(
    root: Path, config: DataConfig, split: Split, files: Sequence[VocFile], problems: Problems, folders: Folders
) -> Chosen:
    place, other = (config.train, config.val) if split == "train" else (config.val, config.train)
    images = VocImages(_image_folder(root, place, split), root, split, folders)
    image_of = images.of([file for file in files if file.place.split in (None, split)])
    annotated = set(image_of.values())
    if place.images is not None and place.images == other.images:
        annotated |= set(images.of([file for file in files if file.place.split not in (None, split)]).values())
    for path in images.all:
        if path not in annotated:
            problems.add(NO_XML, str(path), "left out", path)
    for path in images.others:
        problems.add(NOT_READ, str(path), "left out; convert them to jpg or png", path)
    # An xml whose image is in neither split's folder cannot say where it belongs, unless its own folder does; it is held against train.
    free = [file for file in files if file.place.split is None]
    try:
        others = VocImages(_image_folder(root, config.val, "val"), root, "val", folders).of(free) if split == "train" else None
    except DataError:  # there is no val split; reading that will tell
        others = None
    for file in files:
        is_nobodys = others is not None and file.place.split is None and file.path not in others
        if file.path not in image_of and (file.place.split == split or is_nobodys):
            problems.add_bad_image(MISSING, f"image of {file.path}")
    return [(image_of[file.path], file) for file in files if file.path in image_of]


def _image(number: int, path: Path, file: VocFile, positions: dict[str, int], problems: Problems) -> RawImage:
    image = RawImage(number, path, f"{file.path}, object", size=file.size)
    for count, item in enumerate(file.objects, start=1):
        if item.corners is None or not item.name:
            problems.add(BAD_OBJECT, f"{file.path}, object {count}", "skipped", path)
        else:
            image.boxes.append(RawBox(item.corners, positions[item.name], count))
    return image
