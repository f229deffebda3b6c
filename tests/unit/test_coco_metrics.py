"""COCO metrics: the numbers people compare models by."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gai_yolo.data.index import Category, ImageRecord, Index, Records, empty_record, make_record
from gai_yolo.data.sources import load_indexes
from gai_yolo.evaluation.coco_metrics import STAT_NAMES, ImageDetections, coco_metrics
from gai_yolo.sections import DataConfig

CATEGORIES = (Category(7, "cat"), Category(3, "dog"), Category(90, "[unicorn]"))  # sparse ids, not in order; no unicorn anywhere


def make_index(*images: ImageRecord) -> Index:
    return Index("test", CATEGORIES, Records.of(images))


def found(image_id: int, boxes: list[list[float]], scores: list[float], classes: list[int]) -> ImageDetections:
    return ImageDetections(
        image_id,
        np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        np.asarray(scores, dtype=np.float32),
        np.asarray(classes, dtype=np.int64),
    )


def random_case(seed: int, images: int = 12) -> tuple[Index, list[ImageDetections]]:
    """Jittered, missed, doubled and invented boxes with tied scores, crowds, and images without boxes."""
    random = np.random.default_rng(seed)
    records, detections = [], []
    for number in range(images):
        count = int(random.integers(0, 8)) if number else 0
        corners = random.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corners, corners + random.uniform(8, 160, (count, 2))], axis=1)
        classes, crowd = random.integers(0, 2, count), random.random(count) < 0.15
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * random.uniform(0.5, 1.0, count)
        path = Path(f"{number}.jpg")
        records.append(
            make_record(100 - number, path, 480, 480, boxes.tolist(), classes.tolist(), crowd.tolist(), areas.tolist())
            if count
            else empty_record(100 - number, path, 480, 480)
        )
        guesses = np.repeat(boxes, 2, axis=0) + random.normal(0, 6, (2 * count, 4))
        extra = int(random.integers(0, 3))
        corners = random.uniform(0, 300, (extra, 2))
        guesses = np.concatenate([guesses, np.concatenate([corners, corners + 40], axis=1)])
        labels = np.concatenate([np.repeat(classes, 2), random.integers(0, 3, extra)])
        scores = np.round(random.random(len(guesses)), 1)
        detections.append(found(100 - number, guesses.tolist(), scores.tolist(), labels.tolist()))
    return make_index(*records), detections


def reference(index: Index, detections: list[ImageDetections], folder: Path, capsys: Any) -> tuple[list[float], dict[str, list[float]]]:
    """pycocotools as its manual says: files on disk, loadRes, and one evaluation more for each class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box: Any) -> list[float]:
        left, top, right, bottom = (float(value) for value in box)
        return [left, top, right - left, bottom - top]

    annotations = [
        {"image_id": r.image_id, "category_id": CATEGORIES[c].id, "bbox": xywh(b), "area": float(a), "iscrowd": int(crowd)}
        for r in index.images
        for b, c, crowd, a in zip(r.boxes, r.classes.tolist(), r.crowd, r.areas, strict=True)
    ]
    truth = {
        "images": [{"id": r.image_id, "width": r.width, "height": r.height} for r in index.images],
        "annotations": [{"id": number + 1, **item} for number, item in enumerate(annotations)],
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
    }
    results = [
        {"image_id": d.image_id, "category_id": CATEGORIES[c].id, "bbox": xywh(b), "score": float(s)}
        for d in detections
        for b, s, c in zip(d.boxes, d.scores, d.classes.tolist(), strict=True)
    ]
    (folder / "truth.json").write_text(json.dumps(truth))
    coco = COCO(str(folder / "truth.json"))
    loaded = coco.loadRes(copy.deepcopy(results))

    def run(category_ids: list[int]) -> list[float]:
        evaluation = COCOeval(coco, loaded, "bbox")
        evaluation.params.catIds = category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return list(map(float, evaluation.stats))

    everything, single = run([c.id for c in CATEGORIES]), {c.name: run([c.id])[:2] for c in CATEGORIES}
    capsys.readouterr()
    return everything, single


def test_perfect_detections_score_one() -> None:
    """Loss: a box or class mix-up in the bridge (xyxy/xywh, position/id) that lowers every model alike and shows nowhere."""
    index, _ = random_case(0)
    perfect = [
        ImageDetections(r.image_id, r.boxes[~r.crowd], np.full(int((~r.crowd).sum()), 0.9, np.float32), r.classes[~r.crowd])
        for r in index.images
    ]
    metrics = coco_metrics(index, perfect)
    assert metrics.stats["mAP50-95"] == pytest.approx(1.0)
    assert metrics.stats["mAP75"] == pytest.approx(1.0)
    assert metrics.per_class["cat"] == pytest.approx((1.0, 1.0))
    assert metrics.per_class["dog"] == pytest.approx((1.0, 1.0))


def test_hand_computed_case() -> None:
    """Loss: plausible numbers that are wrong.

    Two cats. Scores fall: a hit with IoU 0.8, a miss, a hit with IoU 1. At IoU <= 0.8 the precision is 1 up to recall 1/2 (51 of
    101 recall points) and 2/3 after it; above 0.8 only the last detection hits: precision 1/3 up to recall 1/2.
    """
    index = make_index(make_record(1, Path("a.jpg"), 200, 200, [[0, 0, 50, 50], [100, 100, 150, 150]], [0, 0]))
    boxes: list[list[float]] = [[0, 0, 50, 40], [60, 0, 90, 30], [100, 100, 150, 150]]
    metrics = coco_metrics(index, [found(1, boxes, [0.9, 0.8, 0.7], [0, 0, 0])])
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    # Thresholds 0.50 to 0.80 are seven of ten; 2000/2500 reaches 0.8 exactly.
    assert metrics.stats["mAP50"] == pytest.approx(low)
    assert metrics.stats["mAP75"] == pytest.approx(low)
    assert metrics.stats["mAP50-95"] == pytest.approx((7 * low + 3 * high) / 10)
    assert metrics.stats["AR_1"] == pytest.approx((7 * 0.5 + 0) / 10)
    assert metrics.stats["AR_100"] == pytest.approx((7 * 1.0 + 3 * 0.5) / 10)
    assert metrics.stats["mAP_small"] == -1.0
    assert metrics.per_class["dog"] == (-1.0, -1.0)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_pycocotools_run_by_hand(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a published number that nobody else can reproduce with the usual tool."""
    index, detections = random_case(seed)
    stats, per_class = reference(index, sorted(detections, key=lambda d: d.image_id), tmp_path, capsys)
    metrics = coco_metrics(index, detections)
    assert tuple(metrics.stats) == STAT_NAMES
    assert list(metrics.stats.values()) == stats
    assert 0.1 < metrics.stats["mAP50-95"] < 0.9, "the case must be neither trivial nor empty"
    assert list(metrics.per_class) == index.class_names
    for name, values in per_class.items():
        assert metrics.per_class[name] == pytest.approx(values, abs=1e-12)
    assert capsys.readouterr().out == "", "pycocotools' chatter must not reach the terminal"


def test_detection_on_a_crowd_is_neither_right_nor_wrong() -> None:
    """Loss: models that find people in a crowd region are punished for it."""
    boxes: list[list[float]] = [[0, 0, 50, 50], [100, 100, 190, 190]]
    index = make_index(make_record(1, Path("a.jpg"), 200, 200, boxes, [0, 0], [False, True]))
    plain = make_index(make_record(1, Path("a.jpg"), 200, 200, boxes[:1], [0]))
    guesses: list[list[float]] = [[110, 110, 130, 130], [140, 140, 160, 160], [0, 0, 50, 50]]
    inside = [found(1, guesses, [0.9, 0.8, 0.7], [0, 0, 0])]
    assert coco_metrics(index, inside).stats["mAP50-95"] == pytest.approx(1.0)
    assert coco_metrics(plain, inside).stats["mAP50-95"] == pytest.approx(1 / 3)


def test_order_of_the_detections_does_not_matter() -> None:
    """Loss: metrics that change with the number of processes, because shards arrive in another order."""
    index, detections = random_case(5, images=20)
    first = coco_metrics(index, detections)
    random = np.random.default_rng(1)
    for _ in range(3):
        assert coco_metrics(index, [detections[i] for i in random.permutation(len(detections))]) == first


@pytest.mark.parametrize("empty_entries", [True, False])
def test_no_detections_give_zeros(empty_entries: bool) -> None:
    """Loss: the run dies in its first evaluation, when the network finds nothing yet."""
    index = make_index(make_record(1, Path("a.jpg"), 200, 200, [[0, 0, 50, 50]], [0]), empty_record(2, Path("b.jpg"), 9, 9))
    metrics = coco_metrics(index, [found(1, [], [], [])] if empty_entries else [])
    assert metrics.stats["mAP50-95"] == metrics.stats["mAP_medium"] == metrics.stats["AR_100"] == 0.0
    assert metrics.stats["mAP_small"] == -1.0
    assert metrics.per_class == {"cat": (0.0, 0.0), "dog": (-1.0, -1.0), "[unicorn]": (-1.0, -1.0)}


def test_index_without_any_box_is_undefined_not_a_crash() -> None:
    """Loss: a run on background images only dies at its evaluation."""
    index = make_index(empty_record(1, Path("a.jpg"), 9, 9))
    assert set(coco_metrics(index, [found(1, [[0.0, 0, 5, 5]], [0.5], [0])]).stats.values()) == {-1.0}
    assert set(coco_metrics(make_index(), []).stats.values()) == {-1.0}


def test_images_outside_the_index_are_ignored() -> None:
    """Loss: an evaluation on a part of the images is spoilt by the detections of the rest."""
    index = make_index(make_record(1, Path("a.jpg"), 200, 200, [[0, 0, 50, 50]], [0]))
    good, foreign = found(1, [[0.0, 0, 50, 50]], [0.5], [0]), found(2, [[0.0, 0, 50, 50]], [0.9], [0])
    assert coco_metrics(index, [foreign, good]).stats["mAP50"] == pytest.approx(1.0)


def test_classes_of_one_name_do_not_hide_each_other() -> None:
    """Loss: the table silently shows one class fewer than the network has."""
    index = Index("test", (Category(1, "cat"), Category(2, "cat")), Records.of([make_record(1, Path("a"), 99, 99, [[0, 0, 50, 50]], [1])]))
    assert coco_metrics(index, []).per_class == {"cat (1)": (-1.0, -1.0), "cat (2)": (0.0, 0.0)}


def test_more_boxes_of_a_class_than_are_counted_are_told_before_training(tmp_path: Path) -> None:
    """Loss: a perfect detector that has no mAP of 1, and nobody knows why."""
    Image.new("RGB", (640, 480)).save(tmp_path / "1.jpg")
    rows = [f"{place % 2} {(place % 20 + 0.5) / 20} {(place // 20 + 0.5) / 20} 0.04 0.04" for place in range(300)]
    (tmp_path / "data.yaml").write_text("train: .\nval: .\nnames: [a, b]\n")
    for count, ceiling in ((200, 1.0), (300, 67 / 101)):  # 100 of 150 is a recall of 0.667, and 67 of 101 points are not beyond
        (tmp_path / "1.txt").write_text("\n".join(rows[:count]))
        _, val = load_indexes(DataConfig(path=tmp_path, cache_folder=tmp_path / "cache"))
        (image,) = val.images
        metrics = coco_metrics(val, [found(image.image_id, image.boxes.tolist(), [1.0] * count, image.classes.tolist())])
        assert metrics.stats["mAP50-95"] == pytest.approx(ceiling)
        assert [problem.kind for problem in val.problems] == ["image with more boxes of a class than COCO's metrics count"] * (count > 200)
