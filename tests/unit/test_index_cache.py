"""The cache of a big data set's index is as good as a new look at every file, or is not used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.data import index_cache
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.reading import Doubt
from gai_yolo.data.header import UNOPENED
from gai_yolo.data.index import Index, Problem
from gai_yolo.data.index_cache import IndexCache, keep, load
from gai_yolo.data.sources import load_index, load_indexes
from gai_yolo.sections import DataConfig
from tests.harness import REPOSITORY

COUNT = 6


@pytest.fixture(autouse=True)
def small_is_big(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "LEAST_IMAGES", COUNT)


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A COCO folder with a box outside of its image and an image that is missing."""
    root = tmp_path / "data"
    (root / "images" / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in range(COUNT):
        assert cv2.imwrite(str(root / "images" / "train" / f"{number}.jpg"), np.zeros((40, 60, 3), np.uint8))
    images = [{"id": 10 + n, "file_name": f"{n}.jpg", "width": 60, "height": 40} for n in range(COUNT + 1)]
    boxes = [{"id": n, "image_id": 10 + n, "category_id": 7, "bbox": [50, 1, 20 + n, 9], "iscrowd": 0, "area": 5.5} for n in range(4)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "cell"}]}
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    return root


def config_of(data_set: Path, **more: object) -> DataConfig:
    given = {"path": data_set, "cache_folder": data_set.parent / "cache", "max_bad_fraction": 0.5, **more}
    return DataConfig.model_validate(given)


def caches(data_set: Path) -> list[Path]:
    return sorted((data_set.parent / "cache" / "index").glob("*.index"))


def assert_same(one: Index, other: Index) -> None:
    assert (one.source, one.categories, one.problems, one.digest()) == (other.source, other.categories, other.problems, other.digest())
    assert [image.path for image in one.images] == [image.path for image in other.images]
    for a, b in zip(one.images, other.images, strict=True):
        for name in ("boxes", "classes", "crowd", "areas"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y), name


def test_an_index_comes_back_as_it_was(data_set: Path) -> None:
    """Loss: a start from the cache trains on other boxes, or no longer tells what is wrong with the data."""
    index = load_index(config_of(data_set), "train")
    assert len(index) == COUNT and len(index.problems) == 2 and index.recorded is not None
    plain = load_index(config_of(data_set, cache_folder=data_set / "annotations" / "train.json"), "train")
    assert plain.recorded is None
    assert_same(index, plain)
    kept = keep(plain, data_set.parent / "kept.index", time.time_ns())
    assert kept.recorded is not None
    assert_same(kept, plain)
    assert_same(load(data_set.parent / "kept.index"), plain)


def test_no_image_is_opened_a_second_time(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: minutes on network storage, after every crash."""
    first = load_index(config_of(data_set), "train")
    assert len(caches(data_set)) == 1
    monkeypatch.setattr("gai_yolo.data.formats.check.image_size", lambda path, _: pytest.fail(f"{path} was opened"))
    assert_same(load_index(config_of(data_set), "train"), first)


def add_image(root: Path) -> None:
    assert cv2.imwrite(str(root / "images" / "train" / f"{COUNT}.jpg"), np.zeros((40, 60, 3), np.uint8))


def change_annotations(root: Path) -> None:
    path = root / "annotations" / "train.json"
    path.write_text(path.read_text().replace('"cell"', '"nuclei"'))


def same_size(root: Path) -> None:
    path = root / "annotations" / "train.json"
    path.write_text(path.read_text().replace('"cell"', '"bell"'))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def other_picture(root: Path) -> None:
    path = root / "images" / "train" / "0.jpg"
    status = path.stat()
    assert cv2.imwrite(str(path), np.zeros((40, 44, 3), np.uint8))
    os.utime(path, ns=(1, status.st_mtime_ns + 1))


def test_an_image_that_was_replaced_is_looked_at_again(data_set: Path) -> None:
    """Loss: boxes beyond the border of a picture that is smaller now, and for ever, because nothing else has changed."""
    (data_set / "annotations" / "val.json").write_bytes((data_set / "annotations" / "train.json").read_bytes())
    (data_set / "images" / "val").symlink_to("train")
    before, _ = load_indexes(config_of(data_set))
    other_picture(data_set)
    after, val = load_indexes(config_of(data_set))
    assert (before.images[0].width, after.images[0].width, val.images[0].width) == (60, 44, 44)
    assert load_index(config_of(data_set), "train").images[0].width == 44, "the cache is of the new one"
    assert len(caches(data_set)) == 2


def test_an_image_that_changes_while_it_is_read_makes_no_cache(data_set: Path) -> None:
    """Loss: the size of a picture that was replaced in this moment stays that of the old one."""
    os.utime(data_set / "images" / "train" / "3.jpg", ns=(1, time.time_ns() + 10**10))
    load_index(config_of(data_set), "train")
    assert caches(data_set) == []


def test_one_process_of_a_machine_reads_and_the_others_take_what_it_has_read(data_set: Path) -> None:
    """Loss: eight processes of a node open each image eight times."""
    code = f"""
import sys
from gai_yolo.data import index_cache, sources
from gai_yolo.data.formats import check
from gai_yolo.sections import DataConfig
index_cache.LEAST_IMAGES = {COUNT}
opened = []
real = check.image_size
check.image_size = lambda path, doubt: (opened.append(path), real(path, doubt))[1]
config = DataConfig.model_validate(dict(path={str(data_set)!r}, cache_folder={str(data_set.parent / "cache")!r}, max_bad_fraction=0.5))
index = sources.load_index(config, "train")
print(len(opened), index.digest())
"""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(3)]
    said = [process.communicate()[0].split() for process in started]
    assert sorted(int(words[0]) for words in said) == [0, 0, COUNT] and len({words[1] for words in said}) == 1
    assert sorted(path.suffix for path in (data_set.parent / "cache" / "index").iterdir()) == [".index"], "no lock is left"


@pytest.mark.parametrize("change", [add_image, change_annotations, same_size])
def test_whatever_changes_in_the_data_set_is_seen(change: Callable[[Path], None], data_set: Path) -> None:
    """Loss: training goes on with boxes that were corrected long ago."""
    before = load_index(config_of(data_set), "train")
    change(data_set)
    after = load_index(config_of(data_set), "train")
    assert after.digest() != before.digest()
    assert len(caches(data_set)) == 2


def test_another_configuration_has_another_cache(data_set: Path) -> None:
    """Loss: what one configuration puts up with is taken for granted under a stricter one."""
    load_index(config_of(data_set), "train")
    with pytest.raises(ValueError, match="missing"):
        load_index(config_of(data_set, max_bad_fraction=0.01), "train")


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_cache_is_as_good_as_none(kept: float, data_set: Path) -> None:
    """Loss: a torn file ends every start."""
    first = load_index(config_of(data_set), "train")
    (path,) = caches(data_set)
    data = path.read_bytes()
    path.unlink()  # what is mapped stays as it was
    path.write_bytes(data[: int(kept * len(data))])
    assert_same(load_index(config_of(data_set), "train"), first)
    assert_same(load(path), first)


def test_old_caches_go(data_set: Path) -> None:
    """Loss: a home folder that fills up, if the runs are written into the data set's own folder."""
    for number in range(index_cache.MOST_KEPT + 3):
        (data_set / "notes.txt").write_text("x" * number)
        load_index(config_of(data_set), "train")
    assert len(caches(data_set)) == index_cache.MOST_KEPT


def test_a_cache_that_cannot_be_written_is_no_trouble(data_set: Path) -> None:
    """Loss: a full home folder ends the training."""
    (data_set.parent / "cache").write_text("a file")
    assert len(load_index(config_of(data_set), "train")) == COUNT


def test_images_outside_of_the_folder_are_not_cached(data_set: Path) -> None:
    """Loss: images that change where the cache does not look."""
    elsewhere = data_set.parent / "elsewhere"
    (data_set / "images" / "train").rename(elsewhere)
    (data_set / "images" / "train").symlink_to(elsewhere)
    index = load_index(config_of(data_set, train={"images": elsewhere}), "train")
    assert len(index) == COUNT
    before = caches(data_set)
    add_image_to = elsewhere / f"{COUNT}.jpg"
    assert cv2.imwrite(str(add_image_to), np.zeros((40, 60, 3), np.uint8))
    assert len(load_index(config_of(data_set, train={"images": elsewhere}), "train")) == COUNT + 1
    assert len(caches(data_set)) == len(before) + 1, "the folder named in the configuration is looked at too"


def test_what_a_description_leads_to_elsewhere_is_looked_at(tmp_path: Path) -> None:
    """Loss: a list of images, or labels (beside the last `images` of a path, which may be above the data set), corrected since."""
    root, labels, listed = tmp_path / "images" / "set", tmp_path / "labels" / "set" / "train", tmp_path / "list.txt"
    for folder in (root / "train", root / "labels", labels):
        folder.mkdir(parents=True)
    pictures = [root / "train" / f"{number}.jpg" for number in range(COUNT + 1)]
    for picture in pictures:
        assert cv2.imwrite(str(picture), np.zeros((40, 60, 3), np.uint8))
        (labels / f"{picture.stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    listed.write_text("\n".join(map(str, pictures[:COUNT])))
    (root / "data.yaml").write_text(f"train: train\nval: {listed}\nnames: [cell]\n")
    config = config_of(root, cache_folder=tmp_path / "cache")
    train, val = load_index(config, "train"), load_index(config, "val")
    (labels / f"{COUNT}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    listed.write_text("\n".join(map(str, pictures)))
    assert load_index(config, "train").digest() != train.digest()
    assert (len(val), len(load_index(config, "val"))) == (COUNT, COUNT + 1)


@pytest.mark.parametrize("where", ["../sets/cells", "absolute"])
def test_a_yaml_that_lies_apart_from_its_data_set_is_as_good(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a minute at every start of a big data set whose yaml lies with the configurations, as most do; or old labels."""
    root = tmp_path / "sets" / "cells"
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in range(COUNT):
            assert cv2.imwrite(str(root / "images" / split / f"{number}.jpg"), np.zeros((40, 60, 3), np.uint8))
            (root / "labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    description = tmp_path / "configs" / "cells.yaml"
    description.parent.mkdir()
    description.write_text(f"path: {root if where == 'absolute' else where}\ntrain: images/train\nval: images/val\nnames: [cell]\n")
    config = config_of(description, cache_folder=tmp_path / "cache")
    before = load_index(config, "train").digest()
    with monkeypatch.context() as patched:
        patched.setattr("gai_yolo.data.formats.check.image_size", lambda path, _: pytest.fail(f"{path} was opened"))
        assert load_index(config, "train").digest() == before
    (root / "labels" / "train" / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert load_index(config, "train").digest() != before
    (root / "images" / "train" / "0.jpg").unlink()
    assert len(load_index(config, "train")) == COUNT - 1


def test_a_place_that_is_named_from_the_folder_upwards_is_looked_at(data_set: Path) -> None:
    """Loss: `../annotations/train.json` was corrected long ago."""
    split = {"annotations": Path("../../annotations/train.json"), "images": Path()}
    config = config_of(data_set / "images" / "train", cache_folder=data_set.parent / "cache", train=split, format="coco")
    before = load_index(config, "train")
    assert len(caches(data_set)) == 1
    change_annotations(data_set)
    assert load_index(config, "train").digest() != before.digest()


def test_a_link_that_leads_nowhere_any_more_is_a_missing_image(data_set: Path) -> None:
    """Loss: no start ever again, because the names in the folder are as they were."""
    (data_set / "annotations" / "val.json").write_bytes((data_set / "annotations" / "train.json").read_bytes())
    (data_set / "images" / "val").symlink_to("train")
    stored = (data_set / "images" / "train" / "3.jpg").rename(data_set.parent / "stored.jpg")
    (data_set / "images" / "train" / "3.jpg").symlink_to(stored)
    assert len(load_indexes(config_of(data_set))[0]) == COUNT
    stored.unlink()
    assert len(load_indexes(config_of(data_set))[0]) == COUNT - 1


def test_what_cannot_be_kept_is_not_read_by_one_after_the_other(data_set: Path) -> None:
    """Loss: eight processes of a node take eight times as long to begin, where there is no room for a cache."""
    config, folders = config_of(data_set), Folders(Doubt())
    index, begun, together = load_index(config, "train", from_cache=False), threading.Event(), threading.Barrier(2)

    def read() -> Index:
        if begun.is_set():
            together.wait(10.0)
        begun.set()
        time.sleep(0.3)
        return replace(index, problems=(Problem(UNOPENED, 1, "", ""),))

    with ThreadPoolExecutor() as pool:
        first = pool.submit(IndexCache(config).get, "train", read, folders)
        assert begun.wait(10.0)
        others = [pool.submit(IndexCache(config).get, "train", read, folders) for _ in range(2)]
        assert [len(one.result()) for one in (first, *others)] == [COUNT] * 3
    assert caches(data_set) == []


def test_what_killed_processes_leave_goes(data_set: Path) -> None:
    """Loss: a home folder that fills up."""
    folder = data_set.parent / "cache" / "index"
    folder.mkdir(parents=True)
    for name in (".a.index~0-none~0.tmp", "a.lock", ".b.index~0-none~0.tmp", "b.lock", "c.other"):
        (folder / name).touch()
        if name.strip(".")[0] != "b":
            os.utime(folder / name, (1, 1))
    load_index(config_of(data_set), "train")
    assert {path.name for path in folder.iterdir()} - {path.name for path in caches(data_set)} == {
        ".b.index~0-none~0.tmp",
        "b.lock",
        "c.other",
    }


def test_a_small_data_set_is_read_as_it_is(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a cache folder full of files that save nothing."""
    monkeypatch.setattr(index_cache, "LEAST_IMAGES", COUNT + 1)
    load_index(config_of(data_set), "train")
    assert caches(data_set) == []
