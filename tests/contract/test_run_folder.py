"""What a run folder promises: continuing, refusing, starting over, finishing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from elastic_train import main
from tests.harness import REPOSITORY, small
from tests.runs import image_tags, metrics, scalar_steps, state_digest


@pytest.fixture
def start(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Starts the job in this process."""
    monkeypatch.chdir(REPOSITORY)
    return Start(tmp_path, cache, capsys)


class Start:
    """The job with small settings; keeps what it printed."""

    def __init__(self, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.cache, self.capsys = folder, cache, capsys
        self.run_folder = folder / "run"
        self.out, self.err = "", ""

    def __call__(self, *values: str, flags: tuple[str, ...] = ()) -> int:
        code = main([*small(self.folder, self.cache, *values), *flags])
        self.out, self.err = self.capsys.readouterr()
        return code


def test_run_leaves_what_the_guide_says(start: Start) -> None:
    """Scripts of users look for these names."""
    assert start("reporting.images=1") == 0
    checkpoints = start.run_folder / "checkpoints"
    files = {"epoch_001.pt", "epoch_001.json", "epoch_002.pt", "epoch_002.json", "best.pt", ".best", "training_metrics.json"}
    assert {path.name for path in checkpoints.iterdir()} == files
    content = torch.load(checkpoints / "epoch_002.pt", weights_only=True)
    assert content.keys() >= {"model_state_dict", "optimizer_state_dict", "epoch", "train_loss", "val_loss", "ema_state_dict"}
    assert (content["epoch"], content["step"], content["samples"]) == (2, 4, 48)
    rows = metrics(start.run_folder)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["train_loss"] == content["train_loss"] and rows[1]["val_loss"] == content["val_loss"]
    assert rows[0].keys() >= {"learning_rate", "mAP50-95", "mAP50", "AR_100", "images_per_second", "train_box", "val_dfl"}
    resolved = yaml.safe_load((start.run_folder / "config.yaml").read_text())
    assert resolved["training"]["micro_batch_size"] == 4 and resolved["augment"]["mosaic"] == 1.0
    assert list((start.run_folder / "predictions").glob("*.jpg"))
    pictures = {"labels.png", "train_batch_1.jpg", "train_batch_2.jpg", "curves.png"}
    pictures |= {"precision_recall.png", "confidence.png", "confusion_matrix.png"}
    assert {path.name for path in (start.run_folder / "pictures").iterdir()} == pictures
    assert {f"Pictures/{Path(name).stem}" for name in pictures} <= set(image_tags(start.run_folder))
    assert scalar_steps(start.run_folder)["Loss/Train_Batch"] == [1, 2, 3, 4]
    assert "AP  IoU 0.50:0.95" in start.out and str(checkpoints) in start.out


def test_pictures_of_the_beginning_are_drawn_once(start: Start) -> None:
    """A start after an interruption must not pay for them again, and no picture may change what is learned."""
    assert start("training.epochs=1", "reporting.images=1") == 0
    pictures = start.run_folder / "pictures"
    before = {path: path.stat().st_mtime_ns for path in pictures.iterdir()}
    assert start("reporting.images=1") == 0
    assert all((pictures / name).stat().st_mtime_ns == before[pictures / name] for name in ("labels.png", "train_batch_1.jpg"))
    assert (pictures / "curves.png").stat().st_mtime_ns > before[pictures / "curves.png"]
    drawn = state_digest(start.run_folder / "checkpoints" / "epoch_001.pt")
    assert start("training.epochs=1", flags=("--fresh",)) == 0
    assert not pictures.exists(), "none were asked for"
    assert state_digest(start.run_folder / "checkpoints" / "epoch_001.pt") == drawn


def test_finished_run_says_so_and_goes_on_when_epochs_are_raised(start: Start) -> None:
    """A restarted finished job must not train again, nor fail."""
    assert start() == 0
    before = (start.run_folder / "checkpoints" / "epoch_002.pt").read_bytes()
    assert start() == 0
    assert "finished: 2 of 2 epochs" in start.out and "epoch 1/2" not in start.out
    assert (start.run_folder / "checkpoints" / "epoch_002.pt").read_bytes() == before
    assert start("training.epochs=3", flags=("--resume",)) == 0
    assert "changed since: training.epochs is 3, was 2" in start.out
    assert "epoch 3/3" in start.out and "epoch 2/3" not in start.out
    assert [row["epoch"] for row in metrics(start.run_folder)] == [1, 2, 3]
    assert scalar_steps(start.run_folder)["Loss/Train_Batch"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("model.size=s", "model.size is 's', was 'debug'"),
        ("data.image_size=96", "data.image_size is 96, was 64"),
        ("training.batch_size=8", "training.batch_size is 8, was 12"),
        ("experiment.seed=1", "experiment.seed is 1, was 0"),
    ],
)
def test_change_that_makes_continuation_wrong_is_refused(value: str, expected: str, start: Start) -> None:
    """Half a run with one setting and half with another is neither."""
    assert start("training.epochs=1") == 0
    files = {path: path.read_bytes() for path in start.run_folder.rglob("*") if path.is_file()}
    assert start(value) == 2
    assert expected in start.err and len(start.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in start.run_folder.rglob("*") if path.is_file()} == files, "nothing is touched"


def test_harmless_changes_are_told_and_accepted(start: Start) -> None:
    """Moving to a machine with more cores must not end a run."""
    assert start("training.epochs=1") == 0
    assert start("data.workers=1", "reporting.log_interval=5") == 0
    assert "changed since: data.workers is 1, was 0" in start.out
    assert "changed since: reporting.log_interval is 5, was 1" in start.out


def test_resume_without_a_checkpoint_warns_and_starts(start: Start) -> None:
    """The first guide promises exactly this."""
    assert start("training.epochs=1", flags=("--resume",)) == 0
    assert "warning: --resume: no complete checkpoint" in start.out
    assert [row["epoch"] for row in metrics(start.run_folder)] == [1]


def test_fresh_moves_the_old_run_aside(start: Start) -> None:
    """Starting over must never delete anything."""
    assert start("training.epochs=1") == 0
    old = {path.relative_to(start.run_folder): path.read_bytes() for path in start.run_folder.rglob("*") if path.is_file()}
    assert start("training.epochs=1", "experiment.seed=5", flags=("--fresh",)) == 0
    aside = [path for path in start.folder.iterdir() if path.name.startswith("run.") and path.is_dir()]
    assert len(aside) == 1
    assert {path.relative_to(aside[0]): path.read_bytes() for path in aside[0].rglob("*") if path.is_file()} == old
    assert str(aside[0]) in start.out


def test_fresh_is_not_repeated_when_torchrun_restarts_the_worker(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restarted worker has the same command line; it would throw away the run that it is to save."""
    monkeypatch.setattr("gai_yolo.job.startup.launch_id", lambda: "job-7")
    assert start("training.epochs=1", flags=("--fresh",)) == 0
    assert start(flags=("--fresh",)) == 0
    assert "(job-7) has started over already" in start.out and "going on from" in start.out
    assert [row["epoch"] for row in metrics(start.run_folder)] == [1, 2]
    monkeypatch.setattr("gai_yolo.job.startup.launch_id", lambda: "job-8")
    assert start("training.epochs=1", flags=("--fresh",)) == 0
    assert "the old run is kept in" in start.out


def test_fresh_touches_nothing_when_the_start_is_refused(start: Start) -> None:
    """A typo beside --fresh must not hide the run that was there."""
    assert start("training.epochs=1") == 0
    assert start("data.path=/nowhere", flags=("--fresh",)) == 2
    assert (start.run_folder / "checkpoints" / "epoch_001.pt").exists()
    assert [path.name for path in start.folder.iterdir() if path.is_dir()] == ["run"]


def test_metrics_that_a_kill_left_behind_are_written_at_the_next_start(start: Start) -> None:
    """A run killed between its last checkpoint and its metrics would lack the last row for ever."""
    assert start("training.epochs=1") == 0
    path = start.run_folder / "checkpoints" / "training_metrics.json"
    before = path.read_text()
    path.write_text("[]")
    assert start("training.epochs=1") == 0
    assert path.read_text() == before


def test_damaged_newest_checkpoint_falls_back_to_the_older_one(start: Start) -> None:
    """A torn file must cost an epoch, not the run."""
    assert start() == 0
    newest = start.run_folder / "checkpoints" / "epoch_002.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert start() == 0
    assert "epoch_002.pt has" in start.out and "bytes" in start.out and "passed over" in start.out
    assert "epoch_001.pt (epoch 1, step 2)" in start.out
    assert [row["epoch"] for row in metrics(start.run_folder)] == [1, 2]
    assert scalar_steps(start.run_folder)["Loss/Train_Batch"] == [1, 2, 3, 4]


def test_checkpoints_every_second_epoch_and_at_the_end(start: Start) -> None:
    """`checkpoint_interval` thins out files; the last epoch is always there, evaluated too."""
    values = ("training.epochs=3", "training.checkpoint_interval=2", "evaluation.interval=2", "training.max_batches_per_epoch=1")
    assert start(*values) == 0
    names = {path.name for path in (start.run_folder / "checkpoints").glob("*.pt")}
    assert names == {"epoch_002.pt", "epoch_003.pt", "best.pt"}
    assert [row["mAP50"] is not None for row in metrics(start.run_folder)] == [False, True, True]


def test_started_from_own_weights_with_other_classes(start: Start, tmp_path: Path) -> None:
    """Fine-tuning keeps everything but the class branch."""
    from gai_yolo.detector import YOLO12

    path = tmp_path / "weights.pt"
    torch.save(YOLO12("debug", num_classes=80).half().state_dict(), path)
    assert start("training.epochs=1", f"model.weights={path}") == 0
    assert "tensors of the class branch start anew" in start.out
