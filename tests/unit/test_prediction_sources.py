"""Which files a command line means, what is written about them is called, and where it goes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from gai_yolo.errors import Refusal
from gai_yolo.predict.output import new_folder
from gai_yolo.predict.sources import PREDICTION_FILE, find_sources


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the oddities of folders; it is the current one."""
    names = ["b.jpg", "a.PNG", "a.jpg", "notes.txt", ".hidden.jpg", "clip.mp4", "x.jpg/a.jpg", "x.png", "deep/er/a.jpg", ".git/a.jpg", "0"]
    for name in (*names, f"done/{PREDICTION_FILE}", "done/images/a.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_searched_to_the_bottom_in_the_order_of_names(tree: Path) -> None:
    """Loss: pictures in folders below left out, a link that leads up followed for ever, earlier results looked at again."""
    found = find_sources(["in"])
    paths = [str(item.path) for item in found.items]
    assert paths == ["in/a.PNG", "in/a.jpg", "in/b.jpg", "in/clip.mp4", "in/gone.jpg", "in/x.png", "in/deep/er/a.jpg", "in/x.jpg/a.jpg"]
    assert found.problems == [] and [item.path.name for item in found.items if item.is_video] == ["clip.mp4"]
    assert tree.is_dir()


def test_no_two_outputs_have_the_same_name_on_any_disk(tree: Path) -> None:
    """Loss: of two pictures with one name in two folders only one is drawn."""
    (tree / "other").mkdir()
    (tree / "other" / "A.jpg").write_bytes(b"x")
    (tree / "other" / ("long" * 60 + ".jpg")).write_bytes(b"x")
    found = find_sources(["in", "other", "in/deep/er/a.jpg", "other/A.jpg", str(tree / "in" / "a.jpg")])
    names = [item.output for item in found.items]
    assert len(found.items) == 10, "each file once, however it is named"
    assert len({name.casefold() for name in names}) == 10
    assert {"a", "a_jpg", "A_2", "b", "clip", "deep/er/a", "x", "x_jpg/a"} <= set(names)
    assert max(len(os.fsencode(name)) for name in names) <= 130


def test_patterns_lists_and_cameras_are_known(tree: Path) -> None:
    """Loss: a shell that has not unfolded a pattern; ten thousand names that are too long for a command line."""
    matched = [str(item.path) for item in find_sources(["in/[ab].jpg", "in/**/er/a.*"]).items]
    assert matched == ["in/a.jpg", "in/b.jpg", "in/deep/er/a.jpg"]
    lines = find_sources(["-"], io.BytesIO(b"in/b.jpg\r\nin/a.jpg\n\nin/deep/er\n")).items
    assert [str(item.path) for item in lines] == ["in/b.jpg", "in/a.jpg", "in/deep/er/a.jpg"]
    (tree / "in" / "new\nline.jpg").write_bytes(b"x")
    listed = find_sources(["-"], io.BytesIO(b"in/new\nline.jpg\0in/b.jpg\0")).items
    assert [item.path.name for item in listed] == ["new\nline.jpg", "b.jpg"]
    camera, file = find_sources(["1", "in/0"]).items
    assert camera.is_camera and camera.output == "camera_1" and not file.is_camera
    with pytest.raises(Refusal, match="holds an image"):
        find_sources(["-"], io.BytesIO(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"))


def test_words_that_lead_to_nothing_are_told(tree: Path) -> None:
    """Loss: a typing error, and a result that looks complete."""
    (tree / "empty").mkdir()
    found = find_sources(["nothing.jpg", "in/*.tif", "empty", "in/b.jpg"])
    assert [str(item.path) for item in found.items] == ["in/b.jpg"]
    assert [problem.split(":")[0] for problem in found.problems] == ["nothing.jpg", "in/*.tif", "empty"]


def test_each_command_has_a_folder_of_its_own(tree: Path) -> None:
    """Loss: the results of yesterday."""
    assert new_folder(None, "run", False) == Path("predictions/run/1")
    (tree / "predictions" / "run" / "7").mkdir()
    assert new_folder(None, "run", False) == Path("predictions/run/8")
    assert new_folder(tree / "a" / "b", "run", False).is_dir()
    assert new_folder(tree / "a" / "b", "run", False).is_dir(), "an empty one is as good as none"
    (tree / "a" / "b" / "c").write_text("mine")
    with pytest.raises(Refusal, match="not empty"):
        new_folder(tree / "a" / "b", "run", False)
    assert new_folder(tree / "a" / "b", "run", True).is_dir() and (tree / "a" / "b" / "c").read_text() == "mine"
    with pytest.raises(Refusal, match="is a file"):
        new_folder(tree / "a" / "b" / "c", "run", True)
