"""Data sets that hypothesis draws, in all three formats: what is read is what was drawn, or is counted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, event, given, settings

from gai_yolo.data.index import ImageRecord, Index
from gai_yolo.data.sources import load_index
from gai_yolo.errors import DataError
from gai_yolo.evaluation.coco_metrics import UNDEFINED, ImageDetections, coco_metrics
from gai_yolo.sections import DataConfig
from tests.drawn.as_coco import write_coco
from tests.drawn.as_voc import write_voc
from tests.drawn.as_yolo import write_yolo
from tests.drawn.expected import Expected
from tests.drawn.model import DataSet, data_sets, tidy

FEW, EXAMPLES = 40, int(os.environ.get("GAI_YOLO_EXAMPLES", "150"))
WRITERS: dict[str, Callable[[DataSet, Path], Expected]] = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}
drawn_so_often = partial(settings, deadline=None, suppress_health_check=list(HealthCheck))
so_often = pytest.mark.parametrize("examples", [FEW, pytest.param(EXAMPLES, marks=pytest.mark.exhaustive)])


def read(drawn: DataSet, form: str, root: Path) -> tuple[Expected, Index | str]:
    """What is expected, and the index or why there is none."""
    expected = WRITERS[form](drawn, root)
    split: Literal["train", "val"] = "train" if drawn.split == "train" else "val"
    config = DataConfig(path=root, cache_folder=root / "cache", max_bad_fraction=drawn.max_bad_fraction)
    try:
        return expected, load_index(config, split)
    except DataError as error:
        return expected, str(error)


def perfect(image: ImageRecord) -> ImageDetections:
    """What a detector finds that is always right."""
    boxes, classes = image.boxes[~image.crowd], image.classes[~image.crowd]
    return ImageDetections(image.image_id, boxes, 0 * boxes[:, 0] + 1, classes)


def said(index: Index, folder: Path) -> dict[str, list[object]]:
    """What an index says of each image, in an order that formats do not decide."""
    names = index.class_names
    return {
        str(image.path.relative_to(folder)): [
            (image.width, image.height, image.orientation),
            *sorted((names[c], [round(value, 2) for value in box]) for c, box in zip(image.classes, image.boxes.tolist(), strict=True)),
        ]
        for image in index.images
    }


@so_often
@pytest.mark.parametrize("form", WRITERS)
def test_what_is_read_is_what_was_drawn_or_is_counted(form: str, examples: int) -> None:
    """Loss: an image or a box that is left out, or is another one than in the file, and nobody is told; and mAP of a perfect detector
    that is less than 1, because the data set is not what it is measured with."""

    @drawn_so_often(max_examples=examples)
    @given(drawn=data_sets())
    def check(drawn: DataSet) -> None:
        with tempfile.TemporaryDirectory() as folder:
            expected, found = read(drawn, form, Path(folder) / "data")
            refusal = expected.refusal()
            event(f"refused: {refusal.lstrip('0123456789')[:16]}" if refusal else f"read, {len(expected.images)} images")
            if refusal is not None:
                assert isinstance(found, str) and refusal in found
                return
            assert isinstance(found, Index), found
            expected.compare(found)
        metrics = coco_metrics(found, [perfect(image) for image in found.images])
        assert metrics.stats["mAP50-95"] == (pytest.approx(1.0) if expected.has_objects else UNDEFINED)

    check()


@so_often
def test_the_same_data_set_in_three_formats_is_the_same(examples: int) -> None:
    """Loss: results that depend on the form in which the same pictures were annotated."""

    @drawn_so_often(max_examples=examples // 4)
    @given(drawn=data_sets().map(tidy))
    def check(drawn: DataSet) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = {form: read(replace(drawn, layout=1 if form == "voc" else 0), form, Path(folder) / form)[1] for form in WRITERS}
            coco, *others = (said(one, Path(folder) / form / "images" / "val") for form, one in found.items() if isinstance(one, Index))
        assert [coco, coco] == others
        assert len(coco) == len(drawn.pictures)

    check()
