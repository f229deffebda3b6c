"""`gai-yolo val`: the numbers of the training, to the last digit, and what else there is to be known."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from gai_yolo.cli.main import main
from gai_yolo.data.sources import load_index
from gai_yolo.detector import YOLO12
from gai_yolo.errors import DataError
from gai_yolo.evaluation import evaluator
from gai_yolo.evaluation.coco_metrics import STAT_NAMES, ImageDetections
from gai_yolo.inference.trained import TrainedModel, load_trained
from gai_yolo.inference.validate import Question, validate
from gai_yolo.reporting import validation_folder
from gai_yolo.sections import DataConfig
from tests.harness import run, small
from tests.runs import metrics

LOSSES = {"total": "val_loss", "box": "val_box", "cls": "val_cls", "dfl": "val_dfl"}
SHAPES = ("circle", "triangle", "square", "star")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run of two epochs, both evaluated, in batches that do not come out even."""
    folder = tmp_path_factory.mktemp("trained")
    values = ("evaluation.interval=1", "evaluation.batch_size=5", "evaluation.confidence=0.0001", "training.lr=0.05")
    done = run("main.py", small(folder, cache, *values))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a checkpoint takes longer than evaluating so small a network. The one network that all tests share must stay as it is."""
    monkeypatch.setattr("gai_yolo.inference.trained.load_trained", load_once)


@functools.cache
def load_once(source: Path, which: str = "best") -> TrainedModel:
    """As `load_trained`."""
    return load_trained(source, which)


def document_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[dict[str, Any], Path]:
    """What `val --json` says, and where the results are."""
    assert main(["val", *map(str, arguments), "--json"]) == 0
    said = capsys.readouterr()
    document: dict[str, Any] = json.loads(said.out)
    folder = Path(said.err.removeprefix("results: ").strip())
    assert json.loads((folder / "validation.json").read_text()) == document
    return document, folder


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_numbers_are_those_of_the_training_to_the_last_digit(epoch: int, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: two numbers for one checkpoint, and nobody knows which one to publish."""
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    document, folder = document_of(capsys, trained, "--checkpoint", f"epoch_{epoch:03d}")
    row = metrics(trained)[epoch - 1]
    assert {name: document["metrics"][name] for name in STAT_NAMES} == {name: row[name] for name in STAT_NAMES}
    assert {name: document["losses"][name] for name in LOSSES} == {name: row[column] for name, column in LOSSES.items()}
    assert folder.parent == trained / "val" and folder.name.startswith(f"epoch_{epoch:03d}-")
    assert document["position"]["epoch"] == epoch and document["settings"]["batch_size"] == 5
    assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == before, "a program that asks goes on as it was"


def test_a_run_says_what_each_class_is_and_every_box_is_in_the_matrix(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a table whose counts are of another split."""
    document, folder = document_of(capsys, trained)
    truth = load_index(load_once(trained).config.data, "val")  # type: ignore[union-attr]
    assert [one["name"] for one in document["classes"]] == list(SHAPES)
    assert [one["boxes"] for one in document["classes"]] == truth.images.class_counts(4).tolist()
    images = [sum(place in record.classes for record in truth.images) for place in range(4)]
    assert [one["images"] for one in document["classes"]] == images
    matrix = document["confusion"]["matrix"]
    assert [sum(row) for row in matrix[:4]] == [one["boxes"] for one in document["classes"]]
    assert (document["confusion"]["confidence"], document["confusion"]["iou"]) == (0.25, 0.5)
    for name in ("precision_recall.png", "confidence.png", "confusion_matrix.png"):
        assert cv2.imread(str(folder / name)) is not None, name
    worst = sorted(path.name for path in (folder / "worst").iterdir())
    assert len(worst) == len(document["worst_images"]) and worst[0].startswith(f"01_{document['worst_images'][0]['image_id']}_")


def test_a_perfect_detector_gets_one(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an error between network and table that lowers every detector alike. The truth is put in the place of what the network says."""

    def truth(self: evaluator.Evaluator, image_id: int, *_: object) -> ImageDetections:
        record = self.index.images[self._positions[image_id]]
        return ImageDetections(image_id, record.boxes, np.full(len(record.boxes), 0.9, np.float32), record.classes)

    monkeypatch.setattr(evaluator.Evaluator, "_in_file_pixels", truth)
    document, folder = document_of(capsys, trained)
    assert document["metrics"]["mAP50-95"] == pytest.approx(1.0) and document["metrics"]["mAP75"] == pytest.approx(1.0)
    boxes = [one["boxes"] for one in document["classes"]]
    assert document["confusion"]["matrix"] == np.diag([*boxes, 0]).tolist()
    curves = [row for row, count in zip(document["curves"]["precision_at_recalls"], boxes, strict=True) if count]
    assert curves and all(value == 1.0 for row in curves for value in row)
    assert document["best_confidence"]["f1"] == pytest.approx(1.0)
    assert document["worst_images"] == [] and not (folder / "worst").exists()
    assert len(document["best_images"]) == len(list((folder / "best").iterdir())) > 0


def test_the_table_names_numbers_classes_and_the_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an answer that only a program can read."""
    assert main(["val", str(trained), "--checkpoint", "last"]) == 0
    said = capsys.readouterr().out
    assert "epoch 2, step 4" in said and "YOLO12-debug" in said and "AP  IoU 0.50:0.95  all sizes" in said
    assert all(re.search(rf"^ {name} +\d+ +\d+ ", said, re.MULTILINE) for name in SHAPES)
    assert "from confidence 0.25, at IoU 0.5:" in said and "worst images, by their F1" in said
    assert Path(said.splitlines()[-1].removeprefix("results: ")).is_dir()


def test_results_are_never_overwritten_unless_asked(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: yesterday's numbers, and a person's own notes beside them."""
    before = set((trained / "val").iterdir()) if (trained / "val").exists() else set()
    assert document_of(capsys, trained)[1] not in before
    output = tmp_path / "out"
    assert document_of(capsys, trained, "--output", output)[1] == output
    (output / "notes.txt").write_text("mine")
    (output / "worst" / "01_old.jpg").write_text("old")
    assert main(["val", str(trained), "--output", str(output)]) == 2
    assert "is not empty; give another --output, or --overwrite" in capsys.readouterr().err
    document_of(capsys, trained, "--output", output, "--overwrite")
    assert (output / "notes.txt").read_text() == "mine" and not (output / "worst" / "01_old.jpg").exists()
    (output / "validation.json").unlink()
    (output / "worst" / "01_holiday.jpg").write_text("mine")
    assert main(["val", str(trained), "--output", str(output), "--overwrite"]) == 2
    assert "is not this command's" in capsys.readouterr().err and (output / "worst" / "01_holiday.jpg").read_text() == "mine"


def test_a_full_disk_leaves_no_document_of_other_numbers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: half a document, or new numbers beside pictures of old ones."""
    output = tmp_path / "out"
    document_of(capsys, trained, "--output", output)
    before = (output / "validation.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = ["val", str(trained), "--output", str(output), "--overwrite", "--confidence", "0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(validation_folder, "publish_text", full)
        assert main(arguments) == 2 and "No space left" in capsys.readouterr().err
    assert (output / "validation.json").read_text() == before and not list(output.rglob("*.png"))
    with monkeypatch.context() as patch:
        patch.setattr(validation_folder, "write_image", full)
        assert main(arguments) == 2 and "No space left" in capsys.readouterr().err
    assert json.loads((output / "validation.json").read_text())["confusion"]["confidence"] == 0.5 and not list(output.rglob("*.png"))


def test_memory_that_is_missing_is_no_fault_of_the_output(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: somebody looks for another disk, and it is memory that is missing."""

    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("gai_yolo.inference.validate.EvaluationLoader", full)
    assert main(["val", str(trained), "--output", str(tmp_path / "out"), "--batch", str(10**12)]) == 2
    said = capsys.readouterr().err
    assert "(Cannot allocate memory); a smaller --batch needs less memory" in said and not (tmp_path / "out").exists()


def test_a_file_of_weights_is_asked_for_its_data(
    trained: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: numbers of a network on data that it has nothing to do with."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bare.pt"
    torch.save(YOLO12("debug", 4).state_dict(), path)
    assert main(["val", str(path)]) == 2
    assert "does not say which data it was trained on; give a data set with --data" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["bare.pt"], "no empty folder is left"
    shapes = next(cache.glob("shapes-*"))
    document, folder = document_of(capsys, path, "--data", shapes)
    assert "names no classes; those of the data set are taken" in document["notes"][0]
    assert folder == Path("val") / "bare-1" and (tmp_path / folder / "validation.json").exists()
    exported = tmp_path / "run.safetensors"
    assert main(["weights", "export", str(trained), "--checkpoint", "last", "--output", str(exported)]) == 0
    capsys.readouterr()
    assert document_of(capsys, exported)[0]["metrics"]["mAP50-95"] == metrics(trained)[1]["mAP50-95"], "its settings are in the file"


def data_set(folder: Path, names: list[str], splits: tuple[str, ...] = ("train", "val")) -> Path:
    """One image with one box of the first class in each split, as YOLO txt."""
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        assert cv2.imwrite(str(folder / "images" / split / f"{split}.png"), np.full((64, 64, 3), 90, np.uint8))
        (folder / "labels" / split / f"{split}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (folder / "data.yaml").write_text(yaml.safe_dump({**{split: f"images/{split}" for split in splits}, "names": names}))
    return folder


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["circle", "square", "triangle", "star"], "number 1: 'square' in place of 'triangle'"),
        (["circle", "triangle", "square"], "(3 and 4; only in the network: 'star')"),
        (["circle", "triangle", "square", "\x1b[31mred"], "only in the data set: '\\x1b[31mred'; only in the network: 'star'"),
    ],
)
def test_data_of_other_classes_is_refused(
    names: list[str], says: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a good network that is said to be bad, because its triangles are called squares."""
    assert main(["val", str(trained), "--data", str(data_set(tmp_path / "data", names))]) == 2
    said = capsys.readouterr()
    assert says in said.err and len(said.err.splitlines()) == 1 and said.out == ""


def test_the_test_split_is_read_where_there_is_one(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the number that counts in the end cannot be had, or is that of the validation set."""
    with_test = data_set(tmp_path / "with", list(SHAPES), ("train", "val", "test"))
    document, _ = document_of(capsys, trained, "--data", with_test, "--split", "test")
    assert (document["split"], document["images"]) == ("test", 1) and "/images/test/" in document["worst_images"][0]["file"]
    train, _ = document_of(capsys, trained, "--data", with_test, "--split", "train")
    assert "/images/train/" in train["worst_images"][0]["file"]
    assert main(["val", str(trained), "--data", str(data_set(tmp_path / "without", list(SHAPES))), "--split", "test"]) == 2
    assert "has no test split" in capsys.readouterr().err
    assert main(["val", str(trained), "--split", "test"]) == 2
    assert "the built-in data set has the splits train and val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere"], "/nowhere"),
        (["RUN", "--checkpoint", "epoch_009"], "has no checkpoint epoch_009"),
        (["RUN", "--data", "/nowhere"], "there is no such folder or file"),
        (["RUN", "--batch", "0"], "--batch 0: give a number from 1 on"),
        (["RUN", "--confidence", "nan"], "give a number from 0 to 1"),
        (["RUN", "--iou", "0"], "give a number above 0"),
        (["RUN", "--overwrite"], "give that, too"),
        (["RUN", "--output", "/proc/none"], "cannot be written"),
        (["RUN", "--device", "cuda"], "GPUs"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: list[str], says: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a traceback, or an answer to another question."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["val", *(str(trained) if one == "RUN" else one for one in arguments)]) == 2
    said = capsys.readouterr()
    assert says in said.err and len(said.err.splitlines()) == 1 and said.err.startswith("error: ") and said.out == ""


def test_an_output_among_the_images_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the next training takes the pictures for images."""
    data = data_set(tmp_path / "data", list(SHAPES))
    assert main(["val", str(trained), "--data", str(data), "--output", str(data / "images" / "val" / "out")]) == 2
    assert "lies among the images of the data set" in capsys.readouterr().err


def test_programs_may_ask_too(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: who compares networks in a loop has to parse what is printed."""
    model = load_once(trained, "last")
    seen = []
    report = validate(model, question=Question(batch_size=3), watched=lambda batches: (seen.append(one) or one for one in batches))  # type: ignore[func-returns-value]
    assert len(seen) == 5 and len(report.evaluation.index) == 13
    assert report.evaluation.metrics.stats["mAP50"] == pytest.approx(metrics(trained)[1]["mAP50"], abs=1e-6)
    assert not any(parameter.requires_grad for parameter in model.network.parameters()), "the network is as it was"
    with pytest.raises(DataError, match="no test split"):
        validate(model, DataConfig(path=data_set(tmp_path / "data", list(SHAPES))), Question("test"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        validate(model)
