"""Released checkpoints with a pickled network, and pickles that were made to do harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gai_yolo.cli.main import main
from gai_yolo.detector import YOLO12
from gai_yolo.detector.archive import PARSER_ERRORS
from gai_yolo.detector.foreign import read_foreign
from gai_yolo.detector.weights import load_weights, read_weights
from gai_yolo.errors import CheckpointError

NAMES = {0: "platelet", 1: "red", 2: "white"}
LICENCE = "AGPL-3.0 (https://example.org/license)\nsecond line"


@pytest.fixture
def of_theirs() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Makes a network of classes that nobody has after the test has written it."""
    package = types.ModuleType("ultralytics.nn.tasks")
    kind = type("DetectionModel", (nn.Module,), {"__module__": package.__name__})
    vars(package)["DetectionModel"] = kind
    for name in ("ultralytics", "ultralytics.nn", package.__name__):
        assert name not in sys.modules
        sys.modules[name] = package

    def theirs(module: nn.Module) -> nn.Module:
        made: nn.Module = kind()
        for name, parameter in module._parameters.items():
            made.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            made.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            made.add_module(name, theirs(child) if child is not None else kind())
        return made

    yield theirs
    for name in ("ultralytics", "ultralytics.nn", package.__name__):
        sys.modules.pop(name, None)


def network(seed: int, size: str = "debug", num_classes: int = 3) -> YOLO12:
    torch.manual_seed(seed)
    return YOLO12(size, num_classes)


def released(path: Path, theirs: nn.Module, **more: Any) -> Path:
    """A file like those that are published."""
    vars(theirs).update(names=NAMES, yaml={"nc": 3}, stride=torch.tensor([8.0, 16.0, 32.0]))
    content = {"epoch": -1, "best_fitness": None, "model": theirs, "ema": None, "updates": None, "optimizer": None}
    torch.save({**content, "train_args": {"data": "coco.yaml"}, "date": "2025-01-01", "license": LICENCE, **more}, path)
    for name in [name for name in sys.modules if name.startswith("ultralytics")]:
        del sys.modules[name]
    return path


def test_a_released_checkpoint_is_read_without_its_program(of_theirs: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Loss: what others have trained for days cannot be started from; or their program has to be installed, and runs."""
    source = network(1)
    path = released(tmp_path / "yolo12.pt", of_theirs(source).half())
    before = set(sys.modules)
    found = read_weights(path)
    assert not [name for name in set(sys.modules) - before if not name.startswith("encodings")], "nothing was imported"
    expected = source.state_dict()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor.to(expected[name].dtype), expected[name]) for name, tensor in found.tensors.items())
    assert found.class_names == list(NAMES.values())
    assert found.origin is not None and (found.origin.file, found.origin.licence) == ("yolo12.pt", LICENCE.splitlines()[0])
    model = network(2)
    assert load_weights(model, path) == []
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


def test_of_two_networks_the_average_is_taken(of_theirs: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Loss: a start from weights that are worse than what was published."""
    raw, average = network(1), network(2)
    path = released(tmp_path / "a.pt", of_theirs(raw), ema=of_theirs(average))
    name = "model.0.conv.weight"
    assert torch.equal(read_weights(path).tensors[name], average.state_dict()[name])


def test_it_becomes_a_safetensors_file_that_is_the_same_weights(
    of_theirs: Callable[[nn.Module], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: an import that loses class names, origin or bits."""
    path, output = released(tmp_path / "a.pt", of_theirs(network(1)).half()), tmp_path / "a.safetensors"
    assert main(["weights", "import", str(path), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"{output}: YOLO12-debug, 3 classes" in said and "note: who published a.pt claims AGPL-3.0" in said
    one, other = read_weights(path), read_weights(output)
    assert one.class_names == other.class_names and one.origin == other.origin
    assert one.tensors.keys() == other.tensors.keys()
    assert all(
        torch.equal(tensor, other.tensors[name]) and tensor.dtype == other.tensors[name].dtype for name, tensor in one.tensors.items()
    )
    assert main(["weights", "import", str(path), "--output", str(output)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["weights", "import", str(output), "--output", str(output), "--overwrite"]) == 0


# ------------------------------------------------------------------------------------------------------------------- harm


def named(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls what it names."""
    body = pickle.dumps(arguments, 2)[2:-1]
    return b"c" + f"{module}\n{name}\n".encode() + body + b"R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def harms(marker: str) -> dict[str, bytes]:
    """Values in a pickle's dict, each as its opcodes."""
    code = f"open({marker!r}, 'w')"
    return {
        "a shell": named("posix", "system", f"touch {marker}"),
        "os": named("os", "mkdir", marker),
        "eval": named("builtins", "eval", code),
        "an old name": named("__builtin__", "exec", code),
        "a process": named("subprocess", "Popen", ["touch", marker]),
        "getattr": named("builtins", "getattr", 1, "real"),
        "a function of torch": named("torch.hub", "download_url_to_file", "file:///dev/null", marker),
        "a function of numpy": named("numpy.testing._private.utils", "runstring", code, {}),
        "a function of the program": named("ultralytics.utils.checks", "check_requirements", "nothing"),
        "memory by a size": named("builtins", "bytearray", 1 << 40),
        "memory by a range": b"cbuiltins\nset\n" + named("builtins", "range", 1 << 40) + b"\x85R",
        "memory by the table": b"Nr" + struct.pack("<I", 1 << 31),
        "another unpickler": named("pickle", "loads", pickle.dumps(1)),
        "a code object": named("types", "CodeType"),
        "a path in the archive": b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("../../../etc/passwd")
        + text("cpu")
        + b"K\x01tQ",
        "without end": named("torch._utils", "_rebuild_tensor_v2", 1, 0, (1 << 40,), (0,), False, None),
    }


def with_harm(good: Path, harm: bytes, path: Path) -> Path:
    """A file that is whole, with one more value, which is looked at first."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                begin = b"\x80\x02}q\x00"
                assert data.startswith(begin)
                data = begin + text("more") + harm + b"s" + data[len(begin) :]
            target.writestr(zipfile.ZipInfo(info.filename), data)
    return path


@pytest.mark.parametrize("kind", harms(""))
def test_a_pickle_that_was_made_to_do_harm_does_nothing(
    kind: str, of_theirs: Callable[[nn.Module], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: whoever shares a weight file owns the machines that it is tried on."""
    marker, output = tmp_path / "marker", tmp_path / "out.safetensors"
    good = released(tmp_path / "good.pt", of_theirs(network(1)))
    bad = with_harm(good, harms(str(marker))[kind], tmp_path / "bad.pt")
    before = set(sys.modules)
    assert main(["weights", "import", str(bad), "--output", str(output)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {bad}: ") and errors.count("\n") == 1, errors
    assert not marker.exists() and not output.exists()
    assert not [name for name in set(sys.modules) - before if not name.startswith("encodings")], "nothing was imported"
    with bad.open("rb") as file, pytest.raises((CheckpointError, *PARSER_ERRORS)):  # whatever PyTorch says of it before
        read_foreign(bad, file)
    assert not marker.exists()
    model = network(2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(model, bad)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert main(["weights", "import", str(with_harm(good, b"N", tmp_path / "harmless.pt")), "--output", str(output)]) == 0


def test_what_the_plain_unpickler_would_have_done(tmp_path: Path) -> None:
    """Loss: traps that would not have gone off anyway."""
    marker = tmp_path / "marker"
    for kind in ("a shell", "os", "eval", "an old name", "a process", "a function of numpy"):
        made = pickle.loads(b"\x80\x02" + harms(str(marker))[kind] + b".")
        if kind == "a process":
            made.wait()
        assert marker.exists(), kind
        marker.rmdir() if marker.is_dir() else marker.unlink()


def tried(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, or why there are none."""
    try:
        return read_weights(path).tensors, None
    except CheckpointError as error:
        return {}, str(error)


def test_a_network_that_holds_itself_ends(
    of_theirs: Callable[[nn.Module], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a small file that keeps a machine busy for ever."""
    theirs = of_theirs(network(1))
    theirs._modules["again"] = theirs
    path = released(tmp_path / "a.pt", theirs)
    assert main(["weights", "import", str(path), "--output", str(tmp_path / "a.safetensors")]) == 2
    assert "not the weights of a YOLO12" in capsys.readouterr().err


def test_every_cut_and_every_flipped_byte_of_the_pickle_is_refused_or_harmless(
    of_theirs: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """Loss: a traceback from deep inside for a download that broke off."""
    path = released(tmp_path / "a.pt", of_theirs(nn.Sequential(nn.Linear(2, 2))))
    data = path.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 60)):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
            path.write_bytes(broken)
            found, refused = tried(path)
            assert refused is None or (refused.startswith(f"{path}: ") and "\n" not in refused)
            assert all(isinstance(tensor, Tensor) for tensor in found.values())


def test_bytes_in_memory_of_a_state_are_no_file(tmp_path: Path) -> None:
    """Loss: a traceback for a file of the form before PyTorch 1.6, or of another library."""
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1)}}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    found, refused = tried(tmp_path / "old.pt")
    assert not found and refused is not None and "before 1.6" in refused and "save it anew" in refused
    for content in (b"", b"{}", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "):
        (tmp_path / "a.safetensors").write_bytes(content)
        found, refused = tried(tmp_path / "a.safetensors")
        assert not found and (refused is None or "damaged" in refused)


# ------------------------------------------------------------------------------------------------------------ the real thing

REFERENCE = os.environ.get("GAI_YOLO_REFERENCE_PYTHON")
"""A Python that has the released reference package: `uv venv DIR && uv pip install --python DIR/bin/python ultralytics`."""
WRITE = """
import sys
import torch
from ultralytics import YOLO
torch.manual_seed(0)
size, folder = sys.argv[1:]
made = YOLO(f"yolo12{size}.yaml")
for buffer in made.model.buffers():
    if buffer.is_floating_point() and buffer.dim() == 1:
        buffer.uniform_(0.5, 1.5)
made.save(f"{folder}/released.pt")
network = YOLO(f"{folder}/released.pt").model.float().eval()
images = torch.rand(1, 3, 160, 160)
with torch.no_grad():
    torch.save({"images": images, "raw": network(images)[0]}, f"{folder}/outputs.pt")
"""


@pytest.mark.skipif(REFERENCE is None, reason="GAI_YOLO_REFERENCE_PYTHON names no Python with the reference package")
@pytest.mark.parametrize("size", "nsmlx")
def test_a_checkpoint_of_the_released_package_gives_the_same_outputs(size: str, tmp_path: Path) -> None:
    """Loss: weights that load, and detect something else."""
    assert REFERENCE is not None
    own = {**os.environ, "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "1"}
    subprocess.run([REFERENCE, "-c", WRITE, size, str(tmp_path)], cwd=tmp_path, env=own, check=True, timeout=200, capture_output=True)
    model = YOLO12(size, 80)
    assert load_weights(model, tmp_path / "released.pt") == []
    expected = torch.load(tmp_path / "outputs.pt", weights_only=True)
    with torch.no_grad():
        boxes, scores = model.eval()(expected["images"])
    centre, sides, theirs = expected["raw"][0].T.split((2, 2, 80), dim=1)
    assert (boxes[0] - torch.cat((centre - sides / 2, centre + sides / 2), dim=1)).abs().max() < 1e-4
    assert (scores[0] - theirs).abs().max() < 1e-4
    found = read_weights(tmp_path / "released.pt")
    assert found.origin is not None and str(found.origin.licence).startswith("AGPL-3.0") and found.origin.note
