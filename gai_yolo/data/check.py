"""What is checked while a data set is read, the same for every annotation format.

A reader turns its files into `RawImage`s and `build_index` does the rest: finds missing and unreadable images, takes the
real image sizes, clips boxes and leaves out impossible ones. Everything that was mended or left out is counted in
`Problems`; only what makes the data set useless is refused.
"""

from __future__ import annotations

import fnmatch
import math
import os
import struct
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from gai_yolo.data import reading
from gai_yolo.data.index import Category, ImageRecord, Index, Problem, make_record
from gai_yolo.data.reading import Doubt, patiently, read_file
from gai_yolo.errors import DataError, refused_by
from gai_yolo.machine import available_cores

Split = Literal["train", "val"]
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation")}
"""What folders and files of a split are called, the most usual name first (Roboflow writes `valid`)."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm"}
)
OTHER_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".gif", ".jp2", ".jxl", ".dng", ".raw", ".cr2", ".nef", ".exr", ".hdr", ".psd", ".svg"}
)
"""Of pictures that OpenCV does not decode, not everywhere or not as one picture."""

Image.MAX_IMAGE_PIXELS = None  # only headers are read with it; what can be decoded is up to OpenCV
ORIENTATION, SIDES_CHANGE = 0x0112, 5
"""EXIF's tag, and from which of its values on width and height change places."""
MOST_PIXELS, LONGEST_SIDE = 2**30, 2**20
"""What OpenCV decodes."""
MIN_SIDE = 1e-3
"""Pixels; a shorter side is what remains of a mis-click or of rounded fractions, and IoU with it is noise."""
CLIP_TOLERANCE = 0.5
"""Pixels; written decimals are rounded, so less than this beyond the border is clipped without being counted."""

_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM")
"""Formats that OpenCV decodes as well; a file that only Pillow understands would fail in the loader."""

MISSING = "image file missing"
UNREADABLE = "image unreadable"
TOO_LARGE = "image with more pixels than OpenCV decodes"
UNOPENED = "image file cannot be opened"
OTHER_SIZE = "image size differs from the annotation"
TURNED = "image that its EXIF data turns"
OUTSIDE = "box outside the image"
DEGENERATE = "box without area"
NOT_FINITE = "box with a number that is not finite"
UNKNOWN_CLASS = "box of an unknown class"
SAME_BOX = "box that is there twice"
SAME_IMAGE = "image that is named twice"
NOT_READ = "file that may be an image, of a kind that is not read"


class RawBox(NamedTuple):
    """A box as an annotation file gives it, not yet checked."""

    corners: tuple[float, float, float, float]
    """xyxy, in pixels or, if the image says so, in fractions of its sides."""
    position: int
    """Position of its class in the categories."""
    record: int | str
    """Number of the annotation, line or object, for messages."""
    crowd: bool = False
    area: float | None = None
    """Pixels^2 as annotated; None takes the box's own."""
    outline: tuple[float, ...] = ()
    """Of which it is the bounding box, if it is: other outlines may have the same."""


@dataclass(slots=True)
class RawImage:
    """An image as an annotation file gives it, not yet checked."""

    image_id: int
    path: Path
    where: str
    """What a box's record number is appended to in messages: `train.json, annotation`."""
    boxes: list[RawBox] = field(default_factory=list)
    size: tuple[float, float] | None = None
    """Width and height as annotated, if they are."""
    fractions: bool = False
    """The corners are fractions of the sides (YOLO)."""


class Problems:
    """Counts what is wrong in a split, by kind, and keeps the first example of each."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, str]] = {}
        self.num_bad_images = 0
        self.first_bad = ""

    def add(self, kind: str, example: str, action: str) -> None:
        """Count one; `example` is kept if it is the first of its kind."""
        count, first = self._found.get((kind, action), (0, example))
        self._found[kind, action] = (count + 1, first)

    def add_bad_image(self, kind: str, example: str) -> None:
        """Count one image that cannot be used; these are held against `max_bad_fraction`."""
        self.add(kind, example, "image skipped")
        self.num_bad_images += 1
        self.first_bad = self.first_bad or f"{kind}: {example}"

    def freeze(self) -> tuple[Problem, ...]:
        """All kinds, in the order in which they were first seen."""
        return tuple(Problem(kind, count, example, action) for (kind, action), (count, example) in self._found.items())


class Folders:
    """Which files are there: one listing for each folder, because network file systems answer single questions slowly.

    Args:
        doubt: that of the index that is being read; for everything else that is read for it, too.
    """

    def __init__(self, doubt: Doubt) -> None:
        self.doubt = doubt
        self._names: dict[Path, frozenset[str]] = {}
        self._resolved: dict[Path, Path] = {}
        self._plain: dict[Path, dict[str, str]] = {}

    def names(self, folder: Path) -> frozenset[str]:
        """Names in a folder; none if there is no such folder.

        Raises:
            DataError: the folder is there but may not be read.
        """
        if folder not in self._names:
            try:
                self._names[folder] = patiently(lambda: frozenset(path.name for path in folder.iterdir()), folder, self.doubt)
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
            except OSError as error:
                raise refused_by(error, DataError(f"{folder}: cannot list the folder ({error.strerror}); check its permissions.")) from None
        return self._names[folder]

    def matching(self, folder: Path, *patterns: str) -> list[Path]:
        """Files whose names match one of some patterns, sorted; no hidden ones. (`Path.glob` finds nothing where it may not read.)

        Raises:
            DataError: as `names`.
        """
        return sorted(
            folder / name
            for name in self.names(folder)
            if not is_hidden(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        )

    def holds(self, path: Path) -> bool:
        """Whether the file is in its folder's listing."""
        return path.name in self.names(path.parent)

    def spelled(self, path: Path) -> Path:
        """A path as its folder spells the name: macOS takes letters with accents apart, so that a text file and a folder may hold the same
        name in two forms. The path itself if there is no such file."""
        if self.holds(path):
            return path
        if path.parent not in self._plain:
            self._plain[path.parent] = {unicodedata.normalize("NFC", name): name for name in self.names(path.parent)}
        return path.with_name(self._plain[path.parent].get(unicodedata.normalize("NFC", path.name), path.name))

    def path_inside(self, root: Path, file_name: str, record: str) -> Path:
        """`root / file_name`, where the name comes from a file that someone else may have written, on another system: a backslash in it
        parts folders unless there is a file of that name.

        Folders are resolved, so that a linked folder cannot lead outside; a file that is itself a link is followed,
        because link farms (git-annex, DVC) are a usual way of keeping images.

        Raises:
            DataError: the name leads out of `root`.
        """
        parts = file_name.replace("\\", "/").split("/")
        plain = ".." not in parts and "\0" not in file_name and not parts[0].endswith(":") and parts[0] != ""
        path = root / file_name if plain else root
        if plain and "\\" in file_name and not self.holds(path):
            path = root.joinpath(*parts)
        path = self.spelled(path) if plain and path.name else path
        if not plain or not self._resolve(path.parent).is_relative_to(self._resolve(root)):
            raise DataError(f"{record}: the file name {file_name!r} leads out of {root}; write names relative to that folder.")
        return path

    def real(self, path: Path) -> Path:
        """The same file by the one name of its folder. Files that are links are not followed: stores that know files by their content (DVC)
        link equal ones to one, and their annotations may differ."""
        try:
            return self._resolve(path.parent) / path.name
        except DataError:
            return path

    def _resolve(self, folder: Path) -> Path:
        if folder not in self._resolved:
            try:
                self._resolved[folder] = folder.resolve()
            except (OSError, ValueError, RuntimeError):  # link loops, names that the file system cannot hold
                raise DataError(f"{str(folder)!r}: not a folder that can be opened; correct the file names in it.") from None
        return self._resolved[folder]


def is_hidden(name: str) -> bool:
    """Whether a name is none of a person's: what systems and tools leave behind (`._1.jpg`, `.ipynb_checkpoints`, `__MACOSX`)."""
    return name.startswith(".") or name == "__MACOSX"


def images_under(folder: Path, doubt: Doubt, problems: Problems) -> list[Path]:
    """All image files in a folder and below, linked folders too, sorted by path. Hidden ones are passed over; what may be an image and is
    of a kind that is not read is counted.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    def walk() -> list[Path]:
        found: list[Path] = []
        above: dict[str, frozenset[tuple[int, int]]] = {}
        for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            status = Path(parent).stat()
            here, around = (status.st_dev, status.st_ino), above.pop(parent, frozenset())
            if here in around:  # a link to a folder that it lies in
                folders.clear()
                continue
            folders[:] = [name for name in folders if not is_hidden(name)]
            above.update((os.path.join(parent, name), around | {here}) for name in folders)  # noqa: PTH118  # as os.walk names them
            found += [Path(parent, name) for name in names if not is_hidden(name)]
        return sorted(found)

    try:
        found = patiently(walk, folder, doubt)
    except OSError as error:
        refusal = DataError(f"{error.filename}: cannot list the folder ({error.strerror}); check the path and its permissions.")
        raise refused_by(error, refusal) from None
    for path in found:
        if path.suffix.lower() in OTHER_SUFFIXES:
            problems.add(NOT_READ, str(path), "left out; convert them to jpg or png")
    return [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]


def expand(path: Path) -> Path:
    """Replace a leading `~`.

    Raises:
        DataError: that user has no home folder (containers often run as a user without one).
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise DataError(f"{path}: there is no home folder for `~`; write the path in full.") from None


def is_text(value: object) -> bool:
    """Whether it is a string, not empty, that can be printed and be a file's name (JSON and YAML can spell half characters)."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_annotations(path: Path, what: str, doubt: Doubt) -> bytes:
    """All of a file that says what is in images. Without it the data set is another one (images without boxes, or without a class, which
    renumbers those behind it), so that it cannot be left out as an image can.

    Raises:
        DataError: it cannot be read; `what` says in the message what it is.
    """
    try:
        return read_file(path, doubt)
    except OSError as error:
        raise refused_by(error, DataError(f"{path}: cannot read the {what} ({error.strerror}); correct data.path or the file.")) from None


def read_text(path: Path, what: str, doubt: Doubt) -> str:
    """A small text file (UTF-8, with or without a byte order mark).

    Raises:
        DataError: as `read_annotations`, or it is no such text.
    """
    try:
        return read_annotations(path, what, doubt).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: the {what} is not UTF-8 text; save it as UTF-8.") from None


def build_index(
    source: str,
    categories: Sequence[Category],
    images: Sequence[RawImage],
    problems: Problems,
    max_bad_fraction: float,
    folders: Folders,
) -> Index:
    """Check every image and box and build the index, in the order of `images`.

    Raises:
        DataError: there are no images, or more than `max_bad_fraction` of them are missing or unreadable (those that
            the reader has already counted in `problems` included).
    """
    total = len(images) + problems.num_bad_images
    if total == 0:
        raise DataError(f"{source}: the split has no images; check data.path and the split's annotations and images.")
    images = _each_once(images, folders, problems)
    present = [image for image in images if folders.holds(image.path)]
    for image in images:
        if not folders.holds(image.path):
            problems.add_bad_image(MISSING, str(image.path))
    # Opening a header is waiting for the disk or the network, hence more threads than cores.
    with ThreadPoolExecutor(max_workers=min(32, 4 * available_cores())) as pool:
        sizes = list(pool.map(lambda image: image_size(image.path, folders.doubt), present))
    for image, size in zip(present, sizes, strict=True):
        if isinstance(size, str):
            problems.add_bad_image(size, str(image.path))
    _refuse_bad_images(source, total, problems, max_bad_fraction)
    records = [_checked(image, size, problems) for image, size in zip(present, sizes, strict=True) if not isinstance(size, str)]
    return Index(source, tuple(categories), tuple(records), problems.freeze())


class Header(NamedTuple):
    """What the beginning of an image file says."""

    width: int
    height: int
    """As stored."""
    orientation: int = 1
    """1 to 8: how the stored pixels are to be turned before a person looks at them."""


def image_size(path: Path, doubt: Doubt) -> Header | str:
    """What a file's header says, or what is wrong with it: `UNREADABLE`, `TOO_LARGE`, or `UNOPENED` where the reason is beside the file.

    Raises:
        CannotRead: the disk or the network fails.
    """

    def look() -> Header:
        with reading.open_file(path) as file:
            try:
                with Image.open(file, formats=_FORMATS) as image:
                    return Header(*image.size, _orientation(image))
            except OSError as error:
                if error.errno is not None:
                    raise
                return Header(0, 0)  # Pillow's own, of what is in the file
            except (ValueError, SyntaxError, EOFError, OverflowError, struct.error, Image.DecompressionBombError):
                return Header(0, 0)

    try:
        header = patiently(look, path, doubt)
    except (OSError, ValueError):
        return UNOPENED
    width, height, _ = header
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        return TOO_LARGE
    return header if width > 0 and height > 0 else UNREADABLE


def _orientation(image: Image.Image) -> int:
    data = image.info.get("exif")  # what stands before the pixels; Pillow's getexif() decodes a whole PNG for what may stand behind them
    if not isinstance(data, bytes) or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, LookupError, TypeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_seen(image: RawImage, header: Header, problems: Problems) -> Header:
    """What the annotator saw: the annotated size tells, if it can; else the image upright, as every viewer shows it."""
    width, height, orientation = header
    if orientation == 1:
        return header
    changes, told = orientation >= SIDES_CHANGE, image.size
    if changes and told is not None and told[0] != told[1] and width != height and (told[0] > told[1]) == (width > height):
        problems.add(TURNED, str(image.path), "not turned, as its annotated size wants it")
        return Header(width, height)
    problems.add(TURNED, str(image.path), "turned upright, which its boxes refer to")
    return Header(height, width, orientation) if changes else header


def _each_once(images: Sequence[RawImage], folders: Folders, problems: Problems) -> list[RawImage]:
    """One image for each file, with the boxes of all its names."""
    found: dict[Path, RawImage] = {}
    for image in images:
        first = found.setdefault(folders.real(image.path), image)
        if first is not image:
            problems.add(
                SAME_IMAGE, f"{image.path} (image {image.image_id}, and image {first.image_id})", "counted once, with the boxes of both"
            )
            first.boxes += image.boxes
    return list(found.values())


def _refuse_bad_images(source: str, total: int, problems: Problems, max_bad_fraction: float) -> None:
    bad = problems.num_bad_images
    if bad > max_bad_fraction * total or bad == total:
        raise DataError(
            f"{source}: {bad} of {total} images are missing or unreadable, more than data.max_bad_fraction = {max_bad_fraction:g} allows "
            f"({problems.first_bad}); restore the files or correct data.path."
        )


def _checked(image: RawImage, header: Header, problems: Problems) -> ImageRecord:
    width, height, orientation = _as_seen(image, header, problems)
    if image.size is not None and image.size != (width, height):
        problems.add(OTHER_SIZE, f"{image.path}: {image.size[0]:g} x {image.size[1]:g}, really {width} x {height}", "real size used")
    scale = (width, height, width, height) if image.fractions else (1, 1, 1, 1)
    kept: list[tuple[RawBox, list[float]]] = []
    seen: set[RawBox] = set()
    for box in image.boxes:
        same = box._replace(record="")
        if same in seen:
            problems.add(SAME_BOX, f"{image.where} {box.record}", "counted once")
            continue
        seen.add(same)
        corners = [value * factor for value, factor in zip(box.corners, scale, strict=True)]
        clipped = _clip(corners, width, height, f"{image.where} {box.record}", problems)
        if clipped is not None:
            kept.append((box, clipped))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) if box.area is None else box.area for box, c in kept]
    return make_record(
        image.image_id,
        image.path,
        width,
        height,
        [corners for _, corners in kept],
        [box.position for box, _ in kept],
        [box.crowd for box, _ in kept],
        areas,
        orientation,
    )


def _clip(corners: list[float], width: int, height: int, record: str, problems: Problems) -> list[float] | None:
    if not all(map(math.isfinite, corners)):
        problems.add(NOT_FINITE, record, "skipped")
        return None
    limits = (width, height, width, height)
    clipped = [float(np.float32(min(max(value, 0.0), limit))) for value, limit in zip(corners, limits, strict=True)]
    if clipped[2] - clipped[0] <= MIN_SIDE or clipped[3] - clipped[1] <= MIN_SIDE:
        problems.add(DEGENERATE, record, "skipped")
        return None
    if max(abs(a - b) for a, b in zip(corners, clipped, strict=True)) > CLIP_TOLERANCE:
        problems.add(OUTSIDE, record, "clipped")
    return clipped
