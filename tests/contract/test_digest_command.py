"""`gai-yolo digest`: are two runs equal?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from elastic_train import main
from gai_yolo.cli import main as cli
from tests.harness import REPOSITORY, small


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """Three small runs: two with equal settings, one with another seed."""
    folders = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        folder = tmp_path_factory.mktemp(name)
        values = (f"experiment.seed={seed}", "training.epochs=1")
        assert main(["--config", str(REPOSITORY / "configs" / "config.yaml"), *small(folder, cache, *values)]) == 0
        folders[name] = folder / "run"
    return folders


def digest(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    capsys.readouterr()
    code = cli.main(["digest", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_equal_runs_are_called_equal(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: nobody can check the promise."""
    code, output, errors = digest(capsys, runs["one"], runs["same"])
    assert (code, errors) == (0, "")
    assert output.count(f"{runs['one']}: checkpoints/epoch_001.pt") == 1 and output.endswith("equal, to the last bit\n")
    digests = re.findall(r"^  (\w+) +([0-9a-f]{64})$", output, re.MULTILINE)
    assert [part for part, _ in digests[:6]] == ["weights", "batch_norm", "ema", "optimizer", "metrics", "position"]
    assert digests[:6] == digests[6:]


def test_runs_that_differ_are_told_apart_part_by_part(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: two different runs that are called equal."""
    code, output, _ = digest(capsys, runs["one"], runs["same"], runs["other"])
    assert code == 1
    assert output.endswith("differ in weights, batch_norm, ema, optimizer, metrics, position\n")
    assert output.count("   differs\n") == 18


def test_json_holds_the_same(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a script that compares runs cannot read what a person can."""
    code, output, _ = digest(capsys, runs["one"], runs["other"], "--json")
    found = json.loads(output)
    assert code == 1 and [one["run"] for one in found] == [str(runs["one"]), str(runs["other"])]
    assert found[0]["digests"].keys() == found[1]["digests"].keys()
    assert found[0]["digests"]["weights"] != found[1]["digests"]["weights"]


def test_a_checkpoint_can_be_named(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: only the newest state can be compared."""
    assert digest(capsys, runs["one"], "--checkpoint", "epoch_001")[:2] == digest(capsys, runs["one"])[:2]
    code, output, errors = digest(capsys, runs["one"], "--checkpoint", "epoch_009")
    assert (code, output) == (2, "")
    assert errors == f"error: {runs['one']}: has no checkpoint epoch_009; there are: epoch_001.\n"


def test_what_is_no_run_or_has_nothing_is_refused(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback, or a digest of nothing."""
    code, _, errors = digest(capsys, runs["one"], tmp_path)
    assert code == 2 and errors.startswith(f"error: {tmp_path}: not the folder of a run")
    (tmp_path / "checkpoints").mkdir()
    code, _, errors = digest(capsys, tmp_path)
    assert code == 2 and errors == f"error: {tmp_path}: holds no complete checkpoint.\n"


def test_a_damaged_checkpoint_is_not_digested(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the digest of damaged bytes, taken for that of a run."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in ("epoch_001.pt", "epoch_001.json"):
        (checkpoints / name).write_bytes((runs["one"] / "checkpoints" / name).read_bytes())
    data = bytearray((checkpoints / "epoch_001.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoints / "epoch_001.pt").write_bytes(data)
    code, output, errors = digest(capsys, tmp_path, "--checkpoint", "epoch_001")
    assert (code, output) == (2, "") and "is damaged: its SHA-256 is not the one in its manifest" in errors
    code, output, errors = digest(capsys, tmp_path)
    assert (code, output) == (2, "") and "holds no complete checkpoint" in errors
