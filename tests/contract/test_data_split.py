"""`gai-yolo data split`: which image comes to which split, and that nothing is in two."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data_convert.partition import partition
from tests.contract.test_data_check import Box, write_coco, write_yolo
from tests.contract.test_data_convert import data, document, read, rows, said

ONE_BOX: list[Box] = [(0, 10, 10, 50, 60)]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is thrown away at once."""
    monkeypatch.setattr(os, "sync", lambda: None)


def edit(root: Path, split: str, **of_images: Any) -> None:
    """Give the image records of a json other fields: a list of values for each."""
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    for key, values in of_images.items():
        for record, value in zip(content["images"], values, strict=True):
            record[key] = value
    path.write_text(json.dumps(content))


def parted(root: Path) -> dict[str, list[str]]:
    """Names of the images of each split that there is."""
    return {folder.name: sorted(path.name for path in folder.rglob("*.*")) for folder in sorted((root / "images").iterdir())}


def test_shares_are_as_asked_and_all_images_are_there_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a validation on images that were trained on, or images that nobody uses."""
    root = write_coco(tmp_path / "data", {"train": [ONE_BOX] * 40})
    summary = document(capsys, "split", root, tmp_path / "out", "--val", "0.2", "--test", "0.1", "--images", "link")
    assert {split: (one["images"], one["fraction"]) for split, one in summary["splits"].items()} == {
        "train": (28, 0.7),
        "val": (8, 0.2),
        "test": (4, 0.1),
    }
    assert (summary["format"], summary["seed"]) == ("coco", 0)
    found = parted(tmp_path / "out")
    assert sorted(name for names in found.values() for name in names) == sorted(f"{n}.png" for n in range(40))
    splits: tuple[Split, ...] = ("train", "val", "test")
    everything = {name: boxes for split in splits for name, boxes in said(read(tmp_path / "out", split)).items()}
    assert everything == said(read(root, "train"))
    assert data(capsys, "check", tmp_path / "out", "--output", tmp_path / "check")[0] == 0


def test_the_partition_depends_on_names_and_seed_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: two people with the same data set and the same command compare numbers that are of different images."""
    boxes = {"train": [ONE_BOX] * 20, "val": [ONE_BOX] * 2}
    root = write_coco(tmp_path / "data", boxes)
    edit(root, "train", id=random.Random(1).sample(range(100, 200), 20))
    (tmp_path / "other").mkdir()
    other = write_yolo(tmp_path / "other" / "data").parent
    for number in range(20):
        target = other / "images" / "train" / f"{number}.png"
        target.write_bytes((root / "images" / "train" / f"{number}.png").read_bytes())
    more = ("--val", "0.3", "--splits", "train")
    for name, source, seed in (("1", root, 5), ("2", other, 5), ("3", root, 6)):
        document(capsys, "split", source, tmp_path / name, *more, "--seed", seed)
    assert parted(tmp_path / "1") == parted(tmp_path / "2") != parted(tmp_path / "3")


def test_splits_that_are_there_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: images of one name in two splits become one, or boxes of the wrong one."""
    root = write_coco(tmp_path / "data", {"train": [ONE_BOX] * 6, "val": [[(1, 1, 1, 9, 9)]] * 4})
    summary = document(capsys, "split", root, tmp_path / "out", "--val", "0.5", "--to", "yolo")
    assert [one["images"] for one in summary["splits"].values()] == [5, 5]
    assert rows(summary).keys() <= {"image id", "image with the name of another", "class id"}
    assert sum(one["boxes"]["train"] + one["boxes"]["val"] for one in summary["classes"]) == 10
    found = [boxes for split in ("train", "val") for boxes in said(read(tmp_path / "out", split)).values()]
    assert found.count([("apple", [10, 10, 50, 60])]) == 6 and found.count([("pear", [1, 1, 9, 9])]) == 4


def test_a_group_is_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: neighbouring frames of a video in train and val: a metric that is much too good."""
    root = write_coco(tmp_path / "data", {"train": [ONE_BOX] * 24})
    names = [f"v{n // 4}_{n}.png" for n in range(23)] + ["alone.png"]
    for number, name in enumerate(names):
        (root / "images" / "train" / f"{number}.png").rename(root / "images" / "train" / name)
    edit(root, "train", file_name=names, about=[{"video": n // 4} for n in range(23)] + [{}])
    for how in (["--group", r"^v(\d+)_"], ["--group-by", "about.video"]):
        summary = document(capsys, "split", root, tmp_path / how[0], "--val", "0.3", *how)
        found = parted(tmp_path / how[0])
        videos = {split: {name.split("_")[0] for name in some} for split, some in found.items()}
        assert not videos["train"] & videos["val"] and len(found["val"]) in (7, 8, 9)
        assert rows(summary)["image that is in no group"] == 1
    for wrong, sentence in (
        (["--group", "("], "not a regular expression"),
        (["--group", "v"], "nothing is in parentheses"),
        (["--group", "x(.)"], "no image of"),
        (["--group-by", "nothing"], "no image of"),
        (["--group-by", ""], "no image of"),
        (["--group", "(.)"], "val would get no image (24 images in 2 groups"),
    ):
        code, _, errors = data(capsys, "split", root, tmp_path / "x", "--val", "0.02" if wrong[-1] == "(.)" else "0.2", *wrong)
        assert code == 2 and sentence in errors and not (tmp_path / "x").exists()
    yolo = write_yolo(tmp_path / "yolo")
    code, _, errors = data(capsys, "split", yolo, tmp_path / "x", "--val", "0.2", "--group-by", "video")
    assert code == 2 and "yolo has no fields of images; give --group" in errors


@pytest.mark.parametrize("shares", [("0", "0"), ("1", "0"), ("0.6", "0.4"), ("0.5", "-0.1"), ("nan", "0")])
def test_shares_that_leave_nothing_are_refused(shares: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a data set without training images, found out by the training."""
    code, _, errors = data(capsys, "split", tmp_path, tmp_path / "x", "--val", shares[0], "--test", shares[1])
    assert code == 2 and "give shares between 0 and 1" in errors


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=40),
    val=st.floats(0.1, 0.5),
    test=st.floats(0.1, 0.4),
    seed=st.integers(0, 9),
    shuffled=st.randoms(use_true_random=False),
)
def test_groups_stay_together_whatever_their_order(sizes: list[int], val: float, test: float, seed: int, shuffled: random.Random) -> None:
    """Loss: as above, for any groups; or a share that is far from what was asked for although the groups are small."""
    images = [(f"{group}/{number}", str(group)) for group, size in enumerate(sizes) for number in range(size)]
    shares: dict[Split, float] = {"val": val, "test": test}

    def of(some: list[tuple[str, str]]) -> dict[Split, set[tuple[str, str]]] | str:
        names, groups = [name for name, _ in some], [group for _, group in some]
        try:
            found = partition(names, groups, shares, seed, Problems())
        except ValueError as error:
            return str(error)
        return {split: {some[position] for position in positions} for split, positions in found.items()}

    first = of(images)
    again = list(images)
    shuffled.shuffle(again)
    assert of(again) == first
    if isinstance(first, str):
        assert "would get no image" in first
        return
    assert sorted(one for some in first.values() for one in some) == sorted(images)
    groups = {split: {group for _, group in some} for split, some in first.items()}
    assert not (groups["train"] & groups["val"] | groups["train"] & groups["test"] | groups["val"] & groups["test"])
    for split, share in shares.items():
        assert len(first[split]) <= share * len(images) + max(sizes) / 2
