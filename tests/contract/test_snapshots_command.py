"""`gai-yolo snapshots`, checkpoints that nobody vouches for, and going on in the middle of an epoch."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_train import main
from gai_yolo.cli import main as cli
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.manifest import Manifest, Position, encode
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_folder import RunFolder
from tests.harness import REPOSITORY, small
from tests.runs import metrics, scalar_steps, state_digest

Start = Callable[..., tuple[int, str, str]]
STEPS = 12
SETTINGS = (
    f"training.max_batches_per_epoch={STEPS}",
    "training.batch_size=4",
    "evaluation.interval=2",
    "snapshots.interval_steps=1",
    "snapshots.keep=3",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run of two epochs with a snapshot after every step, as far as the writer keeps up."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([*small(folder, cache, *SETTINGS), "--config", str(REPOSITORY / "configs" / "config.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def start(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Starts the job on the copy; returns exit code, output and errors."""
    monkeypatch.chdir(REPOSITORY)

    def start_(*values: str) -> tuple[int, str, str]:
        code = main(small(tmp_path, cache, *SETTINGS, *values))
        return (code, *capsys.readouterr())

    return start_


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Runs `gai-yolo snapshots ...`; returns exit code, output and errors."""
    capsys.readouterr()
    code = cli.main(["snapshots", *map(str, arguments)])
    return (code, *capsys.readouterr())


def rows_of(output: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(output)}


# --- the command -----------------------------------------------------------------------------------------------------------


def test_ls_shows_position_size_age_and_what_retention_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: nobody can tell what there is to go on from."""
    code, out, _ = command(capsys, "ls", run)
    assert code == 0
    line = next(line for line in out.splitlines() if "epoch_002.pt" in line)
    assert re.search(rf"epoch_002\.pt +2 +{2 * STEPS} +\d\.\d +\d+ (s|min) +\d\.\d{{4}} +present +the last complete one", line), line
    code, out, _ = command(capsys, "ls", run, "--json")
    row = rows_of(out)["checkpoints/epoch_002.pt"]
    assert (code, row["step"], row["samples"], row["state"]) == (0, 2 * STEPS, 8 * STEPS, "present")
    assert row["size"] == (run / "checkpoints" / "epoch_002.pt").stat().st_size and 0 <= row["age_seconds"] < 3600


def test_verify_reads_every_byte_and_says_what_is_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a backup that was believed to be good."""
    code, out, _ = command(capsys, "verify", run, "--json")
    assert code == 0 and {row["state"] for row in rows_of(out).values()} == {"complete"}
    path = run / "checkpoints" / "epoch_001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (run / "checkpoints" / "epoch_007.pt").write_bytes(b"?")
    code, out, _ = command(capsys, "verify", run, "--json")
    rows = rows_of(out)
    assert code == 1
    assert rows["checkpoints/epoch_001.pt"]["state"] == "bad" and "SHA-256" in rows["checkpoints/epoch_001.pt"]["note"]
    assert rows["checkpoints/epoch_007.pt"]["state"] == "bad" and "no manifest" in rows["checkpoints/epoch_007.pt"]["note"]
    assert rows["checkpoints/epoch_002.pt"]["state"] == "complete"
    code, out, _ = command(capsys, "verify", run)
    assert code == 1 and "its SHA-256 is not the one in its manifest" in " ".join(out.split())


def test_prune_follows_the_runs_configuration_and_dry_run_only_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a command that frees more room than was meant."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("keep_epochs: all", "keep_epochs: 1"))
    before = {path.name for path in (run / "checkpoints").iterdir()}
    code, out, _ = command(capsys, "prune", run, "--dry-run", "--json")
    assert code == 0 and rows_of(out)["checkpoints/epoch_001.pt"]["state"] == "would be removed"
    assert {path.name for path in (run / "checkpoints").iterdir()} == before
    code, out, _ = command(capsys, "prune", run, "--json")
    assert code == 0 and rows_of(out)["checkpoints/epoch_001.pt"]["state"] == "removed"
    assert {path.name for path in (run / "checkpoints").iterdir()} == before - {"epoch_001.pt", "epoch_001.json"}
    assert command(capsys, "prune", run)[1] == "nothing to remove\n"


def test_rollback_goes_on_from_an_older_state_and_deletes_nothing(
    run: Path, finished: Path, cache: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: who goes back by hand deletes a night's work, or is brought forward again by what a node's memory holds."""
    record = RunFolder(run).record()
    assert record is not None
    memory = NodeMemory(cache, run)
    memory.open()
    memory.keep(record)
    for name in ("epoch_002.pt", "epoch_002.json"):
        shutil.copy(run / "checkpoints" / name, memory.path / "checkpoints")
    memory.release()
    before = {path.name: path.read_bytes() for path in run.glob("*/*.pt") if path.name != "best.pt"}
    code, out, _ = command(capsys, "rollback", run, "--to", "epoch:1", "--json")
    rows = json.loads(out)
    newer = {name for name in before if name == "epoch_002.pt" or (name.startswith("step") and int(name[5:13]) > STEPS)}
    assert code == 0 and rows[0]["name"] == "checkpoints/epoch_001.pt"
    assert {Path(row["name"]).name for row in rows[1:]} == newer
    (aside,) = (run / "aside").iterdir()
    moved = {path.name: path.read_bytes() for path in aside.glob("*/*.pt") if path.name != "best.pt"}
    assert moved == {name: before[name] for name in newer}
    assert not newer & {path.name for path in run.glob("*/*.pt")}
    assert [row["epoch"] for row in metrics(run)] == [1]
    assert (run / "checkpoints" / "best.pt").exists() == (metrics(run)[0]["mAP50-95"] is not None)
    code, out, _ = start()
    assert code == 0 and f"going on from {run / 'checkpoints' / 'epoch_001.pt'} (epoch 1, step {STEPS})" in out
    assert "a person has gone back" in out and "epoch 2/2" in out
    assert state_digest(run / "checkpoints" / "epoch_002.pt") == state_digest(finished / "checkpoints" / "epoch_002.pt")
    assert len(list((run / "aside").glob("*/checkpoints/epoch_002.pt"))) == 2, "of the disk and of the memory"


def test_rollback_counts_although_the_disk_has_no_room_for_what_follows_from_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: newer states are moved aside, but nodes' memories are not outdated, and the next start brings them back."""
    rename = FileSystem.rename

    def full(self: FileSystem, source: Path, target: Path) -> None:
        if source.name == "best.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        rename(self, source, target)

    monkeypatch.setattr(FileSystem, "rename", full)
    code, _, err = command(capsys, "rollback", run, "--to", "epoch:1")
    assert code == 0 and "best.pt: cannot be brought up to date (No space left on device)" in err
    record = RunFolder(run).record()
    assert record is not None and record.rollbacks == 1 and not (run / "checkpoints" / "epoch_002.pt").exists()


def test_rollback_moves_nothing_it_cannot_go_back_from(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: a typo, a damaged checkpoint or a job that runs, and the newest state is away."""
    monkeypatch.setattr("gai_yolo.store.run_folder.FOLDER_LOCK_PATIENCE", 0.1)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for where, said in (
        ("3", "write epoch:3, or step:120"),
        ("epoch:7", r"at epoch 7; there are: epoch:2, epoch:1"),
        ("epoch:0", "--fresh"),
    ):
        code, out, err = command(capsys, "rollback", run, "--to", where)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and re.search(said, err), err
    folder = RunFolder(run)
    folder.lock()
    code, _, err = command(capsys, "rollback", run, "--to", "epoch:1")
    folder.release()
    assert code == 2 and f"process {os.getpid()}" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    path = run / "checkpoints" / "epoch_001.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, _, err = command(capsys, "rollback", run, "--to", "epoch:1")
    assert code == 2 and "SHA-256" in err and (run / "checkpoints" / "epoch_002.pt").exists()


def test_epochs_that_were_moved_away_by_hand_come_back_with_a_word(run: Path, cache: Path, start: Start) -> None:
    """Loss: somebody goes back by hand, the run goes on from a node's memory, and nothing says so."""
    record = RunFolder(run).record()
    assert record is not None
    memory = NodeMemory(cache, run)
    memory.open()
    memory.keep(record)
    for path in [*run.glob("snapshots/*"), *run.glob("checkpoints/epoch_*")]:
        shutil.move(path, memory.path / path.parent.name)
    memory.release()
    code, out, _ = start()
    assert code == 0 and "more than an epoch ahead of the newest state on a disk (none)" in out
    assert f"gai-yolo snapshots rollback {run} --to epoch:N" in out


@pytest.mark.parametrize("name", ["ls", "verify", "prune", "adopt", "rollback"])
def test_what_is_not_a_run_folder_is_refused_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback for a mistyped path; or an empty table that looks like a lost run."""
    for folder in (tmp_path / "missing", tmp_path):
        code, out, err = command(capsys, name, folder, *(["--to", "epoch:1"] if name == "rollback" else []))
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and str(folder) in err


# --- checkpoints without a manifest ----------------------------------------------------------------------------------------


def test_checkpoint_without_manifest_is_not_trusted_until_it_is_adopted(
    run: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: half a copy is gone on from; or the only copy there is cannot be used, and is overwritten."""
    path = run / "checkpoints" / "epoch_002.pt"
    content = path.read_bytes()
    for one in (run / "checkpoints").glob("*.json"):
        if one.name.startswith("epoch_"):
            one.unlink()
    shutil.rmtree(run / "snapshots")
    code, out, _ = command(capsys, "adopt", run, "--json")
    assert code == 0 and {row["state"] for row in rows_of(out).values()} == {"adopted"}
    assert path.read_bytes() == content
    assert command(capsys, "verify", run)[0] == 0
    code, out, _ = start("training.epochs=3")
    assert code == 0 and f"going on from {path} (epoch 2, step {2 * STEPS})" in out

    path.with_suffix(".json").unlink()
    for number in (1, 3):
        (run / "checkpoints" / f"epoch_00{number}.json").unlink()
    shutil.rmtree(run / "snapshots")
    code, out, _ = start("training.epochs=3")
    assert code == 0
    assert "has no manifest and is not trusted" in out and f"gai-yolo snapshots adopt {run}" in out
    assert "NO COMPLETE CHECKPOINT IS LEFT" in out and "training starts at epoch 1" in out
    assert (run / "checkpoints" / "epoch_002.pt.aside-1").read_bytes() == content, "what was there is not overwritten"


class Touch:
    """An object whose pickle runs code when it is loaded, in Python or by way of a module that torch blocks outright."""

    def __init__(self, victim: Path, by_system: bool) -> None:
        self.victim, self.by_system = victim, by_system

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.victim}'",)) if self.by_system else (Path.touch, (self.victim,))


def _malicious(path: Path, victim: Path, by_system: bool) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "extra": Touch(victim, by_system)}, path)


@pytest.mark.parametrize("by_system", [False, True])
def test_checkpoint_that_carries_code_is_refused_and_does_not_run(
    by_system: bool, run: Path, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a downloaded checkpoint runs somebody's program with the rights of the user."""
    path, victim = run / "checkpoints" / "epoch_002.pt", tmp_path / "victim"
    _malicious(path, victim, by_system)
    files = {one: one.read_bytes() for one in run.rglob("*.pt")}

    path.with_suffix(".json").unlink()
    code, out, err = command(capsys, "adopt", run)
    assert code == 2 and len(err.splitlines()) == 1 and "could run code" in err and "adopted" not in out

    _vouch_for_epoch_2(run)
    assert command(capsys, "verify", run)[0] == 0, "its digest is right"
    code, _, err = start("training.epochs=3")
    assert code == 2 and len(err.splitlines()) == 1 and str(path) in err and "could run code" in err

    code, _, err = start("training.epochs=3", "experiment.name=other", f"model.weights={path}")
    assert code == 2 and "could run code" in err
    assert not victim.exists()
    assert {one: one.read_bytes() for one in run.rglob("*.pt")} == files, "nothing is lost or overwritten"
    torch.load(path, weights_only=False)
    assert victim.exists(), "the file was dangerous indeed"


def _vouch_for_epoch_2(run: Path) -> None:
    """What an attacker would do: a manifest with the right digest."""
    folder = RunFolder(run)
    folder.lock()
    folder.store.adopt(Manifest("epoch", Position(2 * STEPS, 2, 8 * STEPS), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z"))
    folder.release()


@pytest.mark.parametrize("case", ["renamed", "not finite", "parts missing", "no tensors", "bare pickle", "flipped"])
def test_what_is_no_checkpoint_is_not_adopted(case: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: adopting turns any file into something that training goes on from."""
    path = run / "checkpoints" / "epoch_002.pt"
    path.with_suffix(".json").unlink()
    content = torch.load(path, weights_only=True)
    if case == "renamed":
        path = path.rename(path.with_name("epoch_005.pt"))
    elif case == "not finite":
        next(iter(content["model_state_dict"].values()))[0] = float("nan")
        torch.save(content, path)
    elif case == "parts missing":
        del content["optimizer_state_dict"]
        torch.save(content, path)
    elif case == "no tensors":
        torch.save({**content, "ema_state_dict": {"w": [1, 2]}}, path)
    elif case == "bare pickle":
        path.write_bytes(pickle.dumps({"epoch": 2}))
    else:
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    before = path.read_bytes()
    code, out, err = command(capsys, "adopt", run, "--json")
    assert code == 2 and len(err.splitlines()) == 1 and str(path) in err
    assert {row["state"] for row in rows_of(out).values()} == {"bad"}
    assert path.read_bytes() == before and not path.with_suffix(".json").exists()


# --- going on --------------------------------------------------------------------------------------------------------------


def test_run_goes_on_in_the_middle_of_an_epoch_and_leaves_no_trace(run: Path, finished: Path, start: Start) -> None:
    """Loss: an epoch of hours is trained again; or samples of it are trained twice or not at all."""
    catalogue = Catalogue(run)
    middle = next(one for one in catalogue.listing().present if one.kind == "step" and one.position.step % STEPS)
    for one in catalogue.listing().present:
        if one.position > middle.position:
            catalogue.data_path(one).unlink()
            catalogue.manifest_path(one).unlink()
    epochs, done = middle.position.epoch, middle.position.step - middle.position.epoch * STEPS
    assert 0 < done < STEPS
    code, out, _ = start()
    assert code == 0 and f"{middle.stem}.pt (epoch {epochs}, step {middle.position.step})" in out
    assert f"epoch {epochs + 1}/2  step {done}/{STEPS}" not in out and f"epoch {epochs}/2 " not in out
    assert f"epoch {epochs + 1}/2  step {done + 1}/{STEPS}" in out
    assert state_digest(run / "checkpoints" / "epoch_002.pt") == state_digest(finished / "checkpoints" / "epoch_002.pt")
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in metrics(one)] for one in (run, finished)]
    assert timeless[0] == timeless[1]
    steps = scalar_steps(run)
    assert steps == scalar_steps(finished) and steps["Loss/Train_Batch"] == list(range(1, 2 * STEPS + 1))


def test_manifest_that_lies_about_the_position_is_passed_over(run: Path, start: Start) -> None:
    """Loss: a manifest edited by hand makes training repeat or leave out samples."""
    catalogue = Catalogue(run)
    last = catalogue.listing().present[0]
    lying = replace(last, position=replace(last.position, samples=1))
    catalogue.manifest_path(last).write_bytes(encode(lying))
    code, out, _ = start()
    assert code == 0 and "not what its manifest says" in out
    assert "epoch 2/2" in out


def test_too_little_room_is_told_at_the_start_with_the_numbers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: the disk is full after a night, which could have been known in the evening."""
    monkeypatch.setattr(FileSystem, "free_bytes", lambda _self, _folder: 1_000_000)
    code, out, _ = start("training.max_batches_per_epoch=2", "experiment.name=other", "model.size=n")
    assert code == 0
    told = re.search(r"warning: \S+other: the checkpoints to come need about (\d+) MB, and 1 MB are free: make room", out)
    assert told is not None and 8 * 30 < int(told[1]) < 10 * 50, "four snapshots, two epochs, one best, best.pt and its next draft"


def test_trouble_with_best_and_retention_holds_no_checkpoint_up(start: Start, tmp_path: Path) -> None:
    """Loss: a folder named best.pt, or one old file that cannot be removed, and nothing is saved from then on."""
    folder = tmp_path / "other" / "checkpoints"
    (folder / "best.pt").mkdir(parents=True)
    (folder / "epoch_002.json").mkdir()
    code, out, _ = start("training.max_batches_per_epoch=2", "experiment.name=other", "evaluation.interval=1")
    assert code == 0 and "best.pt" in out
    assert out.count("best.pt cannot be renewed") == 1, "told once"
    assert Catalogue(tmp_path / "other").listing().present[0].stem == "epoch_002"
    assert list(folder.glob("epoch_002.json.aside-*")), "what was in the way is kept"


def test_link_to_a_run_folder_is_under_the_same_lock(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: two names for one run, and two jobs on it."""
    link = run.parent / "link"
    link.symlink_to(run)
    folder = RunFolder(link)
    folder.lock()
    code, _, err = command(capsys, "prune", run)
    folder.release()
    assert code == 2 and f"process {os.getpid()}" in err
    assert command(capsys, "prune", link)[0] == 0


def test_writer_does_not_import_from_the_current_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: somebody's random.py beside the data, and no checkpoint is ever written."""
    (tmp_path / "random.py").write_text("raise RuntimeError('foreign code')")
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(REPOSITORY / "configs" / "config.yaml")]
    assert main([*small(tmp_path, cache, "training.epochs=1", "evaluation.interval=9"), *config]) == 0
    assert Catalogue(tmp_path / "run").listing().present[0].stem == "epoch_001"
