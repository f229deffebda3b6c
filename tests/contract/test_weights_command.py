"""`gai-yolo weights`, and where weights come from: from a file to a run, its checkpoints, and what is exported of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gai_yolo.cli.main import main
from gai_yolo.detector import YOLO12
from gai_yolo.detector.weights import METADATA, Origin, Weights, as_safetensors, read_weights
from tests.harness import run, small

ORIGIN = Origin("yolo12n.pt", "0" * 64, "AGPL-3.0")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that began with weights of others, and was continued."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    torch.manual_seed(5)
    weights = Weights(YOLO12("debug", 80).state_dict(), None, ORIGIN)
    (folder / "theirs.safetensors").write_bytes(as_safetensors(weights, {}))
    arguments = small(
        folder, cache, f"model.weights={folder / 'theirs.safetensors'}", "evaluation.interval=1", "snapshots.interval_steps=1"
    )
    done = run("main.py", [*arguments, "--set", "training.epochs=1"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tensors of the class branch start anew" in done.stdout
    assert done.stdout.count("who published yolo12n.pt claims AGPL-3.0 for it; what is made of it may be bound by that") == 1
    (folder / "theirs.safetensors").write_bytes(b"")  # is not looked at any more
    again = run("main.py", arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    return folder / "run"


def test_the_origin_is_in_every_checkpoint_and_manifest(fine_tuned: Path) -> None:
    """Loss: a product on weights whose licence nobody remembers."""
    found = sorted(fine_tuned.glob("*/*.json"))
    manifests = [path for path in found if path.stem.startswith(("epoch_", "step_"))]
    assert len(manifests) >= 3
    for path in manifests:
        assert json.loads(path.read_text())["origin"] == "yolo12n.pt, AGPL-3.0", path
        assert read_weights(path.with_suffix(".pt")).origin == ORIGIN


def test_a_run_is_exported_with_all_that_belongs_to_its_weights(
    fine_tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a file of numbers of which nobody knows what they detect."""
    output = tmp_path / "a.safetensors"
    assert main(["weights", "export", str(fine_tuned), "--checkpoint", "last", "--output", str(output)]) == 0
    assert (
        f"{output}: YOLO12-debug, 4 classes (circle, triangle, square, star)," in (said := capsys.readouterr().out)
        and "note: who published yolo12n.pt" in said
    )
    with safe_open(output, "pt") as file:
        about = json.loads(file.metadata()[METADATA])
    assert about["class_names"] == read_weights(output).class_names and len(about["class_names"]) == 4
    assert about["size"] == "debug" and about["position"] == {"step": 4, "epoch": 2, "samples": 48}
    assert about["config"]["model"]["size"] == "debug" and about["origin"] == vars(ORIGIN)
    content = torch.load(fine_tuned / "checkpoints" / "epoch_002.pt", weights_only=True)
    exported = read_weights(output)
    assert exported.tensors.keys() == content["ema_state_dict"].keys()
    assert all(torch.equal(tensor, content["ema_state_dict"][name]) for name, tensor in exported.tensors.items())
    assert main(["weights", "import", str(output), "--output", str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == output.read_bytes(), "what it says of its training stays with it"
    assert main(["weights", "export", str(fine_tuned), "--checkpoint", "epoch_001", "--output", str(tmp_path / "b.safetensors")]) == 0
    assert main(["weights", "export", str(fine_tuned), "--output", str(tmp_path / "c.safetensors")]) == 0, "the best"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "RUN", "--checkpoint", "epoch_009", "--output", "OUT"], "has no checkpoint epoch_009"),
        (["export", "/nowhere", "--output", "OUT"], "not the folder of a run"),
        (["export", "RUN", "--output", "a.pt"], "ends with .safetensors"),
        (["import", "/nowhere/yolo12n.pt", "--output", "OUT"], "/nowhere/yolo12n.pt: cannot be read"),
        (["import", "RUN", "--output", "OUT"], "cannot be read"),
        (["export", "RUN", "--output", "/nowhere/a.safetensors"], "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    words: list[str], says: str, fine_tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a traceback, or a file that is not what was asked for."""
    output = tmp_path / "out.safetensors"
    given = [{"RUN": str(fine_tuned), "OUT": str(output)}.get(word, word) for word in words]
    assert main(["weights", *given]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and says in errors, errors
    assert not list(tmp_path.iterdir())
