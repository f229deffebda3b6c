"""What a wrong input gets: one clear line and exit code 2, or a counted warning where going on is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from elastic_train import main
from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT
from gai_yolo.detector import YOLO12
from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.run_folder import RunFolder
from tests.harness import small

Json = dict[str, Any]
Break = Callable[["DataSet"], None]


class DataSet:
    """A COCO data set of 8 training and 4 validation images, to be broken before it is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.splits: dict[str, Json] = {}
        for split, count in (("train", 10), ("val", 4)):
            folder = root / "images" / split
            folder.mkdir(parents=True)
            images, annotations = [], []
            for number in range(1, count + 1):
                picture = np.full((48, 64, 3), 30 * number % 255, dtype=np.uint8)
                assert cv2.imwrite(str(folder / f"{number}.jpg"), picture)
                images.append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
                box = [5.0, 5.0, 20.0 + number, 20.0]
                annotations.append({"id": number, "image_id": number, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
            categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
            self.splits[split] = {"images": images, "annotations": annotations, "categories": categories}

    @property
    def train(self) -> Json:
        """The training json."""
        return self.splits["train"]

    def image(self, number: int) -> Path:
        """A training image."""
        return self.root / "images" / "train" / f"{number}.jpg"

    def write(self) -> Path:
        """Write the json files."""
        folder = self.root / "annotations"
        folder.mkdir()
        for split, content in self.splits.items():
            (folder / f"{split}.json").write_text(json.dumps(content))
        return self.root


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """A good data set."""
    return DataSet(tmp_path / "data")


def train(tmp_path: Path, root: Path | str, *more: str, config: str = "{}") -> int:
    """Run the job in this process on a data set, for one step."""
    path = tmp_path / "config.yaml"
    path.write_text(config)
    values = small(
        tmp_path / "runs",
        tmp_path / "cache",
        f"data.path={root}",
        "data.cache=disk",
        "training.epochs=1",
        "training.max_batches_per_epoch=1",
    )
    extra = [argument for value in more for argument in ("--set", value)]
    return main(["--config", str(path), *values, *extra])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


CONFIGS = {
    "unknown key": ("training: {epochz: 3}", "unknown key training.epochz (did you mean training.epochs?)"),
    "unknown section": ("trainig: {epochs: 3}", "unknown key trainig (did you mean training?)"),
    "wrong type": ("training: {clip_norm: fast}", "training.clip_norm: input should be a valid number"),
    "impossible value": ("evaluation: {iou: 1.5}", "evaluation.iou: input should be less than or equal to 1"),
    "not a choice": ("model: {size: xxl}", "model.size: input should be 'n', 's', 'm', 'l', 'x' or 'debug', got 'xxl'"),
    "section is a value": ("augment: 3", "augment: "),
    "not YAML": ("training: [1, 2", "config.yaml, line 1: not valid YAML"),
    "a key twice": ("training: {epochs: 3}\ntraining: {lr: 0.1}", "the key 'training' occurs twice"),
    "a date": ("experiment: {name: 2024-13-45}", "not valid YAML"),
    "a list": ("- training", "the file must hold sections"),
    "name leaves the folder": ("experiment: {name: ../../etc}", "experiment.name: "),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configuration_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo that is silently ignored costs a training run."""
    text, expected = CONFIGS[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    line = refused(capsys)
    assert expected in line and str(path) in line


OVERRIDES = {
    "image size": ("data.image_size=100", "data.image_size: input should be a multiple of 32, got 100"),
    "micro batch": ("training.micro_batch_size=99", "micro_batch_size must lie between 1 and batch_size (12)"),
    "no value": ("training.epochs", "write it as key.path=value"),
    "fp16 on a CPU": ("training.amp=fp16", "training.amp: fp16 needs a GPU"),
    "no such user": ("experiment.folder=~nosuchuser/x", "there is no home folder"),
    "cache in a file": ("data.cache_folder=/dev/null", "data.cache_folder: cannot write to"),
    "missing weights": ("model.weights=/nowhere/w.pt", "/nowhere/w.pt: cannot be read"),
}


def test_several_overrides_after_one_flag(data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the second one is taken for a word that means nothing; or the last flag alone counts."""
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    told = ["--set", f"data.path={data.write()}", "training.epochs=three", "--set", "evaluation.iou=7", "data.workers=0"]
    assert main(["--config", str(path), *told]) == 2
    line = refused(capsys)
    assert "training.epochs" in line and "evaluation.iou" in line


@pytest.mark.parametrize("case", OVERRIDES)
def test_wrong_override_is_refused(case: str, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same care for `--set`."""
    override, expected = OVERRIDES[case]
    assert train(tmp_path, data.write(), override) == 2
    assert expected in refused(capsys)


def test_missing_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is what the user must see."""
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot read the configuration" in refused(capsys)


def _duplicate_image(data: DataSet) -> None:
    data.train["images"].append(dict(data.train["images"][0]))


def _leave_folder(data: DataSet) -> None:
    data.train["images"][0]["file_name"] = "../val/1.jpg"


def _remove_most(data: DataSet) -> None:
    for number in range(1, 6):
        data.image(number).unlink()


def _other_classes(data: DataSet) -> None:
    data.splits["val"]["categories"][0]["name"] = "horse"


def _no_boxes(data: DataSet) -> None:
    data.train["annotations"].clear()


def _no_categories(data: DataSet) -> None:
    del data.train["categories"]


REFUSED_DATA: dict[str, tuple[Break, str]] = {
    "duplicate image id": (_duplicate_image, "image id 1 occurs twice"),
    "file name leaves the folder": (_leave_folder, "leads out of"),
    "half of the images missing": (_remove_most, "5 of 10 images are missing or unreadable"),
    "classes of the splits differ": (_other_classes, "horse"),
    "no boxes at all": (_no_boxes, "none of the 10 training images has a usable box"),
    "no categories": (_no_categories, "the key `categories` is missing"),
}


@pytest.mark.parametrize("case", REFUSED_DATA)
def test_useless_data_set_is_refused(case: str, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training for hours on the wrong folder is worse than not starting."""
    spoil, expected = REFUSED_DATA[case]
    spoil(data)
    assert train(tmp_path, data.write()) == 2
    assert expected in refused(capsys)


def test_broken_json_and_missing_data_set_are_refused(data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a download must be recognised as such."""
    root = data.write()
    path = root / "annotations" / "train.json"
    path.write_bytes(path.read_bytes()[:200])
    assert train(tmp_path, root) == 2
    assert "not valid JSON" in refused(capsys)
    assert train(tmp_path, tmp_path / "nothing") == 2
    assert "there is no such folder or file" in refused(capsys)


def _missing(data: DataSet) -> None:
    data.image(3).unlink()


def _garbage(data: DataSet) -> None:
    data.image(3).write_bytes(b"not a JPEG")


def _outside(data: DataSet) -> None:
    data.train["annotations"][0]["bbox"] = [50.0, 5.0, 40.0, 20.0]


def _degenerate(data: DataSet) -> None:
    data.train["annotations"][0]["bbox"] = [5.0, 5.0, 0.0, 20.0]


def _unknown_category(data: DataSet) -> None:
    data.train["annotations"][0]["category_id"] = 99


def _duplicate_annotation(data: DataSet) -> None:
    data.train["annotations"].append(dict(data.train["annotations"][0]))


def _not_a_number(data: DataSet) -> None:
    data.train["annotations"][0]["bbox"] = [float("nan"), 5.0, 10.0, 20.0]


MENDED_DATA: dict[str, tuple[Break, str]] = {
    "missing image": (_missing, "image file missing: 1, image skipped"),
    "unreadable image": (_garbage, "image unreadable: 1, image skipped"),
    "box outside": (_outside, "box outside the image: 1, clipped"),
    "box without area": (_degenerate, "box without area: 1, skipped"),
    "unknown category": (_unknown_category, "box of an unknown class: 1, skipped"),
    "duplicate annotation id": (_duplicate_annotation, "duplicate annotation id: 1, second skipped"),
    "box that is not a number": (_not_a_number, "box with a number that is not finite: 1, skipped"),
}


@pytest.mark.parametrize("case", MENDED_DATA)
def test_single_bad_records_are_counted_and_trained_around(
    case: str, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bad record of a large data set must neither stop the run nor go unsaid."""
    spoil, expected = MENDED_DATA[case]
    spoil(data)
    assert train(tmp_path, data.write()) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if expected in line]
    assert len(told) == 1, "told once, with an example"
    assert "the first: " in told[0]


def test_image_that_breaks_after_the_start_does_not_stop_training(
    data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JPEG that is torn behind its header passes the check at the start; epoch 40 must survive it."""
    picture = data.image(3)
    picture.write_bytes(picture.read_bytes()[:160])
    assert train(tmp_path, data.write(), "augment.mosaic=0") == 0
    output = capsys.readouterr()
    assert "image 3 cannot be decoded" in output.err or "image unreadable" in output.out


def _publish(run: Path, content: Json) -> None:
    """What another program, or another version of this one, would leave behind, with its manifest."""
    folder = RunFolder(run)
    folder.lock()
    folder.make()
    position = Position(content.get("step", 0), content["epoch"], content.get("samples", 0))
    manifest = Manifest("epoch", position, 0, "", 0, "f", "2", "2026-01-01T00:00:00Z")
    folder.store.publish(manifest, lambda file: torch.save(content, file))
    folder.release()


def _foreign_checkpoint(run: Path) -> None:
    state = YOLO12("s", num_classes=2).state_dict()
    _publish(run, {"format": CHECKPOINT_FORMAT, "epoch": 1, "step": 5, "samples": 50, "model_state_dict": state})


def _other_format(run: Path) -> None:
    _publish(run, {"format": 99, "epoch": 1})


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "of another model": (_foreign_checkpoint, "epoch_001.pt: cannot go on from it"),
    "of another version": (_other_format, "not in this program's checkpoint format"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_foreign_checkpoint_is_refused_and_kept(case: str, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Starting over silently would overwrite somebody's run."""
    write, expected = CHECKPOINTS[case]
    run = tmp_path / "runs" / "run"
    write(run)
    before = (run / "checkpoints" / "epoch_001.pt").read_bytes()
    assert train(tmp_path, data.write()) == 2
    assert expected in refused(capsys)
    assert (run / "checkpoints" / "epoch_001.pt").read_bytes() == before


def test_weights_of_another_size_are_refused(data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A partial load would look like a very bad start."""
    path = tmp_path / "yolo12s.pt"
    torch.save(YOLO12("s", num_classes=2).state_dict(), path)
    assert train(tmp_path, data.write(), f"model.weights={path}") == 2
    assert "not the weights of a YOLO12-debug" in refused(capsys)


def test_every_shipped_configuration_is_valid() -> None:
    """A configuration that nobody starts is the first to rot."""
    from gai_yolo.config import load_config

    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"config", "config_test_resume", "bccd", *(f"coco_yolo12{size}" for size in "nsmlx")}
    for path in paths:
        config = load_config(path)
        assert yaml.safe_load(path.read_text())["experiment"]["name"] == config.experiment.name
