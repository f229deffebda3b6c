"""Training images that are gone at a later start: the run goes on without them, exactly, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from gai_yolo.cli.main import main as gai_yolo
from tests.harness import run, small
from tests.runs import ledger, state_digest

LAST = "checkpoints/epoch_002.pt"
PICTURES = 24


def write_data(root: Path) -> None:
    """YOLO: noise with a box each, and one picture without."""
    rng = np.random.default_rng(0)
    for split, count in (("train", PICTURES), ("val", 4)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number in range(count):
            picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            assert cv2.imwrite(str(root / "images" / split / f"{number:02d}.png"), picture)
            (root / "labels" / split / f"{number:02d}.txt").write_text(f"{number % 2} 0.5 0.5 0.{number % 5 + 3} 0.4\n" if number else "")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b]\n")


def go(folder: Path, cache: Path, *more: str, processes: int = 1, code: int = 0, options: Sequence[str] = ()) -> str:
    """A start; what it has said."""
    settings = (
        f"data.path={folder / 'data'}",
        "training.max_batches_per_epoch=null",
        "training.batch_size=8",
        "reporting.ledger=true",
        *more,
    )
    done = run("elastic_train.py", [*options, *small(folder, cache, *settings)], processes)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def back_to_the_first_epoch(folder: Path) -> None:
    assert gai_yolo(["snapshots", "rollback", str(folder / "run"), "--to", "epoch:1"]) == 0


def test_a_lost_image_keeps_its_place_and_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a week's run that one broken file of a share ends; or samples that come in another order from here on, without a word."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    said = go(tmp_path, cache)
    assert "is gone since the run began" not in said
    undisturbed, order = state_digest(tmp_path / "run" / LAST), ledger(tmp_path / "run")
    picture = tmp_path / "data" / "images" / "train" / "07.png"
    aside = picture.rename(tmp_path / "07.png")
    digests = []
    for processes in (1, 2):
        back_to_the_first_epoch(tmp_path)
        said = go(tmp_path, cache, processes=processes)
        assert "training image that is gone since the run began: 1, grey is trained on in its place" in said and str(picture) in said
        assert "going on from" in said
        digests.append(state_digest(tmp_path / "run" / LAST))
        assert ledger(tmp_path / "run") == order, "samples are asked for as ever"
    assert digests[0] == digests[1] != undisturbed
    back_to_the_first_epoch(tmp_path)
    aside.rename(picture)
    assert "is gone since" not in go(tmp_path, cache)
    assert state_digest(tmp_path / "run" / LAST) == undisturbed


def test_what_is_more_than_a_few_lost_images_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: half of a run on other data than the other half."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    go(tmp_path, cache, "training.max_batches_per_epoch=1")
    back_to_the_first_epoch(tmp_path)
    images, labels = (tmp_path / "data" / kind / "train" for kind in ("images", "labels"))
    (images / "07.png").rename(tmp_path / "07.png")
    label = labels / "03.txt"
    text = label.read_text()
    label.write_text("1 0.5 0.5 0.9 0.9\n")
    assert "other training images or boxes than before" in go(tmp_path, cache, "training.max_batches_per_epoch=1", code=2)
    label.write_text(text)
    assert "gone since the run began: 1," in go(tmp_path, cache, "training.max_batches_per_epoch=1")
    back_to_the_first_epoch(tmp_path)
    for number in range(10, 13):
        (images / f"{number}.png").unlink()
    assert "other training images or boxes than before" in go(tmp_path, cache, "training.max_batches_per_epoch=1", code=2)
    assert "is gone since" not in go(tmp_path, cache, "training.max_batches_per_epoch=1", options=["--fresh"])
