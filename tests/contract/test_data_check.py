"""`gai-yolo data check`: would a training take the data set, what is in it, and what is wrong with it?"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image

from gai_yolo.cli import main as cli
from gai_yolo.config import load_config
from gai_yolo.data import index_cache
from gai_yolo.data.index import ImageRecord
from gai_yolo.data.sources import load_indexes
from gai_yolo.data_check import inspection
from gai_yolo.data_check.output import DOCUMENT, PICTURES
from gai_yolo.data_check.tables import MOST_CLASSES, RAREST
from gai_yolo.errors import DataError
from gai_yolo.reporting import terminal
from gai_yolo.reporting.canvas import shortened_to, text_width, wrapped
from gai_yolo.reporting.drawing import class_colour
from gai_yolo.sections import DataConfig
from tests.harness import REPOSITORY

BCCD = REPOSITORY.parent / "shared" / "data" / "bccd"
WIDTH, HEIGHT = 120, 80
Box = tuple[int, float, float, float, float]
"""Class position, x1, y1, x2, y2."""
BOXES: dict[str, list[list[Box]]] = {
    "train": [[(0, 10, 10, 50, 60), (1, 60, 20, 110, 70)], [(1, 5, 5, 25, 25)], []],
    "val": [[(0, 20, 20, 100, 70)], [(0, 1, 1, 41, 41), (1, 50, 40, 60, 50)]],
}
NAMES = ["apple", "pear"]


def in_one_line(text: str) -> str:
    """Without the line ends that the width of the terminal makes."""
    return " ".join(text.split())


def write_pictures(root: Path, boxes: dict[str, list[list[Box]]] = BOXES) -> None:
    for split, images in boxes.items():
        (root / "images" / split).mkdir(parents=True)
        for number in range(len(images)):
            assert cv2.imwrite(str(root / "images" / split / f"{number}.png"), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))


def write_coco(root: Path, boxes: dict[str, list[list[Box]]] = BOXES, names: Sequence[str] = NAMES) -> Path:
    write_pictures(root, boxes)
    (root / "annotations").mkdir()
    for split, images in boxes.items():
        records = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(len(images))]
        flat = [(n, box) for n, of_image in enumerate(images) for box in of_image]
        annotations = [
            {"id": k, "image_id": n, "category_id": c, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for k, (n, (c, x1, y1, x2, y2)) in enumerate(flat)
        ]
        categories = [{"id": position, "name": name} for position, name in enumerate(names)]
        content = {"images": records, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def write_yolo(root: Path) -> Path:
    write_pictures(root)
    for split, images in BOXES.items():
        (root / "labels" / split).mkdir(parents=True)
        for number, of_image in enumerate(images):
            rows = [
                f"{c} {(x1 + x2) / 2 / WIDTH} {(y1 + y2) / 2 / HEIGHT} {(x2 - x1) / WIDTH} {(y2 - y1) / HEIGHT}"
                for c, x1, y1, x2, y2 in of_image
            ]
            (root / "labels" / split / f"{number}.txt").write_text("\n".join(rows))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {NAMES}\n")
    return root / "data.yaml"


def write_voc(root: Path) -> Path:
    write_pictures(root)
    for split, images in BOXES.items():
        for number, of_image in enumerate(images):
            tree = ElementTree.Element("annotation")
            ElementTree.SubElement(tree, "filename").text = f"{number}.png"
            for position, *corners in of_image:
                item = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(item, "name").text = NAMES[position]
                place = ElementTree.SubElement(item, "bndbox")
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                    ElementTree.SubElement(place, key).text = str(value)
            (root / split).mkdir(exist_ok=True)
            ElementTree.ElementTree(tree).write(root / split / f"{number}.xml")
    return root


WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}


def spoil(path: Path) -> None:
    """Its header is in order, and nobody decodes what is behind it: a TIFF of 32 bits."""
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(path, format="TIFF")


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A data set with a box that sticks out, one of no area, one of no class, and images that are not there or cannot be decoded."""
    root = write_coco(tmp_path / "data", dict.fromkeys(("train", "val"), BOXES["train"] * 4), [*NAMES, "[red]犬\x1b[2J"])
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 90, "file_name": "gone.png"})
    content["annotations"] += [
        {"id": 91, "image_id": 2, "category_id": 0, "bbox": [100, 60, 40, 40]},
        {"id": 92, "image_id": 2, "category_id": 0, "bbox": [30, 30, 0, 20]},
        {"id": 93, "image_id": 2, "category_id": 7, "bbox": [10, 10, 20, 20]},
        {"id": 94, "image_id": 77, "category_id": 0, "bbox": [10, 10, 20, 20]},
        {"id": 95, "image_id": 2, "category_id": 1, "bbox": [10, 10, 1e300, float("inf")]},
    ]
    path.write_text(json.dumps(content))
    spoil(root / "images" / "train" / "5.png")
    return root


def check(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors; pictures come into `tmp_path/out`."""
    capsys.readouterr()
    code = cli.main(["data", "check", *map(str, arguments), "--output", str(tmp_path / "out")])
    return (code, *capsys.readouterr())


def document(tmp_path: Path) -> dict[str, Any]:
    content = json.loads((tmp_path / "out" / DOCUMENT).read_text())
    assert isinstance(content, dict)
    return content


def picture(tmp_path: Path, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3) RGB."""
    image = cv2.imread(str(tmp_path / "out" / name))
    assert image is not None, name
    return np.asarray(image[..., ::-1], dtype=np.uint8)


def count_of(image: np.ndarray[Any, np.dtype[np.uint8]], colour: tuple[int, int, int]) -> int:
    return int((image == np.array(colour, dtype=np.uint8)).all(axis=2).sum())


@pytest.mark.parametrize("form", WRITERS)
def test_a_good_data_set_is_counted_and_drawn_in_every_format(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: hours of training on data that nobody has looked at, or numbers that depend on how it is written."""
    path = WRITERS[form](tmp_path / "data")
    code, output, errors = check(capsys, tmp_path, path)
    assert (code, errors) == (0, "")
    text = re.sub(r" +", " ", output)
    assert "\n images 3 2\n without a box 1 0\n of which decoded 3 2\n cannot be decoded 0 0\n boxes 3 3\n" in text
    assert "\n apple 1 1 2 2\n" in text and "\n pear 2 2 1 1\n" in text
    assert "A training would take this data set." in text
    found = document(tmp_path)
    assert (found["version"], found["trainable"], found["refusals"]) == (1, True, [])
    train = found["splits"]["train"]
    assert (train["images"], train["background_images"], train["boxes"], train["crowds"], train["problems"]) == (3, 1, 3, 0, [])
    assert train["box_sizes"] == {"small": 1, "medium": 2, "large": 0}
    assert train["box_width"] == pytest.approx({"min": 20.0, "median": 40.0, "mean": 36.667, "max": 50.0})
    assert train["image_sizes"] == [{"width": WIDTH, "height": HEIGHT, "images": 3}]
    assert [(one["name"], one["train"], one["val"]["boxes"]) for one in found["classes"]] == [
        ("apple", {"boxes": 1, "images": 1}, 2),
        ("pear", {"boxes": 2, "images": 2}, 1),
    ]
    assert found["pictures"] == [str(tmp_path / "out" / name) for name in PICTURES if name != "problems.png"]
    for split in ("train", "val"):
        sheet = picture(tmp_path, f"samples_{split}.png")
        assert all(count_of(sheet, class_colour(position)) > 200 for position in range(2)), "boxes in the colours of their classes"


def test_json_is_the_document_and_nothing_else(
    wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: a pipeline that reads the numbers stumbles over a bar, or gets others than a person sees."""
    monkeypatch.setattr(terminal, "PLAIN_WIDTH", 300)  # so that no cell is folded
    code, output, errors = check(capsys, tmp_path, wrong, "--json")
    assert (code, errors) == (0, "")
    assert json.loads(output) == document(tmp_path)
    table = re.sub(r"\s+", " ", check(capsys, tmp_path, wrong)[1])
    for name, split in json.loads(output)["splits"].items():
        for problem in split["problems"]:
            assert f" {name} {problem['count']} {problem['kind']} {problem['action']} " in table
    assert "[red]犬\\x1b[2J" in table, "neither markup nor what steers a terminal"


def test_what_is_wrong_is_counted_as_training_counts_it_and_shown(wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a person is told that boxes are wrong, and has to search for them; or the check says other things than the training."""
    check(capsys, tmp_path, wrong, "--json")
    index, _ = load_indexes(DataConfig(path=wrong))
    expected = [(p.kind, p.count, p.action, p.example) for p in index.problems]
    undecodable = ("image that cannot be decoded", 1, "a grey image without boxes", str(wrong / "images" / "train" / "5.png"))
    found = [
        tuple(problem[key] for key in ("kind", "count", "action", "example"))
        for problem in document(tmp_path)["splits"]["train"]["problems"]
    ]
    assert found == [*expected, undecodable]
    assert {kind for kind, *_ in expected} >= {"box outside the image", "box without area", "box of an unknown class", "image file missing"}
    sheet = picture(tmp_path, "problems.png")
    assert count_of(sheet, (255, 92, 92)) > 2000
    # An image is 400 pixels wide and 267 high in its place; this one is shown smaller, for there is a box beyond its border.
    ours = [kind for kind, *_ in found if kind != "annotation of an unknown image" and not kind.startswith("class")]
    left = 16 + ours.index("box outside the image") % 4 * 416
    top = 36 + 16 + ours.index("box outside the image") // 4 * (300 + 5 + 5 * 18 + 16)
    tile = sheet[top : top + 300, left : left + 400]
    red = np.argwhere((tile == (255, 92, 92)).all(axis=2))
    assert red.max(axis=0)[0] > 290 - 20 and red.max(axis=0)[1] > 370, "the box ends where the picture does"
    assert (tile[150, 60] == (90, 90, 90)).all(), "its image is there"


def test_the_cache_of_the_index_is_not_asked(
    wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: of a data set that was trained on before nothing wrong is shown, because its cache keeps counts only."""
    monkeypatch.setattr(index_cache, "LEAST_IMAGES", 1)
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  path: {wrong}\n  cache_folder: {tmp_path}/cache\n")
    load_indexes(load_config(config).data)
    assert list((tmp_path / "cache" / "index").iterdir()), "the cache is filled"
    check(capsys, tmp_path, "--config", config)
    assert picture(tmp_path, "problems.png").shape[0] > 2 * 400, "rows of images, not only that of which nothing can be decoded"


def test_pictures_of_an_earlier_check_go(wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a person mends a data set, and is shown the old faults again."""
    check(capsys, tmp_path, wrong)
    assert (tmp_path / "out" / "problems.png").exists()
    mine = tmp_path / "out" / "mine.png"
    mine.write_text("kept")
    check(capsys, tmp_path, write_coco(tmp_path / "good"))
    assert not (tmp_path / "out" / "problems.png").exists() and mine.exists()


def test_a_refused_split_does_not_hide_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: one fault is mended, and only then the next is told; or a script takes a useless data set for a good one."""
    root = write_coco(tmp_path / "data")
    (root / "annotations" / "val.json").write_text("{")
    code, output, _ = check(capsys, tmp_path, root)
    with pytest.raises(DataError) as refused:
        load_indexes(DataConfig(path=root))
    assert code == 1
    assert f"refused: {refused.value}" in re.sub(r"\s+", " ", output), "in the training's own words"
    found = document(tmp_path)
    assert found["refusals"] == [found["splits"]["val"]["refusal"]] == [str(refused.value)]
    assert (found["trainable"], found["splits"]["train"]["boxes"], found["splits"]["val"]["images"]) == (False, 3, 0)
    assert found["classes"][0]["val"] is None
    picture(tmp_path, "samples_train.png")


def test_images_that_training_cannot_decode_are_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: every header is right, and the training is refused on the machine that costs money."""
    root = write_coco(tmp_path / "data")
    for path in (root / "images" / "val").iterdir():
        spoil(path)
    code, output, errors = check(capsys, tmp_path, root, "--json")
    assert (code, json.loads(output)["splits"]["val"]["undecodable"]) == (1, 2)
    assert "2 of 2 images that were tried cannot be decoded" in errors


def test_classes_that_differ_between_splits_are_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: both splits look well, each by itself."""
    root = write_coco(tmp_path / "data")
    path = root / "annotations" / "val.json"
    path.write_text(path.read_text().replace("pear", "plum"))
    code, output, _ = check(capsys, tmp_path, root)
    assert code == 1 and "its classes differ" in in_one_line(output)
    assert [one["name"] for one in document(tmp_path)["classes"]] == ["apple", "pear", "plum"]


def test_no_data_set_at_all_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a screen full of zeros, and the same sentence twice."""
    (tmp_path / "empty").mkdir()
    code, output, _ = check(capsys, tmp_path, tmp_path / "empty")
    assert code == 1 and in_one_line(output).count("found no data set there") == 1 and "boxes" not in output
    code, _, errors = check(capsys, tmp_path, tmp_path / "absent")
    assert code == 2 and errors.startswith(f"error: {tmp_path}/absent: there is no such folder or file")


def test_a_configuration_says_what_is_read(wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the check reads another data set, or with other limits, than the training it is for."""
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  path: {wrong}\n")
    assert check(capsys, tmp_path, "--config", config)[0] == 0
    code, output, _ = check(capsys, tmp_path, "--config", config, "--set", "data.max_bad_fraction=0.05")
    assert code == 1 and "more than data.max_bad_fraction = 0.05 allows" in re.sub(r"\s+", " ", output)
    assert check(capsys, tmp_path, "--config", config, "--set", "data.nothing=1")[0] == 2
    assert check(capsys, tmp_path, wrong, "--set", "data.max_bad_fraction=0.05")[0] == 2
    assert check(capsys, tmp_path, "--config", config, "--format", "voc")[0] == 2


def test_only_some_images_are_decoded_if_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an hour for a million images, or fewer tried than a training tries."""
    root = write_coco(tmp_path / "data", {"train": [BOXES["train"][0]] * 130, "val": BOXES["val"]})
    assert check(capsys, tmp_path, root, "--images", 1)[0] == 0
    assert 100 <= document(tmp_path)["splits"]["train"]["decoded"] <= 101
    code, output, _ = check(capsys, tmp_path, root, "--images", 1)
    assert "(all: --images all)" in output
    for wrong in ("0", "-3", "some"):
        assert check(capsys, tmp_path, root, "--images", wrong)[0] == 2
    code, output, _ = check(capsys, tmp_path, root, "--images", "all")
    assert code == 0 and "--images all" not in output and document(tmp_path)["splits"]["train"]["decoded"] == 130


def test_pictures_do_not_come_among_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the next training learns from contact sheets."""
    root = write_coco(tmp_path / "data")
    place = root / "images" / "train" / "check"
    assert cli.main(["data", "check", str(root), "--output", str(place)]) == 2
    assert "lies among the images" in capsys.readouterr().err and not any(place.iterdir())
    (tmp_path / "file").touch()
    assert cli.main(["data", "check", str(root), "--output", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_very_many_classes_are_shortened_in_the_table_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a thousand lines, in which nobody finds the rare classes; or a picture of a mile."""
    boxes: list[list[Box]] = [[(position, 10, 10, 50 + position % 7, 60) for position in range(n)] for n in range(1, 300)]
    root = write_coco(tmp_path / "data", {"train": boxes, "val": [[]]}, [f"class-{n}-" for n in range(300)])
    code, output, _ = check(capsys, tmp_path, root)
    assert code == 0 and output.count("class-") <= MOST_CLASSES + 2 and f"... {300 - MOST_CLASSES} more in report.json" in output
    assert "class-0-" in output and "class-298-" in output and f"class-{299 - RAREST}-" not in output
    assert len(document(tmp_path)["classes"]) == 300
    assert picture(tmp_path, "classes.png").shape[0] < 2500


def test_a_reader_that_has_gone_changes_no_exit_code(tmp_path: Path) -> None:
    """Loss: a traceback, or an exit code that is not the verdict's, because `head` had seen enough."""
    command = [
        sys.executable,
        "-m",
        "gai_yolo.cli",
        "data",
        "check",
        str(write_coco(tmp_path / "data")),
        "--output",
        str(tmp_path / "out"),
    ]
    gone = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert gone.stdout is not None and gone.stderr is not None
    gone.stdout.close()
    assert (gone.wait(60), gone.stderr.read()) == (0, b"")


def test_ctrl_c_ends_it_without_the_images_that_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: a million images are decoded before the terminal comes back, with a traceback."""
    root = write_coco(tmp_path / "data", {"train": [BOXES["train"][0]] * 400, "val": BOXES["val"]})
    decoded: list[ImageRecord] = []

    def decode(record: ImageRecord, _: int) -> None:
        decoded.append(record)
        if len(decoded) == 10:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)

    monkeypatch.setattr(inspection, "decode", decode)
    code, output, errors = check(capsys, tmp_path, root)
    assert (code, output, errors) == (130, "", "interrupted\n")
    assert 10 <= len(decoded) < 200


@pytest.mark.skipif(not BCCD.is_dir(), reason="../shared/data/bccd is not there")
@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_real_data_has_the_same_counts_in_every_format(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: numbers that are right for toys only."""
    description = tmp_path / "bccd.yaml"
    description.write_text(f"path: {json.dumps(str(BCCD))}\ntrain: images/train\nval: images/val\nnames: [RBC, WBC, Platelets]\n")
    arguments = [description] if form == "yolo" else [BCCD, "--format", form]
    assert check(capsys, tmp_path, *arguments, "--images", 1)[0] == 0
    splits = document(tmp_path)["splits"]
    assert [(splits[name]["images"], splits[name]["boxes"]) for name in ("train", "val")] == [(205, 2804), (87, 1137)]
    assert [[p["kind"] for p in split["problems"]] for split in splits.values()] == [["box without area"] if form == "voc" else []] * 2


def test_long_names_are_cut_in_the_middle_and_to_the_pixel() -> None:
    """Loss: captions that run into each other, or lose the end of a path, which says which file it is."""
    text = "images/" + "x" * 200 + "/7.jpg"
    shown = shortened_to(text, 200, 14)
    assert text_width(shown, 14) <= 200 and shown.startswith("images") and shown.endswith("/7.jpg") and "..." in shown
    assert shortened_to("short", 200, 14) == "short"
    lines = wrapped(text, 200, 14, 3)
    assert len(lines) == 3 and all(text_width(line, 14) <= 200 for line in lines) and lines[-1].endswith("7.jpg")
