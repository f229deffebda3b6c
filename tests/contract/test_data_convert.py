"""`gai-yolo data convert`: another format, other classes, the same pictures; whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gai_yolo.cli import main as cli
from gai_yolo.data.formats.check import Split
from gai_yolo.data.index import Index
from gai_yolo.data.sources import read_any
from gai_yolo.data_convert import conversion
from gai_yolo.data_convert.publish import SUMMARY_FILE, place_images
from gai_yolo.sections import DataConfig
from tests.contract.test_data_check import BCCD, BOXES, WRITERS, Box, in_one_line, write_coco, write_yolo

FORMS = ("coco", "yolo", "voc")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is thrown away at once."""
    monkeypatch.setattr(os, "sync", lambda: None)


def data(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    capsys.readouterr()
    code = cli.main(["data", *map(str, arguments)])
    return (code, *capsys.readouterr())


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The summary of a command that does what it is asked for."""
    code, output, errors = data(capsys, *arguments, "--json")
    assert (code, errors) == (0, "")
    content = json.loads(output)
    assert isinstance(content, dict)
    return content


def read(root: Path, split: Split, form: str = "auto") -> Index:
    return read_any(DataConfig(path=root, format=form), split)  # type: ignore[arg-type]


def said(index: Index) -> dict[str, list[tuple[str, list[float]]]]:
    """Boxes by image, in an order that formats do not decide."""
    names = index.class_names
    return {
        image.path.name: sorted((names[c], [round(v, 3) for v in box]) for c, box in zip(image.classes, image.boxes.tolist(), strict=True))
        for image in index.images
    }


def rows(summary: dict[str, Any], key: str = "changed") -> dict[str, int]:
    """Counts by kind, of all splits."""
    found: dict[str, int] = {}
    for row in summary[key]:
        found[row["kind"]] = found.get(row["kind"], 0) + row["count"]
    return found


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("to", FORMS)
def test_every_format_becomes_every_other(form: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a training on the new data set learns other things than one on the old."""
    source, output = WRITERS[form](tmp_path / "data"), tmp_path / "out"
    before = tree(tmp_path / "data")
    summary = document(capsys, "convert", source, output, "--to", to)
    for split in ("train", "val"):
        assert said(read(output, split)) == said(read(source, split))
    assert (output / SUMMARY_FILE).read_text() == json.dumps(summary, indent=1) + "\n"
    assert (summary["source_format"], summary["format"]) == (form, to)
    assert [(one["images"], one["boxes"], one["background_images"]) for one in summary["splits"].values()] == [(3, 3, 1), (2, 3, 0)]
    assert [(one["name"], one["boxes"]) for one in summary["classes"]] == [
        ("apple", {"train": 1, "val": 2}),
        ("pear", {"train": 2, "val": 1}),
    ]
    assert tree(tmp_path / "data") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
    assert data(capsys, "check", output, "--output", tmp_path / "check")[0] == 0


@pytest.mark.skipif(not BCCD.exists(), reason="needs ../shared")
def test_photographs_go_round_through_all_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: what holds for drawn squares does not for 3,941 cells in 292 photographs."""
    source = BCCD
    for form in ("yolo", "voc", "coco"):
        document(capsys, "convert", source, tmp_path / form, "--to", form, "--images", "link")
        source = tmp_path / form
    for split in ("train", "val"):
        assert said(read(source, split)) == said(read(BCCD, split, "coco"))


def test_a_test_split_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the images that nobody was to look at before the end stay behind, or come among those of the training."""
    boxes: dict[str, list[list[Box]]] = {**BOXES, "test": [[(1, 3, 3, 33, 44)]]}
    write_coco(tmp_path / "data", boxes)
    source = tmp_path / "data"
    for form in ("yolo", "voc", "coco"):
        summary = document(capsys, "convert", source, tmp_path / form, "--to", form)
        assert [(split, one["images"]) for split, one in summary["splits"].items()] == [("train", 3), ("val", 2), ("test", 1)]
        assert rows(summary, "wrong") == {}, "neither's images are held against the other"
        source = tmp_path / form
        assert said(read(source, "test")) == {"0.png": [("pear", [3.0, 3.0, 33.0, 44.0])]}
    summary = document(capsys, "convert", source, tmp_path / "two", "--to", "yolo", "--splits", "test", "val")
    assert list(summary["splits"]) == ["val", "test"]
    code, _, errors = data(capsys, "convert", tmp_path / "two", tmp_path / "x", "--to", "coco", "--splits", "train")
    assert code == 2 and "there is no split train, but val, test" in errors


def make_voc_without_splits(root: Path) -> Path:
    write_voc = WRITERS["voc"]
    write_voc(root / "both")
    for kind, suffix in (("Annotations", "xml"), ("JPEGImages", "png")):
        (root / kind).mkdir()
        for path in (root / "both").rglob(f"train/*.{suffix}"):
            path.rename(root / kind / path.name)
    shutil.rmtree(root / "both")
    return root


def make_coco_without_splits(root: Path) -> Path:
    write_coco(root, {"train": BOXES["train"]})
    (root / "annotations" / "train.json").rename(root / "labels.json")
    (root / "images" / "train").rename(root / "images" / "x")
    for path in (root / "images" / "x").iterdir():
        path.rename(root / "images" / path.name)
    (root / "images" / "x").rmdir()
    (root / "annotations").rmdir()
    (root / "other.json").write_text("{}")
    return root


def make_yolo_without_splits(root: Path) -> Path:
    write_yolo(root)
    (root / "data.yaml").write_text("names: [apple, pear]\n")
    shutil.rmtree(root / "images" / "val")
    shutil.rmtree(root / "labels" / "val")
    return root


@pytest.mark.parametrize("make", [make_coco_without_splits, make_yolo_without_splits, make_voc_without_splits])
def test_a_data_set_without_splits_is_found(make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: who has pictures and labels, and no splits yet, has to write a program first."""
    summary = document(capsys, "convert", make(tmp_path / "data"), tmp_path / "out", "--to", "coco")
    assert {split: one["images"] for split, one in summary["splits"].items()} == {"train": 3}
    assert said(read(tmp_path / "out", "train"))["0.png"] == [("apple", [10, 10, 50, 60]), ("pear", [60, 20, 110, 70])]


def test_places_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a data set in two folders that nobody else has called so cannot be read."""
    root = make_coco_without_splits(tmp_path / "data")
    (root / "other.json").write_text((root / "labels.json").read_text())
    code, _, errors = data(capsys, "convert", root, tmp_path / "out", "--to", "yolo")
    assert code == 2 and "several files could be meant (labels.json, other.json)" in errors
    (root / "images").rename(root / "photos")
    where = ("--annotations", "labels.json", "--image-folder", "photos")
    assert document(capsys, "convert", root, tmp_path / "out", "--to", "yolo", *where)["splits"]["train"]["boxes"] == 3


def test_what_no_index_has_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: masks, marks and licences that somebody has paid for are gone, and it is noticed months later."""
    root = write_coco(tmp_path / "coco")
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["info"], content["images"][0]["license"] = {"year": 2020}, 3
    content["annotations"][0] |= {"segmentation": [[1, 2, 3, 4, 5, 6]], "iscrowd": 1, "color\x1b[2J": "red"}
    content["annotations"][1] |= {"segmentation": [], "area": 7}
    path.write_text(json.dumps(content))
    summary = document(capsys, "convert", root, tmp_path / "1", "--to", "yolo")
    assert rows(summary) == {
        **{"`segmentation` of an annotation": 1, "`color\x1b[2J` of an annotation": 1, "`license` of an image": 1, "`info` of the json": 1},
        **{"crowd region": 1, "area that is not that of the box": 1, "class id": 2, "image id": 5},
    }
    assert summary["splits"]["train"]["boxes"] == 2
    _, output, _ = data(capsys, "convert", root, tmp_path / "2", "--to", "voc")
    assert "\x1b" not in output and "color\\x1b[2J" in output
    yolo = write_yolo(tmp_path / "yolo")
    labels = tmp_path / "yolo" / "labels" / "train" / "0.txt"
    labels.write_text("0 .1 .1 .5 .1 .5 .5 .1 .5\n1 .5 .5 .1 .1\n")
    assert rows(document(capsys, "convert", yolo, tmp_path / "3", "--to", "coco")) == {"outline of an object": 1}
    voc = WRITERS["voc"](tmp_path / "voc")
    xml = tmp_path / "voc" / "train" / "0.xml"
    xml.write_text(xml.read_text().replace("<name>apple", "<pose>Left</pose><truncated>0</truncated><difficult>1</difficult><name>apple"))
    assert rows(document(capsys, "convert", voc, tmp_path / "4", "--to", "coco")) == {
        "`pose` of an object": 1,
        "`difficult` of an object": 1,
    }


def test_classes_get_other_names_become_one_or_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: three data sets that name classes differently cannot be compared, or a class that is not wanted is learned."""
    boxes: dict[str, list[list[Box]]] = {
        "train": [[(0, 1, 1, 21, 21), (1, 30, 30, 60, 60), (2, 5, 5, 50, 50), (3, 40, 1, 60, 9)]],
        "val": [[(2, 5, 5, 50, 50)]],
    }
    root = write_coco(tmp_path / "data", boxes, ["car", "bus", "dog", "cat"])
    more = ("--to", "yolo", "--map", "car=vehicle", "bus=vehicle", "--map", "dog=-")
    summary = document(capsys, "convert", root, tmp_path / "1", *more)
    assert read(tmp_path / "1", "train").class_names == ["vehicle", "cat"]
    assert said(read(tmp_path / "1", "train"))["0.png"] == [
        ("cat", [40, 1, 60, 9]),
        ("vehicle", [1, 1, 21, 21]),
        ("vehicle", [30, 30, 60, 60]),
    ]
    assert {key: count for key, count in rows(summary).items() if key.startswith("box of")} == {
        "box of the class car": 1,
        "box of the class bus": 1,
        "box of the class dog": 2,
    }
    assert said(read(tmp_path / "1", "val")) == {"0.png": []}, "an image whose boxes go is a background image"
    file = tmp_path / "classes.yaml"
    file.write_text('cat: tiger\n"*": "-"\nlorry: truck\n')
    summary = document(capsys, "convert", root, tmp_path / "2", "--to", "coco", "--classes", file)
    assert [(one.id, one.name) for one in read(tmp_path / "2", "train").categories] == [(3, "tiger")]
    assert rows(summary)["entry of the class map for a class that is not there"] == 2
    for wrong, sentence in (
        (["--map", "lorry=truck"], "has no class 'lorry', but car, bus, dog, cat"),
        (["--map", "car"], "--map car: write OLD=NEW"),
        (["--map", "car=a", "car=b"], "car is mapped to a as well"),
        (["--map", "*=a"], "can only be left out"),
        (["--map", "*=-"], "no class of"),
    ):
        code, _, errors = data(capsys, "convert", root, tmp_path / "3", "--to", "coco", *wrong)
        assert code == 2 and sentence in errors and not (tmp_path / "3").exists()


def test_names_that_a_format_cannot_have_are_changed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: two images share their labels, or a hidden one is passed over, only because of what they are called."""
    root = write_coco(tmp_path / "data")
    folder = root / "images" / "train"
    names = ["cam 1/1.png", "cam 1/1.jpg", ".hidden/no suffix"]
    content = json.loads((root / "annotations" / "train.json").read_text())
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{number}.png").rename(folder / name)
        content["images"][number]["file_name"] = name
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    expected = sorted(said(read(root, "train")).values())
    for to, renamed in (("coco", 1), ("yolo", 2), ("voc", 2)):
        summary = document(capsys, "convert", root, tmp_path / to, "--to", to)
        new = read(tmp_path / to, "train")
        assert sorted(said(new).values()) == expected
        told = rows(summary)
        assert told["image whose name not every reader takes"] == 1
        assert told.get("image with the name of another", 0) == renamed - 1
        assert {"_hidden/no suffix.png"} == {"/".join(image.path.parts[-2:]) for image in new.images} - {
            "cam 1/1.png",
            "cam 1/1.jpg",
            "cam 1/1_2.jpg",
        }


@pytest.mark.parametrize("how", ["copy", "link", "hardlink", "none"])
def test_images_are_copied_or_linked_or_left(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a disk is full of copies that nobody needs, or a data set is gone with another one that it leads to."""
    root = write_coco(tmp_path / "data")
    document(capsys, "convert", root, tmp_path / "out", "--to", "yolo", "--images", how)
    old, new = root / "images" / "train" / "0.png", tmp_path / "out" / "images" / "train" / "0.png"
    assert new.exists() == (how != "none")
    if how != "none":
        assert new.is_symlink() == (how == "link")
        assert new.samefile(old) == (how != "copy") and new.read_bytes() == old.read_bytes()
    assert (tmp_path / "out" / "labels" / "train" / "0.txt").exists()


def test_what_is_there_is_replaced_only_if_it_is_ours_and_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: somebody's folder is gone because its name was given by mistake."""
    root, output = write_coco(tmp_path / "data"), tmp_path / "out"
    more = (root, output, "--to", "yolo")
    output.mkdir()
    (output / "thesis.tex").write_text("all")
    for flag, sentence in (((), "is there already"), (("--overwrite",), "has not been written by this command")):
        code, _, errors = data(capsys, "convert", *more, *flag)
        assert code == 2 and sentence in errors and (output / "thesis.tex").read_text() == "all"
    (output / "thesis.tex").unlink()
    document(capsys, "convert", *more, "--overwrite")
    assert data(capsys, "convert", *more)[0] == 2
    document(capsys, "convert", root, output, "--to", "voc", "--overwrite")
    assert (output / "JPEGImages").exists() and not (output / "data.yaml").exists()
    link = tmp_path / "link"
    link.symlink_to(output)
    assert data(capsys, "convert", root, link, "--to", "voc", "--overwrite")[0] == 2 and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "link", "out"]


def test_nothing_is_written_where_it_is_read_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the next reading finds the copies among the images, or the source is replaced by what is made of it."""
    root = write_coco(tmp_path / "deep" / "data")
    document(capsys, "convert", root, tmp_path / "ours" / "first", "--to", "yolo", "--images", "link")
    description = tmp_path / "far.yaml"
    description.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [apple, pear]\n")
    before = tree(root)
    for source, output in (
        (root, root / "images" / "new"),
        (root, tmp_path / "deep"),
        (root, root),
        (description, root / "images" / "train" / "new"),
    ):
        code, _, errors = data(capsys, "convert", source, output, "--to", "voc", "--overwrite")
        assert code == 2 and ("lies in" in errors or "has not been written" in errors)
    assert tree(root) == before


def test_what_links_into_the_output_is_not_taken_away_from_under_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the only copy of the images, because the data set that is converted back holds links to them."""
    document(capsys, "convert", write_coco(tmp_path / "data"), tmp_path / "first", "--to", "coco")
    document(capsys, "convert", tmp_path / "first", tmp_path / "second", "--to", "yolo", "--images", "link")
    before = tree(tmp_path / "first")
    code, _, errors = data(capsys, "convert", tmp_path / "second", tmp_path / "first", "--to", "voc", "--images", "link", "--overwrite")
    assert code == 2 and "is a link into" in errors and tree(tmp_path / "first") == before


def test_of_two_conversions_the_first_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: what another command has written under the same name meanwhile, which nobody allowed to be replaced."""
    root, output = write_coco(tmp_path / "data"), tmp_path / "out"

    def others_are_faster(*given: Any) -> None:
        place_images(*given)
        output.mkdir(exist_ok=True)
        (output / "thesis.tex").write_text("all")

    monkeypatch.setattr(conversion, "place_images", others_are_faster)
    for flags, sentence in (((), "is there by now"), (("--overwrite",), "has not been written by this command")):
        code, _, errors = data(capsys, "convert", root, output, "--to", "yolo", *flags)
        assert code == 2 and sentence in errors and tree(output) == {"thesis.tex": b"all"}
        shutil.rmtree(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("output", [".", "..", "new/.."])
def test_an_output_needs_a_name(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback, or a folder that is moved away from under the shell that stands in it."""
    root, here = write_coco(tmp_path / "data"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code, _, errors = data(capsys, "convert", root, output, "--to", "yolo", "--overwrite")
    assert code == 2 and "by its own name" in errors and not list(here.iterdir())


@pytest.mark.parametrize(
    "name", ["a: b", "- #x", "null", "\x85nel", "\u2028line", "<b>&amp;", "\\", "\"'", "\u540d", "\ufeffmark", "~", "0x1f"]
)
@pytest.mark.parametrize("to", ["coco", "yolo"])
def test_names_of_classes_come_back_to_the_letter(to: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a class that YAML reads as another one, and a network whose classes are those of no data set."""
    root = write_coco(tmp_path / "data")
    for path in root.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = name
        path.write_text(json.dumps(content))
    document(capsys, "convert", root, tmp_path / "new", "--to", to)
    assert read(tmp_path / "new", "train").class_names == read(root, "train").class_names


def broken_off(how: Callable[[], object]) -> Callable[..., None]:
    def place_images(*_given: object) -> None:
        how()

    return place_images


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_the_disk() -> None:
    raise OSError(28, "No space left on device", "/data/1.jpg")


@pytest.mark.parametrize(
    ("how", "code", "words"), [(interrupt, 130, "interrupted"), (fill_the_disk, 2, "/data/1.jpg: No space left on device")]
)
@pytest.mark.parametrize("is_new", [True, False])
def test_what_is_broken_off_leaves_nothing(
    how: Callable[[], object],
    code: int,
    words: str,
    is_new: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss: half a data set that is trained on, or a whole one that is gone for one that never came to be."""
    root, output = write_coco(tmp_path / "data"), tmp_path / "out"
    if not is_new:
        document(capsys, "convert", root, output, "--to", "voc")
    before = tree(output)
    monkeypatch.setattr(conversion, "place_images", broken_off(how))
    found, _, errors = data(capsys, "convert", root, output, "--to", "yolo", "--overwrite")
    assert found == code and words in errors and "Traceback" not in errors
    assert tree(output) == before and output.exists() != is_new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"] + ["out"] * (not is_new)


def test_what_was_there_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: between two renames the disk fails, and neither data set has a name."""
    root, output = write_coco(tmp_path / "data"), tmp_path / "out"
    document(capsys, "convert", root, output, "--to", "voc")
    before, rename = tree(output), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if "~new~" in path.name:
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    code, _, errors = data(capsys, "convert", root, output, "--to", "yolo", "--overwrite")
    assert code == 2 and "Input/output error" in errors
    assert tree(output) == before and sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


@pytest.mark.parametrize("to", FORMS)
def test_boxes_that_become_the_same_are_written_once_and_told(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a box is counted twice, or its reader finds fault with what was just written."""
    boxes: dict[str, list[list[Box]]] = {"train": [[(0, -10, 10, 50, 60), (0, -20, 10, 50, 60), (1, -20, 10, 50, 60)]], "val": BOXES["val"]}
    root = write_coco(tmp_path / "data", boxes)
    summary = document(capsys, "convert", root, tmp_path / "out", "--to", to)
    assert rows(summary)["box that is the same as another once it is clipped, or reduced to its bounding box"] == 1
    new = read(tmp_path / "out", "train")
    assert said(new)["0.png"] == [("apple", [0, 10, 50, 60]), ("pear", [0, 10, 50, 60])] and new.problems == ()


def test_a_killed_conversion_leaves_nothing_under_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: as above, where nobody could clean up any more; the next one says what is left."""
    root, output = write_coco(tmp_path / "data"), tmp_path / "out"

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conversion, "place_images", broken_off(lambda: os.kill(os.getpid(), signal.SIGKILL)))
            cli.main(["data", "convert", str(root), str(output), "--to", "yolo"])

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path != root]
    assert len(left) == 1 and left[0].name.startswith(".out~new~") and (left[0] / "data.yaml").exists()
    code, _, errors = data(capsys, "convert", root, output, "--to", "yolo")
    assert code == 0 and str(left[0]) in errors and left[0].exists()


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: after a power cut a data set whose files hold zeros."""
    root, output = write_coco(tmp_path / "data"), tmp_path / "out"
    seen: list[bool] = []

    def sync() -> None:
        (temp,) = tmp_path.glob(".out~new~*")
        seen.append((temp / SUMMARY_FILE).exists() and (temp / "images" / "val" / "1.png").exists() and not output.exists())

    monkeypatch.setattr(os, "sync", sync)
    assert cli.main(["data", "convert", str(root), str(output), "--to", "yolo"]) == 0
    assert seen == [True]


def test_boxes_of_the_stored_pixels_turn_where_no_size_can_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an image that EXIF turns is read upright from YOLO, and its boxes lie beside what they are of."""
    root = write_coco(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (root / "images").rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    assert {image.orientation for image in read(root, "train").images} == {1}, "told as stored"
    summary = document(capsys, "convert", root, tmp_path / "yolo", "--to", "yolo")
    assert rows(summary)["image whose boxes refer to the pixels as stored"] == 5
    assert said(read(tmp_path / "yolo", "train"))["1.png"] == [("pear", [80 - 25, 5, 80 - 5, 25])]
    document(capsys, "convert", root, tmp_path / "voc", "--to", "voc")
    assert said(read(tmp_path / "voc", "train")) == said(read(root, "train"))


def test_what_voc_cannot_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a data set is written that its own reader does not take, or reads with other classes."""
    root = write_coco(tmp_path / "data", names=["apple", " pear\x1b"])
    code, _, errors = data(capsys, "convert", root, tmp_path / "out", "--to", "voc")
    assert code == 2 and "cannot hold the class name ' pear\\x1b'" in errors
    empty = write_coco(tmp_path / "empty", {"train": [[]], "val": [[]]})
    code, _, errors = data(capsys, "convert", empty, tmp_path / "out", "--to", "voc")
    assert code == 2 and "there is no box" in errors
    assert data(capsys, "convert", empty, tmp_path / "out", "--to", "yolo")[0] == 0


def test_splits_with_different_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: class 1 of train is another than class 1 of test, where a format has one list for both."""
    root = write_coco(tmp_path / "data", {**BOXES, "test": BOXES["val"]})
    path = root / "annotations" / "test.json"
    path.write_text(path.read_text().replace("pear", "plum"))
    code, _, errors = data(capsys, "convert", root, tmp_path / "out", "--to", "yolo")
    assert code == 2 and "only in train: 1 'pear'; only in test: 1 'plum'" in errors


@pytest.mark.parametrize("command", ["convert", "split"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a dozen flags, and nobody knows which ones go together."""
    with pytest.raises(SystemExit):
        cli.main(["data", command, "--help"])
    text = capsys.readouterr().out
    assert "examples:\n" in text and len(re.findall(rf"^  gai-yolo data {command} ", text, re.MULTILINE)) >= 4
    assert "%%" not in in_one_line(text)
