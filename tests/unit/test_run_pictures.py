"""Pictures of a run: right, legible, drawn once, and never a reason to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gai_yolo.data.dataset import TrainingSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import Category, Index, Records, make_record
from gai_yolo.data.order import BatchPlan, Key
from gai_yolo.evaluation.coco_metrics import ImageDetections, measure
from gai_yolo.evaluation.confusion import Confusion, confusion_of
from gai_yolo.evaluation.curves import best_point
from gai_yolo.goodput.record import Phase
from gai_yolo.goodput.report import Interruption
from gai_yolo.reporting import batch_sheet, run_pictures, training_charts
from gai_yolo.reporting.batch_sheet import MOST_SHOWN
from gai_yolo.reporting.drawing import Image, class_colour
from gai_yolo.reporting.quality import confidence_picture, confusion_picture, line_colours, precision_recall_picture
from gai_yolo.reporting.run_pictures import BATCHES_DRAWN, CURVES_PICTURE, LABELS_PICTURE, RunPictures
from gai_yolo.reporting.training_charts import STOPPED, curves_picture, labels_picture
from gai_yolo.sections import AugmentConfig
from tests.conftest import WriteImages


def index_of(num_classes: int, images: int = 12) -> Index:
    """Boxes of all sizes and classes, named as people name them."""
    random = np.random.default_rng(0)
    records = []
    for number in range(images):
        corners = random.uniform(0, 300, (num_classes, 2))
        boxes = np.concatenate([corners, corners + random.uniform(4, 300, (num_classes, 2))], axis=1)
        records.append(make_record(number, Path(f"{number}.jpg"), 640, 640, boxes.tolist(), list(range(num_classes))))
    names = [
        "caf\u00e9",
        "\u72ac",
        "a name that is so long that nobody can read it to its end" * 3,
        *(f"class of number {n}" for n in range(3, num_classes)),
    ]
    return Index("test", tuple(Category(place, name) for place, name in enumerate(names[:num_classes])), Records.of(records))


def guesses(index: Index) -> list[ImageDetections]:
    """Some right, some not."""
    random = np.random.default_rng(1)
    found = []
    for record in index.images:
        classes = np.where(random.random(len(record.classes)) < 0.7, record.classes, 0)
        found.append(ImageDetections(record.image_id, record.boxes, random.random(len(classes)).astype(np.float32), classes))
    return found


@pytest.mark.parametrize("num_classes", [1, 3, 80, 200])
def test_quality_is_drawn_for_any_number_of_classes(num_classes: int) -> None:
    """Loss: a crash after the best epoch, a picture of a hundred megapixels, or one in which nothing can be told apart."""
    index = index_of(num_classes, images=2)
    detections = guesses(index)
    _, curves = measure(index, detections)
    pictures = [
        precision_recall_picture("epoch 1", curves, index.class_names),
        confidence_picture("epoch 1", curves, index.class_names, best_point(curves)),
        confusion_picture("epoch 1", confusion_of(index, detections), index.class_names),
        labels_picture(index, 640),
    ]
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.ndim == 3
        assert 300 < min(picture.shape[:2]) <= max(picture.shape[:2]) < 2000
        assert len(np.unique(picture[::3, ::3, 0])) > 20, "not empty"


def test_a_matrix_shows_shares_of_rows() -> None:
    """Loss: columns for rows, or a background that hides everything."""
    matrix = np.array([[0, 8, 0], [0, 4, 0], [0, 0, 0]])
    shown = [confusion_picture("x", Confusion(one, [], 0.25, 0.5), ["a", "b"]) for one in (matrix, np.zeros((3, 3), np.int64))]
    changed = np.argwhere((shown[0] != shown[1]).any(axis=2))
    bright = np.argwhere((shown[0] == (255, 230, 130)).all(axis=2))
    bar_end = 60
    assert len(bright) and bright[bright[:, 0] > bar_end][:, 1].min() > changed[:, 1].min() - 1
    cells = bright[bright[:, 0] > bar_end]
    width, height = np.ptp(cells[:, 1]) + 1, np.ptp(cells[:, 0]) + 1
    assert height > 1.8 * width, "two full cells, one below the other"


def test_nothing_to_be_found_is_drawn_as_that() -> None:
    """Loss: a run on images without boxes dies of its pictures."""
    index = Index("test", (Category(1, "cat"),), Records.of([make_record(1, Path("a.jpg"), 9, 9, [], [])]))
    _, curves = measure(index, [])
    precision_recall_picture("x", curves, ["cat"])
    confidence_picture("x", curves, ["cat"], best_point(curves))
    confusion_picture("x", confusion_of(index, []), ["cat"])
    labels_picture(index, 64)


def row(epoch: int, **values: float | None) -> dict[str, Any]:
    """A row of training_metrics.json, ten steps an epoch."""
    losses = dict.fromkeys(("train_loss", "train_box", "train_cls", "train_dfl"), 1.0 / epoch)
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        **losses,
        "learning_rate": 0.01,
        "val_loss": None,
        "mAP50-95": None,
        "mAP50": None,
        **values,
    }


def stop(step: int | None, cause: str = "killed without notice") -> Interruption:
    """An interruption after a step."""
    return Interruption(0.0, 1, cause, None, Phase.STEP, step, step, "durable", 0, 0.0, 0.0, 1, 1)


def marks(picture: Image) -> list[int]:
    """Columns in the left half, below the words, in which an interruption is marked."""
    lower = picture[80:, : picture.shape[1] // 2]
    return np.flatnonzero((lower == STOPPED).all(axis=2).any(axis=0)).tolist()


def test_interruptions_are_marked_where_they_were() -> None:
    """Loss: a dent in the loss that nobody can explain, though the run knows."""
    history = [row(epoch) for epoch in range(1, 5)]
    assert marks(curves_picture(history, [])) == []
    begin, middle, end = (marks(curves_picture(history, [stop(step)]))[0] for step in (0, 20, 40))
    assert begin < middle < end and abs(middle - (begin + end) / 2) <= 1, "epochs 0, 2 and 4 of 4"
    assert marks(curves_picture(history, [stop(44)]))[0] == end, "in the epoch that is not completed yet"
    assert marks(curves_picture(history, [stop(None)])) == [], "nobody knows where"
    curves_picture(history, [stop(step % 40) for step in range(500)])


@pytest.mark.parametrize("count", [1, 3, 700])
def test_curves_have_gaps_where_nothing_was_evaluated(count: int) -> None:
    """Loss: a crash at the first epoch, or where losses are no numbers."""
    history = [row(epoch) if epoch % 2 else row(epoch, val_loss=2.0, **{"mAP50": 0.3}) for epoch in range(1, count + 1)]
    history[-1] = row(count, val_loss=float("nan"), learning_rate=float("inf"), **{"mAP50-95": 0.0})
    assert curves_picture(history, []).shape[2] == 3


class Drawing:
    """Pictures of a run on a few images."""

    def __init__(self, folder: Path, write_images: WriteImages) -> None:
        self.records = write_images(6)
        images = ImageSource(Records.of(self.records), 64, "none", folder)
        index = Index("test", tuple(Category(place, f"c{place}") for place in range(3)), Records.of(self.records))
        self.training = TrainingSet(images, AugmentConfig(), 3, 20)
        self.plan = BatchPlan(6, 4, 2, 3)
        self.pictures = RunPictures(folder / "pictures", self.training, self.plan, index)
        self.folder = self.pictures.folder


@pytest.fixture
def drawing(tmp_path: Path, write_images: WriteImages) -> Drawing:
    """Ready to draw."""
    return Drawing(tmp_path, write_images)


def test_batches_are_drawn_as_the_network_sees_them(drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a picture of other samples, or of other draws, than those that are trained on."""
    seen: list[tuple[str, Any]] = []

    def draw(title: str, samples: Any, _names: Any) -> Image:
        seen.append((title, samples))
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(batch_sheet, "batch_picture", draw)
    drawing.pictures.begin(2)
    assert [title for title, _ in seen] == [
        "epoch 2, step 1: 4 of 4 samples, as the network sees them",
        "epoch 2, step 2: 2 of 2 samples, as the network sees them",
    ]
    order = drawing.plan.order(2).samples(0, 6)
    expected = [drawing.training[Key(2, position)].sample for position in order]
    for sample, other in zip([one for _, samples in seen for one in samples], expected, strict=True):
        assert np.array_equal(sample.image, other.image) and np.array_equal(sample.boxes, other.boxes)
    assert MOST_SHOWN >= 4


def test_what_is_there_is_not_drawn_again(drawing: Drawing) -> None:
    """Loss: each of a hundred restarts pays for the same pictures."""
    drawing.pictures.begin(1)
    names = {LABELS_PICTURE, *BATCHES_DRAWN}
    assert {path.name for path in drawing.folder.iterdir()} == names
    before = {path: path.stat().st_mtime_ns for path in drawing.folder.iterdir()}
    (drawing.folder / BATCHES_DRAWN[1]).unlink()
    drawing.pictures.begin(1)
    after = {path: path.stat().st_mtime_ns for path in drawing.folder.iterdir()}
    assert {path.name for path in after} == names
    assert all(after[path] == before[path] for path in before if path.name != BATCHES_DRAWN[1])
    assert [name for name, _ in drawing.pictures.of_the_beginning()] == ["labels", "train_batch_1", "train_batch_2"]


def test_boxes_are_drawn_in_the_colours_of_their_classes(drawing: Drawing) -> None:
    """Loss: a sheet without boxes, on which wrong labels cannot be seen."""
    drawing.pictures.begin(1)
    blue_green_red = cv2.imread(str(drawing.folder / LABELS_PICTURE))
    assert blue_green_red is not None
    for place in (0, 1):
        assert (np.abs(blue_green_red[..., ::-1].astype(int) - class_colour(place)).sum(axis=2) == 0).any()


def test_a_picture_that_cannot_be_drawn_is_told_and_that_is_all(drawing: Drawing, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a week of training for a picture."""
    drawing.folder.parent.joinpath("pictures").write_text("a file in the way")
    drawing.pictures.begin(1)
    assert drawing.pictures.curves([row(1)], [], is_last=True) is None
    assert any("labels.png: the picture cannot be drawn (File exists); training goes on" in one for one in told)
    drawing.folder.unlink()
    monkeypatch.setattr(training_charts, "curves_picture", lambda *_: 1 / 0)
    assert drawing.pictures.curves([row(1)], [], is_last=True) is None
    assert any("curves.png: the picture cannot be drawn (ZeroDivisionError" in one for one in told)


def test_curves_are_drawn_once_in_a_while_and_at_the_end(drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a run of short epochs draws more than it trains."""
    assert drawing.pictures.curves([row(1)], [], is_last=False) is None and not drawing.folder.exists()
    assert drawing.pictures.curves([], [], is_last=True) is None, "there is nothing to draw"
    assert drawing.pictures.curves([row(1)], [], is_last=True) is not None and (drawing.folder / CURVES_PICTURE).exists()
    monkeypatch.setattr(run_pictures, "CURVES_INTERVAL", 0.0)
    assert drawing.pictures.curves([row(1), row(2)], [], is_last=False) is not None


def test_a_class_has_one_colour_on_all_pictures() -> None:
    """Loss: the line of another class is taken for that of the boxes of its colour."""
    few, many = [2, 0, 1], [70, 3, 12]
    assert line_colours(few) == [class_colour(place) for place in few]
    assert len(set(line_colours(many))) == len(many), "too many classes for that: at least no two alike"
