"""Pictures that were changed between two starts are noticed, and copies of a data set are one data set."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.checkpointing.compatibility import check_continuation, identity_of, judges_anew
from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.config import Config
from gai_yolo.data import content
from gai_yolo.data.content import content_digest, look, part_digests, sample_positions
from gai_yolo.data.index import Records, make_record
from gai_yolo.data.sources import load_indexes
from gai_yolo.errors import CheckpointError
from gai_yolo.sections import DataConfig
from gai_yolo.store.manifest import Manifest, Position
from gai_yolo.store.retention import Policy, best_of, decide


def invert(path: Path) -> None:
    """The picture's negative, of the same size and time where the format allows it."""
    status, image = path.stat(), cv2.imread(str(path))
    assert image is not None and cv2.imwrite(str(path), 255 - image)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """YOLO: eight pictures to train on, four to judge by. BMPs: every picture has the same number of bytes."""
    root = tmp_path / "data"
    for split, count in (("train", 8), ("val", 4)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number in range(count):
            assert cv2.imwrite(str(root / "images" / split / f"{number}.bmp"), np.full((40, 60, 3), 20 * number, np.uint8))
            (root / "labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a]\n")
    return root


def identity(root: Path) -> dict[str, object]:
    """What a start would write down."""
    return identity_of(Config(), load_indexes(DataConfig(path=root, cache_folder=root.parent / "cache")))


def found_with(content: dict[str, object]) -> LoadedCheckpoint:
    manifest = Manifest("epoch", Position(8, 2, 64), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z")
    return LoadedCheckpoint(Path("epoch_002.pt"), {**content, "epoch": 2, "step": 8}, "disk", manifest)


def test_inverted_training_images_are_refused(data: Path) -> None:
    """Loss: half of a training on other pictures, without a word, because names, sizes and boxes are the same."""
    before = identity(data)
    for path in (data / "images" / "train").iterdir():
        invert(path)
    with pytest.raises(CheckpointError, match="other training images than before under the same names"):
        check_continuation(found_with(before), identity(data))


def test_a_copy_on_another_node_is_the_same_data_set(data: Path, tmp_path: Path) -> None:
    """Loss: a node with a copy of its own is refused because of times and folders."""
    shutil.copytree(data, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    assert identity(tmp_path / "elsewhere" / "copy") == identity(data)


@pytest.mark.parametrize("what", ["labels", "pictures"])
def test_another_validation_set_is_told_and_judges_anew(what: str, data: Path) -> None:
    """Loss: the mAP of two validation sets is compared, and an epoch is the best because its test was easier."""
    before = identity(data)
    assert not judges_anew(found_with(before), identity(data))
    if what == "labels":
        (data / "labels" / "val" / "0.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    else:
        invert(data / "images" / "val" / "1.bmp")
    after = identity(data)
    assert judges_anew(found_with(before), after)
    assert any("changed since: the validation set" in note for note in check_continuation(found_with(before), after))


def test_a_checkpoint_of_an_older_version_is_gone_on_from_and_told(data: Path) -> None:
    """Loss: every run of yesterday is refused."""
    now = identity(data)
    old = {key: value for key, value in now.items() if key not in ("data_content", "val_digest")}
    assert not judges_anew(found_with(old), now)
    assert any("not recorded" in note for note in check_continuation(found_with(old), now))


def test_sizes_of_all_and_bytes_of_a_fixed_sample_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: hours of reading at each start of a large data set; or a sample that differs between nodes."""
    monkeypatch.setattr(content, "SAMPLE", 10)
    monkeypatch.setattr(content, "PART", 100)
    paths = [tmp_path / f"{number}.jpg" for number in range(200)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    images = Records.of(make_record(number, path, 8, 8, [], []) for number, path in enumerate(paths))

    def digest() -> str:
        return content_digest(look(images), part_digests(images, sample_positions(images)))

    before = digest()
    noticed = 0
    for record in images:
        whole = record.path.read_bytes()
        record.path.write_bytes(bytes([255]) + whole[1:])
        noticed += digest() != before
        record.path.write_bytes(whole + b"x")
        assert digest() != before, "another size is always noticed"
        record.path.write_bytes(whole)
    assert noticed == 10 and digest() == before


def test_the_best_is_chosen_among_epochs_that_were_judged_alike() -> None:
    """Loss: the best of an easier validation set is kept for ever, and those of the present one are pruned."""
    old = Manifest("epoch", Position(10, 1, 160), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z", 0.9, due=False)
    new = [replace(old, position=Position(10 * epoch, epoch, 160 * epoch), metric=0.1 * epoch) for epoch in (2, 3, 4)]
    assert best_of([old], since=10) == old, "until another one was judged"
    assert best_of([old, *new], since=10) == new[-1] and best_of([old, *new]) == old
    last = replace(old, position=Position(50, 5, 800), metric=0.0)
    kept = [decision.manifest for decision in decide([old, *new, last], Policy(keep_epochs=1, best_since=10)) if decision.keep]
    assert kept == [new[-1], last]
