"""`gai-yolo predict`: what is looked at, what is left behind, and what is said of the rest."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from gai_yolo.cli.main import main
from gai_yolo.errors import Refusal
from gai_yolo.predict.detector import Detector
from gai_yolo.predict.output import Output, new_folder
from gai_yolo.predict.sources import Item
from gai_yolo.reporting.drawing import write_image
from tests.detectors import NAMES, eager_file
from tests.harness import REPOSITORY

RATE, FRAMES = 12.5, 9
OPTIONS = ["--size", "64", "--device", "cpu", "--max-detections", "3", "--batch", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eager_file(tmp_path_factory.mktemp("model") / "eager.safetensors")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images, two of one name, and a video; the current folder is the one above."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number, name in enumerate(["1.png", "2.jpg", "3.png", "größe\n[red].png", "more/1.png", "more/5.png"]):
        image = cv2.GaussianBlur(rng.integers(0, 256, (40 + number, 70, 3), dtype=np.uint8), (0, 0), 3)
        write_image(folder / name, np.asarray(image, np.uint8))
    write_video(folder / "clip.avi", FRAMES)
    monkeypatch.chdir(tmp_path)
    return folder


def write_video(path: Path, frames: int) -> None:
    """64 x 48 pixels, a ball that moves."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), RATE, (64, 48))
    for number in range(frames):
        frame = np.full((48, 64, 3), 90, np.uint8)
        cv2.circle(frame, (5 + number % 50, 24), 9, (30, 60, 250), -1)
        writer.write(frame)
    writer.release()


def document(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_is_looked_at_and_left_in_every_form(model: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: a result that other programs cannot read, or that says something else in each of its files."""
    assert main(["predict", str(model), "photos", "--save", "images,coco,yolo,csv", *OPTIONS]) == 0
    said = capfd.readouterr()
    assert f"{6 + FRAMES} pictures in" in said.out and "predictions/eager/1" in said.out and said.err == ""
    folder = Path("predictions/eager/1")
    found = Detector.load(model, device="cpu").predict(
        [photos / name for name in ("1.png", "2.jpg", "3.png", "größe\n[red].png")], size=64, max_detections=3, batch_size=4
    )
    coco = document(folder / "coco.json")
    assert [one["file_name"] for one in coco["images"][:6]] == [
        *("photos/1.png", "photos/2.jpg", "photos/3.png", "photos/größe\n[red].png"),
        *("photos/more/1.png", "photos/more/5.png"),
    ]
    assert [(one["width"], one["height"]) for one in coco["images"][:6]] == [(70, 40 + number) for number in range(6)]
    assert [one["frame"] for one in coco["images"][6:]] == list(range(1, FRAMES + 1))
    assert len({one["file_name"] for one in coco["images"]}) == 6 + FRAMES
    assert [one["name"] for one in coco["categories"]] == NAMES
    boxes = [row["bbox"] for row in coco["annotations"] if row["image_id"] <= 4]
    corners = np.concatenate([one.boxes for one in found])
    assert np.array_equal(np.array(boxes, np.float32)[:, :2], corners[:, :2]), "to the last bit"
    assert [np.float32(row["score"]) for row in coco["annotations"]][:3] == found[0].scores.tolist()
    truth = COCO(folder / "coco.json")
    assert len(truth.loadRes(document(folder / "coco.json")["annotations"]).anns) == len(coco["annotations"]) == 3 * (6 + FRAMES)
    rows = list(csv.DictReader(io.StringIO((folder / "predictions.csv").read_text(encoding="utf-8"), newline="")))
    assert len(rows) == len(coco["annotations"]) and rows[0]["file"] == "photos/1.png" and rows[-1]["frame"] == str(FRAMES)
    assert [np.float32(rows[0][key]) for key in ("x1", "y1", "x2", "y2")] == found[0].boxes[0].tolist()
    (label,) = [path for path in folder.glob("labels/*.txt") if path.name == "1.txt"]
    number, x, y, width, height, score = (float(word) for word in label.read_text().splitlines()[0].split())
    assert number == found[0].classes[0] and score == pytest.approx(float(found[0].scores[0]), abs=1e-6)
    restored = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * [70, 40, 70, 40]
    assert restored == pytest.approx(found[0].boxes[0], abs=1e-3)
    assert len(list(folder.glob("labels/clip.frames/*.txt"))) == FRAMES
    drawn = {str(path.relative_to(folder / "images")) for path in folder.rglob("images/**/*.jpg")}
    assert drawn == {"1.jpg", "2.jpg", "3.jpg", "größe\n[red].jpg", "more/1.jpg", "more/5.jpg"}
    about = document(folder / "prediction.json")
    assert about["complete"] and about["pictures"] == 15 and sum(about["found"].values()) == about["objects"] == 45
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name]


def test_a_video_comes_out_as_long_as_large_and_as_fast(model: Path, photos: Path) -> None:
    """Loss: a video that runs at another speed, or lacks its last batch."""
    assert main(["predict", str(model), "photos/clip.avi", "--save", "images", "--output", "out", *OPTIONS]) == 0
    before, after = cv2.VideoCapture("photos/clip.avi"), cv2.VideoCapture("out/images/clip.mp4")
    for what in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT):
        assert before.get(what) == after.get(what) > 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["images", "prediction.json"]
    assert photos.is_dir()


def test_a_photograph_that_lies_on_its_side_is_drawn_upright(model: Path, photos: Path) -> None:
    """Loss: boxes of an upright picture drawn on one that lies."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save("side.jpg", exif=exif)
    assert main(["predict", str(model), "side.jpg", "--output", "out", *OPTIONS]) == 0
    drawn = cv2.imread("out/images/side.jpg")
    assert drawn is not None and drawn.shape == (80, 40, 3) and photos.is_dir()
    (image,) = document(Path("out/coco.json"))["images"]
    assert (image["width"], image["height"]) == (40, 80)


def test_what_cannot_be_read_is_listed_and_the_rest_is_done(model: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: one broken file of ten thousand ends the command, or is missed by nobody; a file's name that steers the terminal."""
    (photos / "2.jpg").write_text("no image")
    (photos / "\x1b[31mbad.png").write_bytes(b"")
    (photos / "clip.avi").write_bytes((photos / "clip.avi").read_bytes()[:3000])
    assert main(["predict", str(model), "photos", "missing.jpg", *OPTIONS]) == 1
    said = capfd.readouterr()
    lines = said.err.splitlines()
    assert lines[0].startswith("not read (") and "\x1b" not in said.err + said.out
    assert any("missing.jpg: there is no such file" in line for line in lines)
    assert any("2.jpg: is no image" in line for line in lines) and any("\\x1b[31mbad.png: is empty" in line for line in lines)
    about = document(Path("predictions/eager/1/prediction.json"))
    assert len(about["failures"]) == len(lines) - 1 >= 4 and any("clip.avi" in line for line in about["failures"])
    assert {"1.jpg", "3.jpg"} <= {path.name for path in Path("predictions/eager/1/images").iterdir()}


def test_nothing_is_overwritten_unasked(model: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: the results of last week."""
    assert main(["predict", str(model), "photos/1.png", "--save", "csv", *OPTIONS]) == 0
    assert main(["predict", str(model), "photos/1.png", "--save", "csv", *OPTIONS]) == 0
    assert sorted(path.name for path in Path("predictions/eager").iterdir()) == ["1", "2"]
    assert main(["predict", str(model), "photos/3.png", "--output", "predictions/eager/1", *OPTIONS]) == 2
    assert "not empty" in capfd.readouterr().err and "photos/1.png" in Path("predictions/eager/1/predictions.csv").read_text()
    assert main(["predict", str(model), "photos/3.png", "--output", "predictions/eager/1", "--overwrite", *OPTIONS]) == 0
    assert "photos/3.png" in Path("predictions/eager/1/predictions.csv").read_text() and photos.is_dir()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL", "missing.jpg"], "nothing could be read: missing.jpg: there is no such file"),
        (["MODEL", "bad.png", "missing.jpg"], "nothing could be read: missing.jpg: there is no such file, folder or camera. (1 more)"),
        (["MODEL", "bad.png", "--classes", "dog"], "there is no 'dog'; there are cell, red cell, 7"),
        (["MODEL", "bad.png", "--confidence", "25"], "confidence: must lie between 0 and 1"),
        (["MODEL", "bad.png", "--size", "100"], "multiple of 32"),
        (["MODEL", "bad.png", "--size", "0"], "multiple of 32"),
        (["MODEL", "bad.png", "--batch", "0"], "--batch: must be at least 1"),
        (["MODEL", "bad.png", "--save", "images,pdf"], "there is no 'pdf'; give some of images,coco,yolo,csv"),
        (["MODEL", "bad.png", "--device", "abacus"], "device abacus: cannot be used"),
        (["MODEL", "bad.png", "--overwrite"], "give --output with it"),
        (["missing.pt", "bad.png"], "missing.pt: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    words: list[str], says: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Loss: a traceback, or an empty folder that looks like a result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"bad")
    assert main(["predict", *(str(model) if word == "MODEL" else word for word in words)]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and says in errors, errors
    assert not list(tmp_path.glob("predictions/*/*"))


def test_ctrl_c_leaves_what_was_done(model: Path, photos: Path) -> None:
    """Loss: an hour of video, because the last minute was too much."""
    write_video(photos / "long.avi", 3000)
    command = [sys.executable, "-m", "gai_yolo.cli", "predict", str(model), "photos/1.png", "photos/long.avi", "--output", "out", *OPTIONS]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    deadline = time.monotonic() + 120
    while not list(Path("out").glob("images/.video*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, out + errors
    assert errors == "interrupted; what was looked at until then is complete\n"
    about, coco = document(Path("out/prediction.json")), document(Path("out/coco.json"))
    assert about["complete"] is False and 1 < about["pictures"] == len(coco["images"]) < 3001
    assert cv2.VideoCapture("out/images/long.mp4").get(cv2.CAP_PROP_FRAME_COUNT) == about["pictures"] - 1
    assert sorted(path.name for path in Path("out/images").iterdir()) == ["1.jpg", "long.mp4"]


def test_a_picture_in_which_nothing_is_found_has_an_empty_label_file(model: Path, photos: Path) -> None:
    """Loss: a picture without objects that looks like one that was not looked at."""
    words = ["photos/1.png", "--confidence", "1", "--save", "yolo,coco,csv", "--output", "out", *OPTIONS]
    assert main(["predict", str(model), *words]) == 0
    assert Path("out/labels/1.txt").read_text() == "" and document(Path("out/coco.json"))["annotations"] == []
    assert Path("out/predictions.csv").read_text().splitlines() == ["file,frame,class,name,score,x1,y1,x2,y2"]
    assert photos.is_dir()


def test_a_killed_prediction_says_so_and_its_pictures_are_not_looked_at(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Loss: half of the results, over those of last week, under a file that says that they are complete; drawn boxes that are taken for
    objects by the next command."""

    class KilledError(BaseException):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    words = ["predict", str(model), "photos/1.png", "photos/2.jpg", "--output", "photos/out", *OPTIONS]
    assert main(words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", kill)
        with pytest.raises(KilledError):
            main([*words, "--overwrite"])
    assert document(Path("photos/out/prediction.json"))["complete"] is False
    assert main(["predict", str(model), "photos", "--save", "coco", "--output", "all", *OPTIONS]) == 0
    assert not [one for one in document(Path("all/coco.json"))["images"] if "out" in one["file_name"]] and photos.is_dir()
    capfd.readouterr()


def test_two_commands_do_not_write_into_one_folder(model: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: two that were started in one second mix their pictures, and the tables are those of the slower one."""
    given = ["--save", "csv", "--output", "out", *OPTIONS]
    found = Detector.load(model, device="cpu").predict(photos / "1.png", size=64)
    folder = new_folder(Path("out"), "eager", overwrite=False)
    first, second = (Output(folder, ["csv"], tuple(NAMES)) for _ in range(2))
    with first, second:
        first.add(Item(photos / "1.png", "1"), found)
        with pytest.raises(Refusal, match="another prediction is written there"):
            second.add(Item(photos / "1.png", "1"), found)
    assert main(["predict", str(model), "photos/1.png", *given]) == 2 and "not empty" in capfd.readouterr().err
