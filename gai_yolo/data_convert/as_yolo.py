"""Writes YOLO txt: `data.yaml`, `images/{split}` and `labels/{split}`, an empty file for an image without boxes.

Fractions have so many digits that a corner comes back within 1e-7 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gai_yolo.data.formats.check import AS_STORED, TURNED, Problems
from gai_yolo.data.formats.reading import Doubt
from gai_yolo.data.formats.yolo_txt import label_path
from gai_yolo.data.header import SIDES_CHANGE, Header, image_size
from gai_yolo.data.index import ImageRecord
from gai_yolo.data_convert.part import WRITTEN_BY, Corners, Part, tell_of_class_ids

BOXES_TURNED = "image whose boxes refer to the pixels as stored"
MORE_DIGITS = 7
"""Of a fraction, beyond those of the longer side."""


def write_yolo(root: Path, parts: Sequence[Part]) -> None:
    """data.yaml and labels; images are not written. Raises `OSError`."""
    for part in parts:
        _write_labels(root / "images" / part.split, part)
    names = dict(enumerate(category.name for category in parts[0].index.categories))
    content: dict[str, object] = {**{part.split: f"images/{part.split}" for part in parts}, "nc": len(names), "names": names}
    is_plain = all("\x85" not in name for name in names.values())  # which PyYAML writes as it is, and reads as a blank
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=is_plain, width=1 << 16)
    (root / "data.yaml").write_text(f"# {WRITTEN_BY}\n{text}", encoding="utf-8")


def check_yolo(parts: Sequence[Part], problems: Problems) -> None:
    """Tell what it cannot hold of all splits."""
    tell_of_class_ids([*parts], problems)
    for part in parts:
        part.tell_of_image_ids()


def _write_labels(images: Path, part: Part) -> None:
    paths = [label_path(images / name) for name in part.names]
    for parent in sorted({path.parent for path in paths}):
        parent.mkdir(parents=True, exist_ok=True)
    may_be_stored = any(problem.kind == TURNED and problem.action == AS_STORED for problem in part.index.problems)
    doubt = Doubt()
    for path, image, name in zip(paths, part.index.images, part.names, strict=True):
        header = _stored(image, doubt) if may_be_stored else None
        if header is not None:
            part.problems.add(
                BOXES_TURNED, name, "turned upright with the image, which is how it is read without an annotated size", image.path
            )
        width, height = (image.width, image.height) if header is None else (image.height, image.width)
        digits = MORE_DIGITS + len(str(max(width, height)))

        def line(
            position: int,
            corners: Corners,
            _crowd: bool,
            _area: float,
            header: Header | None = header,
            sides: Sequence[int] = (width, height),
        ) -> str:
            x1, y1, x2, y2 = corners if header is None else upright(corners, header)
            values = ((x1 + x2) / 2 / sides[0], (y1 + y2) / 2 / sides[1], (x2 - x1) / sides[0], (y2 - y1) / sides[1])
            return f"{position} {' '.join(_fraction(value, digits) for value in values)}\n"  # noqa: B023  # used at once

        path.write_text("".join(part.lines(image, name, line)), encoding="ascii")


def _stored(image: ImageRecord, doubt: Doubt) -> Header | None:
    """The header of an image that EXIF turns on its side, and the index does not."""
    header = image_size(image.path, doubt) if image.orientation == 1 else None
    return header if isinstance(header, Header) and header.orientation >= SIDES_CHANGE else None


def upright(corners: Corners, header: Header) -> Corners:
    """A box of the stored pixels in the image as EXIF turns it (orientations 5 to 8: CIPA DC-008, 4.6.5)."""
    (x1, y1, x2, y2), (width, height, orientation) = corners, header
    left, right = (height - y2, height - y1) if orientation in (6, 7) else (y1, y2)
    top, bottom = (width - x2, width - x1) if orientation in (7, 8) else (x1, x2)
    return left, top, right, bottom


def _fraction(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")
