"""Data sets that hypothesis draws, from each format to each and back: what comes back is what was there, but for what the summary says."""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gai_yolo.data.formats.check import Split
from gai_yolo.data.header import Header
from gai_yolo.data.index import Index
from gai_yolo.data.sources import SPLITS, check_classes, read_any
from gai_yolo.data_convert.as_voc import NAMELESS, ONE_NAME
from gai_yolo.data_convert.as_yolo import BOXES_TURNED, upright
from gai_yolo.data_convert.conversion import Target, convert
from gai_yolo.data_convert.names import HARD_NAME, SAME_NAME
from gai_yolo.data_convert.part import AREA, CLASS_ID, CROWD_LEFT_OUT, IMAGE_ID, TWIN, Form
from gai_yolo.data_convert.source import Wish
from gai_yolo.data_convert.summary import Summary
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig
from tests.drawn.model import DataSet, data_sets
from tests.unit.test_drawn_data_sets import EXAMPLES, WRITERS, drawn_so_often

FORMS: tuple[Form, ...] = ("coco", "yolo", "voc")
FEW_CONVERSIONS = 60
PRECISION = 1e-5
"""Pixels; of what YOLO's fractions become."""


@dataclass
class Seen:
    """An image, as an index has it."""

    name: str
    image_id: int
    frame: tuple[int, int, int]
    boxes: list[tuple[str, bool, tuple[float, ...], float]]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is thrown away at once."""
    monkeypatch.setattr(os, "sync", lambda: None)


def make_files_differ(root: Path) -> None:
    """So that an image is known by its bytes, whatever it is called."""
    for number, path in enumerate(sorted(root.rglob("*"))):
        if path.is_file() and not path.is_symlink() and path.suffix.lower() not in (".json", ".txt", ".xml", ".yaml", ".yml", ".md"):
            path.write_bytes(path.read_bytes() + f"number {number}".encode() * (path.stat().st_size > 0))


def read(root: Path, form: str) -> dict[Split, Index]:
    config = DataConfig(path=root, format=form, max_bad_fraction=1.0)  # type: ignore[arg-type]
    return {split: read_any(config, split) for split in SPLITS}


def seen(index: Index) -> dict[bytes, Seen]:
    """The images of an index by their content."""
    found: dict[bytes, Seen] = {}
    for image in index.images:
        rows = zip(image.classes.tolist(), image.crowd.tolist(), image.boxes.tolist(), image.areas.tolist(), strict=True)
        boxes = [(index.class_names[position], crowd, tuple(corners), area) for position, crowd, corners, area in rows]
        one = Seen(image.path.name, image.image_id, (image.width, image.height, image.orientation), boxes)
        content = image.path.read_bytes()
        assert content not in found
        found[content] = one
    return found


def pairs(before: Seen, after: Seen, header: Header | None) -> Iterator[tuple[float, float]]:
    """Areas before and after of each box that is left; asserts that it was there."""
    left = list(before.boxes)
    for name, crowd, corners, area in after.boxes:
        for one in left:
            was = one[2] if header is None else upright(one[2], header)  # type: ignore[arg-type]
            if one[:2] == (name, crowd) and np.allclose(was, corners, rtol=0, atol=PRECISION):
                left.remove(one)
                yield one[3], area
                break
        else:
            pytest.fail(f"{after.name}: {name} {corners} is not among {left}")


def counted(summary: Summary) -> Counter[str]:
    found = Counter[str]()
    for change in summary.changed:
        assert change.count > 0 and change.example and change.action
        found[change.kind] += change.count
    return found


def check_hop(before: dict[Split, Index], after: dict[Split, Index], summary: Summary) -> None:
    """What differs is what the summary says, number by number."""
    differs = Counter[str]()
    for split in SPLITS:
        old, new = seen(before[split]), seen(after[split])
        assert old.keys() == new.keys()
        num_old, num_crowds = sum(len(one.boxes) for one in old.values()), sum(box[1] for one in old.values() for box in one.boxes)
        num_new, num_left = sum(len(one.boxes) for one in new.values()), sum(box[1] for one in new.values() for box in one.boxes)
        written = summary.splits[split]
        assert (written.images, written.boxes, written.crowds) == (len(new), num_new - num_left, num_left)
        assert written.background_images == sum(not one.boxes for one in new.values())
        differs[CROWD_LEFT_OUT] += num_crowds - num_left
        differs[TWIN] += num_old - num_new - (num_crowds - num_left)
        for content, one in old.items():
            other = new[content]
            header = None
            if one.frame != other.frame:
                assert (one.frame[2], other.frame[:2]) == (1, one.frame[1::-1]) and other.frame[2] >= 5
                header = Header(*one.frame[:2], other.frame[2])
                differs[BOXES_TURNED] += 1
            areas = list(pairs(one, other, header))
            differs[AREA] += sum(abs(a - b) > 1.1e-3 * a for a, b in areas)
            differs[IMAGE_ID] += one.image_id != other.image_id
            differs["names"] += one.name != other.name
        if summary.format == "coco":
            assert [sorted(one.boxes) for one in old.values()] == [sorted(new[content].boxes) for content in old] or differs[TWIN]
    ids, new_ids = ({one.name: one.id for one in index["train"].categories} for index in (before, after))
    differs[NAMELESS] = len(ids.keys() - new_ids.keys())
    differs[CLASS_ID] = sum(ids[name] != number for name, number in new_ids.items())
    if summary.format != "voc":
        assert after["train"].class_names == before["train"].class_names
    assert [one.name for one in summary.classes] == after["train"].class_names
    assert {
        split: index.problems for split, index in after.items() if any(p.kind != "image that its EXIF data turns" for p in index.problems)
    } == {}
    told = counted(summary)
    told["names"] = told.pop(HARD_NAME, 0) + told.pop(SAME_NAME, 0)
    ours = {kind: told[kind] for kind in (CROWD_LEFT_OUT, TWIN, AREA, BOXES_TURNED, IMAGE_ID, CLASS_ID, NAMELESS, ONE_NAME, "names")}
    assert +Counter(ours) == +differs


def converted(root: Path, source_form: str, output: Path, form: Form) -> Summary:
    wish = Wish(root, source_form, max_bad_fraction=1.0)  # type: ignore[arg-type]
    return convert(wish, Target(output, form), None)


@pytest.mark.parametrize("examples", [FEW_CONVERSIONS, pytest.param(EXAMPLES, marks=pytest.mark.exhaustive)])
def test_there_and_back_only_what_is_told_is_lost(examples: int) -> None:
    """Loss: boxes, classes or images that vanish between two formats, or move, and nobody is told."""

    @drawn_so_often(max_examples=examples)
    @given(drawn=data_sets(), form=st.sampled_from(FORMS), to=st.sampled_from(FORMS))
    def check(drawn: DataSet, form: Form, to: Form) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root, there, back = (Path(folder) / name for name in ("data", "there", "back"))
            WRITERS[form](drawn, root)
            make_files_differ(root)
            try:
                first = read(root, form)
                check_classes(first["train"], first["val"])
            except DataError:
                event("refused to read")
                with pytest.raises(DataError):
                    converted(root, form, there, to)
                assert not there.exists()
                return
            if to == "voc" and not sum(len(index.images.boxes) - index.images.crowd.sum() for index in first.values()):
                with pytest.raises(DataError, match="there is no box"):
                    converted(root, form, there, to)
                return
            summary = converted(root, form, there, to)
            second = read(there, to)
            check_hop(first, second, summary)
            event(f"{form} to {to}")
            if form == "voc" and to != "voc" and not any(len(index.images.boxes) - index.images.crowd.sum() for index in second.values()):
                return
            check_hop(second, read_back(there, to, back, form), converted_summary)
            assert {one.kind for one in converted_summary.changed} <= {
                CLASS_ID,
                IMAGE_ID,
                NAMELESS,
                CROWD_LEFT_OUT,
                AREA,
                TWIN,
                BOXES_TURNED,
                SAME_NAME,  # from COCO, which had both
                "box with an edge between pixels",
            }

    converted_summary: Summary

    def read_back(there: Path, to: Form, back: Path, form: Form) -> dict[Split, Index]:
        nonlocal converted_summary
        converted_summary = converted(there, to, back, form)
        return read(back, form)

    check()


@pytest.mark.parametrize("orientation", range(5, 9))
def test_a_box_turns_with_its_image(orientation: int) -> None:
    """Loss: boxes beside their objects, because an image is read upright and its boxes lie as they were."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[4:9, 11:25] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    stream.seek(0)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(stream)))
    x1, y1, x2, y2 = map(int, upright((11.0, 4.0, 25.0, 9.0), Header(40, 30, orientation)))
    expected = np.zeros_like(turned)
    expected[y1:y2, x1:x2] = 255
    assert turned.shape == (40, 30, 3) and (turned == expected).all()
