"""The cache of a big data set's index is as good as a new look at every file, or is not used."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.data import index_cache
from gai_yolo.data.index import Index
from gai_yolo.data.index_cache import keep, load
from gai_yolo.data.sources import load_index
from gai_yolo.sections import DataConfig

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
    monkeypatch.setattr("gai_yolo.data.check.image_size", lambda path, _: pytest.fail(f"{path} was opened"))
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


def test_a_small_data_set_is_read_as_it_is(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a cache folder full of files that save nothing."""
    monkeypatch.setattr(index_cache, "LEAST_IMAGES", COUNT + 1)
    load_index(config_of(data_set), "train")
    assert caches(data_set) == []
