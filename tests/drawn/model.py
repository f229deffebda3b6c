"""Data sets that hypothesis draws: what is in them, before any format writes it down."""

from __future__ import annotations

import io
import math
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

NFC, NFD = (unicodedata.normalize(form, "Stück") for form in ("NFC", "NFD"))
NAN, INFINITE = float("nan"), float("inf")
SIZES = ((40, 30), (30, 40), (32, 32), (64, 48), (5, 3))
FOLDERS = ("", "", "cam 1", "a/b", NFC, "day/" + NFD)
STEMS = ("1", "2", "10", "a 1", "x.y", "1.jpg", NFD, "ПРИВЕТ", "[x]#%", "it's & <co>", "train", "-")
SUFFIXES = (".jpg", ".JPG", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".ppm")
EXIF = frozenset({".jpg", ".JPG", ".jpeg", ".jfif", ".png", ".webp"})
KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".ppm": "PPM"}
NAMES = ("cat", "dog", "yes", "010", "12:30", NFC, "a b", "[x]", "~", "null", "&<>", "1e3", "it's", '"', "-", "?")


@dataclass(frozen=True)
class Box:
    """xyxy in pixels of the image as seen; `name` is None for a class that the data set does not have."""

    corners: tuple[float, float, float, float]
    name: str | None
    crowd: bool
    area: str
    """COCO: none, own, mask, zero, text, nan, huge."""
    form: str
    """YOLO: box, decimals, outline, confidence, track."""
    copies: int


@dataclass(frozen=True)
class Picture:
    """An image file and what is said of it. Its size is that of the stored pixels."""

    folder: str
    stem: str
    suffix: str
    size: tuple[int, int]
    orientation: int
    state: str
    """good, link, missing, empty, noise, dangling."""
    told: str
    """Size that the annotation gives: none, seen, stored, other."""
    boxes: tuple[Box, ...]
    junk: tuple[int, ...]
    """Records that say nothing, by number."""
    named: str
    """Where a list or json names images: once, twice, never."""
    notes: str
    """Its own annotation file: usual, none, broken."""

    @property
    def name(self) -> str:
        return self.stem + self.suffix

    @property
    def inside(self) -> str:
        """Path in the image folder."""
        return f"{self.folder}/{self.name}".lstrip("/")

    @property
    def there(self) -> bool:
        return self.state != "missing"

    @property
    def seen(self) -> tuple[int, int]:
        return self.size if self.orientation < 5 else self.size[::-1]

    @property
    def told_size(self) -> tuple[int, int] | None:
        sizes = {"seen": self.seen, "stored": self.size, "other": (2 * self.seen[0] + 1, 2 * self.seen[1] + 1)}
        return sizes.get(self.told)

    def write(self, folder: Path, store: Path) -> None:
        path = folder / self.inside
        content = {"empty": b"", "noise": b"\x89PNG\r\n\x1a\n" + b"x" * 40}.get(self.state)
        data = encoded(self.size, self.suffix.lower(), self.orientation) if content is None else content
        if self.there:
            path.parent.mkdir(parents=True, exist_ok=True)
        if self.state == "link":
            store.mkdir(exist_ok=True)
            target = store / str(len(list(store.iterdir())))
            target.write_bytes(data)
            path.symlink_to(target)
        elif self.state == "dangling":
            path.symlink_to(store / "nowhere")
        elif self.there:
            path.write_bytes(data)


@dataclass(frozen=True)
class DataSet:
    """Pictures of one split, and how a writer is to spell what it writes."""

    split: str
    names: tuple[str, ...]
    """Of the classes."""
    pictures: tuple[Picture, ...]
    layout: int
    ids: tuple[int, ...]
    """One for each class, and then two for each picture: COCO's are any numbers."""
    max_bad_fraction: float
    other_form: bool
    """Annotations spell names in the other form of Unicode than the file system."""
    crlf: bool
    mark: bool
    """A byte order mark."""
    capitals: bool
    """`.TXT`, `.XML`."""
    strays: bool
    """Files that are none of it."""
    published: bool
    """VOC's own way of counting pixels."""
    encoding: str
    """Of xml."""
    flat: bool
    """All xml in one folder, where no two have one name."""
    file_names: str
    """In xml: right, none, stem, windows, stale."""
    keypoints: bool
    """YOLO: the description says that rows have two of three values."""
    spoiled: int | None
    """Number of a damage for which the whole is refused."""

    def spelled(self, text: str) -> str:
        """As an annotation spells a name."""
        if not self.other_form:
            return text
        composed = unicodedata.normalize("NFC", text)
        return unicodedata.normalize("NFD", text) if text == composed else composed

    def bytes(self, text: str) -> bytes:
        """A text file."""
        return (b"\xef\xbb\xbf" if self.mark else b"") + (text.replace("\n", "\r\n") if self.crlf else text).encode()


@cache
def encoded(size: tuple[int, int], suffix: str, orientation: int) -> bytes:
    """An image file."""
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    extra = {"exif": exif} if orientation != 1 else {}
    Image.new("RGB", size, (90, 120, 150)).save(stream, KINDS[suffix], **extra)
    return stream.getvalue()


def plain(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@st.composite
def edges(draw: st.DrawFn, side: int) -> tuple[float, float]:
    """Two edges: whole pixels or between them, in the image or not; never as near to a limit of the reader's as its rounding."""
    kind = draw(st.sampled_from(("in", "in", "in", "in", "in", "any", "any", "tiny", "none")))
    shift = draw(st.sampled_from((0.0, 0.0625, 0.3125)))
    if kind == "in":
        start = draw(st.integers(0, side - 2))
        return start + shift, start + shift + draw(st.integers(1, side - 1 - start))
    if kind == "any":
        return draw(st.integers(-9, side + 9)) + shift, draw(st.integers(-9, side + 9)) + 0.0625
    first = draw(st.integers(0, side - 1)) + 0.25
    return first, first + (0.015625 if kind == "tiny" else 0.00025)


@st.composite
def boxes(draw: st.DrawFn, size: tuple[int, int], names: tuple[str, ...]) -> Box:
    (x1, x2), (y1, y2) = draw(edges(size[0])), draw(edges(size[1]))
    corners = [x1, y1, x2, y2]
    if odd(draw, 12):
        corners[draw(st.integers(0, 3))] = draw(st.sampled_from((NAN, INFINITE, -INFINITE)))
    return Box(
        corners=(corners[0], corners[1], corners[2], corners[3]),
        name=None if odd(draw, 12) else draw(st.sampled_from(names)),
        crowd=odd(draw, 5),
        area=draw(st.sampled_from(("none", "own", "own", "mask", "zero", "text", "nan", "huge"))),
        form=draw(st.sampled_from(("box", "box", "decimals", "outline", "confidence", "track"))),
        copies=1 + odd(draw, 8),
    )


@st.composite
def pictures(draw: st.DrawFn, names: tuple[str, ...]) -> Picture:
    size, suffix = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SUFFIXES))
    orientation = draw(st.integers(1, 8)) if suffix in EXIF and odd(draw, 3) else 1
    state = (
        draw(st.sampled_from(("missing", "empty", "noise", "dangling")))
        if odd(draw, 9)
        else draw(st.sampled_from(("good", "good", "link")))
    )
    return Picture(
        folder=draw(st.sampled_from(FOLDERS)),
        stem=draw(st.sampled_from(STEMS)),
        suffix=suffix,
        size=size,
        orientation=orientation,
        state=state,
        told=draw(st.sampled_from(("none", "seen", "seen", "stored", "other"))),
        boxes=tuple(draw(st.lists(boxes(size if orientation < 5 else size[::-1], names), min_size=not odd(draw, 4), max_size=5))),
        junk=tuple(draw(st.lists(st.integers(0, 9), max_size=2))) if odd(draw, 5) else (),
        named=draw(st.sampled_from(("twice", "never"))) if odd(draw, 6) else "once",
        notes=draw(st.sampled_from(("none", "broken"))) if odd(draw, 10) else "usual",
    )


@st.composite
def data_sets(draw: st.DrawFn) -> DataSet:
    names = tuple(draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)))
    found = draw(st.lists(pictures(names), min_size=draw(st.integers(1, 3)), max_size=5, unique_by=lambda one: plain(one.inside)))
    count = 2 * len(found) + len(names)
    return DataSet(
        split=draw(st.sampled_from(("train", "val"))),
        names=names,
        pictures=_alike(found),
        layout=draw(st.integers(0, 3)),
        ids=tuple(draw(st.lists(st.integers(-3, 2**40) | st.integers(0, 90), min_size=count, max_size=count, unique=True))),
        max_bad_fraction=draw(st.sampled_from((0.0, 0.34, 1.0, 1.0, 1.0))),
        other_form=draw(st.booleans()),
        crlf=draw(st.booleans()),
        mark=draw(st.booleans()),
        capitals=odd(draw, 4),
        strays=draw(st.booleans()),
        published=draw(st.booleans()),
        encoding=draw(st.sampled_from(("", "utf-8", "utf-16", "latin-1", "gb18030"))),
        flat=draw(st.booleans()),
        file_names=draw(st.sampled_from(("right", "none", "stem", "windows", "stale"))),
        keypoints=odd(draw, 5),
        spoiled=draw(st.integers(0, 7)) if odd(draw, 20) else None,
    )


def _alike(found: list[Picture]) -> tuple[Picture, ...]:
    """Of pictures whose names differ in the suffix only all have one size, so that what is right for one of them is for the others."""
    first: dict[str, Picture] = {}
    for one in found:
        first.setdefault(plain(f"{one.folder}/{one.stem}"), one)
    like = [first[plain(f"{one.folder}/{one.stem}")] for one in found]
    return tuple(one if one is other else replace(one, size=other.seen, orientation=1) for one, other in zip(found, like, strict=True))


def tidy(drawn: DataSet) -> DataSet:
    """What all formats can say, of the same pictures."""
    found: dict[str, Picture] = {}
    for one in drawn.pictures:
        finite = [box for box in one.boxes if box.name is not None and all(map(math.isfinite, box.corners))]
        boxes = tuple({box.corners: replace(box, crowd=False, area="none", form="box", copies=1) for box in finite}.values())
        good = replace(one, state="good", told="seen", boxes=boxes, junk=(), named="once", notes="usual")
        found.setdefault(plain(f"{one.folder}/{one.stem}"), good)
    return replace(drawn, pictures=tuple(found.values()), split="val", strays=False, keypoints=False, spoiled=None)


def odd(draw: st.DrawFn, one_of: int) -> bool:
    """Seldom true; what it shrinks to is the usual."""
    return draw(st.integers(0, one_of - 1)) == one_of - 1
