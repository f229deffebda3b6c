"""Which images are taken for lost, and what is not asked of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.config import Config
from gai_yolo.data.images import check_decodable
from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_indexes
from gai_yolo.distributed.world import World
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job.startup import Options, read_data
from gai_yolo.membership.lost_images import remember_training_set
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notices
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.context import JobContext

FOLDERS = "abcd"


@pytest.fixture
def context(tmp_path: Path, world: World) -> Iterator[JobContext]:
    notices = Notices(CloudWatch("none"))
    (tmp_path / "run").mkdir()
    watchdog = Watchdog(notices, Limits(), lambda *_: None)
    yield JobContext(world, RunFolder(tmp_path / "run"), NullConsole(), notices, watchdog, Recorder(0.0))
    notices.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """YOLO: folders with images of the same names, sizes and numbers of bytes, without boxes but for one."""
    root = tmp_path / "data"
    for value, folder in enumerate(FOLDERS):
        (root / "images" / folder).mkdir(parents=True)
        for name in ("0", "1"):
            assert cv2.imwrite(str(root / "images" / folder / f"{name}.bmp"), np.full((8, 8, 3), 2 * value + int(name), np.uint8))
    (root / "labels" / "d").mkdir(parents=True)
    (root / "labels" / "d" / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [cell]\n")
    return root


def config_of(data: Path) -> Config:
    given = {"path": data, "cache_folder": data.parent / "cache", "max_bad_fraction": 0.3}
    return Config.model_validate({"data": given})


def remembered(data: Path, context: JobContext) -> Index:
    index, _ = load_indexes(config_of(data).data)
    remember_training_set(index, context)
    return index


@pytest.mark.parametrize("is_moved", [False, True])
@pytest.mark.parametrize("names", [["a/1", "b/0"], ["a/0"], ["a/0", "a/1"], ["c/1"]])
def test_of_images_of_one_name_the_right_one_is_lost(names: Sequence[str], is_moved: bool, data: Path, context: JobContext) -> None:
    """Loss: the run ends, or trains on one picture in the place of another."""
    before = remembered(data, context)
    for name in names:
        (data / "images" / f"{name}.bmp").unlink()
    root = data.rename(data.with_name("moved")) if is_moved else data
    index, _ = read_data(config_of(root), Options(), context)
    assert {str(before.images[position].path.relative_to(data / "images").with_suffix("")) for position in index.lost} == set(names)
    assert (index.digest(), index.content) == (before.digest(), before.content)
    for position, (was, now) in enumerate(zip(before.images, index.images, strict=True)):
        assert position in index.lost or now.path == root / was.path.relative_to(data)


def test_nobody_waits_for_a_lost_image_before_the_first_step(data: Path, context: JobContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a run that was killed before its first checkpoint begins never again: what is gone is waited for, at each start."""
    monkeypatch.setattr("gai_yolo.data.formats.reading.PATIENCE", 0.1)
    remembered(data, context)
    (data / "images" / "a" / "0.bmp").unlink()
    index, _ = read_data(config_of(data), Options(), context)
    assert len(index.lost) == 1
    check_decodable(index, 8, 0.0)


def test_a_start_over_that_is_started_again_goes_on_without_lost_images(
    data: Path, context: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: `--fresh` is in the command of all later starts of the job, too, and any lost image ends it."""
    remembered(data, context)
    (data / "images" / "a" / "0.bmp").unlink()
    assert not read_data(config_of(data), Options(fresh=True), context)[0].lost, "what the old run had is nothing to the new one"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    context.folder.mark_started_over("job")
    assert len(read_data(config_of(data), Options(fresh=True), context)[0].lost) == 1


def test_what_was_put_in_the_place_of_a_lost_image_is_refused(data: Path, context: JobContext) -> None:
    """Loss: half of a run on another picture."""
    before = remembered(data, context)
    (data / "images" / "a" / "0.bmp").unlink()
    shutil.copy(data / "images" / "b" / "0.bmp", data / "images" / "a" / "1.bmp")
    assert read_data(config_of(data), Options(), context)[0].content != before.content
