"""Which checkpoint a run goes on from."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gai_yolo.errors import CheckpointError
from gai_yolo.training.snapshots import Snapshots, newest
from gai_yolo.training.state import FORMAT

IDENTITY = {"config": {"training": {"epochs": 7}}, "class_names": ["a"], "data_digest": "d"}


def state(epoch: int) -> dict[str, Any]:
    """A captured state in small."""
    weights = {"w": torch.full((500,), float(epoch)), "n": torch.tensor(epoch)}
    return {"format": FORMAT, "epoch": epoch, "step": 10 * epoch, "model_state_dict": weights, "history": [{"epoch": 1, "loss": None}]}


def saved(folder: Path, *epochs: int) -> list[Path]:
    snapshots = Snapshots(folder, 1, 10, IDENTITY)
    paths = [snapshots.save_epoch(state(epoch)) for epoch in epochs]
    assert None not in paths
    return [path for path in paths if path is not None]


def find(folder: Path) -> tuple[int | None, list[str]]:
    """Epoch of what is found, and what is told."""
    told: list[str] = []
    found = newest(folder, told.append)
    if found is None:
        return None, told
    epoch = found.content["epoch"]
    assert torch.equal(found.content["model_state_dict"]["w"], state(epoch)["model_state_dict"]["w"])
    return epoch, told


# --- writing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"), [(1, 4, [1, 2, 3, 4]), (3, 7, [3, 6, 7]), (2, 4, [2, 4]), (10, 3, [3]), (5, 1, [1])]
)
def test_checkpoints_come_at_the_interval_and_after_the_last_epoch(interval: int, epochs: int, expected: list[int], tmp_path: Path) -> None:
    """Loss: the result of the last epochs is thrown away because they do not fill an interval."""
    snapshots = Snapshots(tmp_path, interval, epochs, IDENTITY)
    written = [snapshots.save_epoch(state(epoch)) for epoch in range(1, epochs + 1)]
    assert [path.name for path in written if path] == [f"epoch_{epoch:03d}.pt" for epoch in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch_{epoch:03d}.pt" for epoch in expected]


def test_a_checkpoint_holds_the_state_and_whose_it_is(tmp_path: Path) -> None:
    """Loss: a checkpoint that cannot be told from one of another run."""
    (path,) = saved(tmp_path, 5)
    best = Snapshots(tmp_path, 100, 100, IDENTITY).save_best(state(6))
    assert best == tmp_path / "best.pt", "whatever the interval"
    for file, epoch in ((path, 5), (best, 6)):
        content = torch.load(file, weights_only=True)
        weights, expected = content.pop("model_state_dict"), state(epoch)
        assert torch.equal(weights["w"], expected.pop("model_state_dict")["w"])
        assert content == {**expected, **IDENTITY}


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from gai_yolo.errors import CheckpointError
from gai_yolo.training.snapshots import Snapshots
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing beyond it fails like a full disk
try:
    Snapshots(Path(sys.argv[1]), 1, 3, {}).save_epoch({"epoch": 2, "w": torch.zeros(1_000_000)})
except CheckpointError as error:
    print("refused:", error)
"""


def test_full_disk_is_refused_in_one_sentence_and_keeps_what_is_there(tmp_path: Path) -> None:
    """Loss: a traceback from inside torch in place of `make room and start again`."""
    (old,) = saved(tmp_path, 1)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert list(tmp_path.iterdir()) == [old]
    assert find(tmp_path) == (1, [])
    assert done.stdout.startswith("refused:"), done.stderr[-300:]
    assert "epoch_002.pt" in done.stdout


# --- finding ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_was_written(tmp_path: Path) -> None:
    """Loss: the first start of a run fails for want of a second."""
    assert find(tmp_path) == (None, [])
    assert find(tmp_path / "missing") == (None, [])


def test_the_highest_epoch_is_found_whatever_names_and_clocks_say(tmp_path: Path) -> None:
    """Loss: epoch 1000 sorts before 999, or a copied folder's dates bring back an old state."""
    paths = saved(tmp_path, 2, 1000, 10, 999)
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1e9 + age, 1e9 + age))
    assert find(tmp_path) == (1000, [])


@pytest.mark.parametrize(
    "name",
    ["epoch_9.pt", "epoch_abc.pt", "epoch_009.pt.tmp", ".epoch_009.pt.x.tmp", "epoch_009 (copy).pt", "best.pt", "last.pt", "xepoch_009.pt"],
)
def test_other_names_are_nobodys_checkpoints(name: str, tmp_path: Path) -> None:
    """Loss: somebody's copy, a temporary file or the best epoch is taken for the newest."""
    saved(tmp_path, 3)
    torch.save(state(9), tmp_path / name)
    assert find(tmp_path) == (3, [])


def truncated(part: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(len(whole) * part)]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda whole: whole[:1],
    "a tenth": truncated(0.1),
    "half": truncated(0.5),
    "without the end": lambda whole: whole[:-1],
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "all zeros": lambda whole: bytes(len(whole)),
    "a text": lambda _: b"<html>404</html>",
    "random": lambda _: random.Random(6).randbytes(5000),
    "a list": lambda _: pickle.dumps([1, 2, 3], protocol=2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    """Loss: one torn file, and the run cannot be continued at all; or it goes on from garbage."""
    _, _, good, bad = saved(tmp_path, 1, 2, 3, 4)
    content = DAMAGES[damage](bad.read_bytes())
    bad.write_bytes(content)
    epoch, told = find(tmp_path)
    assert epoch == 3
    assert len(told) == 1 and str(bad) in told[0] and "left in place" in told[0]
    assert bad.read_bytes() == content and good.exists(), "somebody may still mend or examine it"


def test_no_garbage_whatsoever_ends_the_search(tmp_path: Path) -> None:
    """Loss: the one pattern of bytes that the parser trips over stops a run that has good checkpoints."""
    _, bad = saved(tmp_path, 3, 4)
    plain = bytearray(pickle.dumps({"a": [1, 2.0, "x", None, b"y"], "b": (1, {2: 3})}, protocol=2))
    rng = random.Random(0)
    for _ in range(300):
        mutated = bytearray(plain)
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        for content in (rng.randbytes(rng.randrange(1, 200)), bytes(mutated)):
            bad.write_bytes(content)
            with contextlib.suppress(CheckpointError):  # a readable dictionary of another program is refused, not passed over
                assert find(tmp_path)[0] == 3


def test_flipped_bits_in_the_weights_are_noticed(tmp_path: Path) -> None:
    """Loss: a bad disk or memory changes a weight to 1e30, and the run goes on from it."""
    _, bad = saved(tmp_path, 3, 4)
    whole = bad.read_bytes()
    data = torch.full((500,), 4.0).numpy().tobytes()
    assert whole.count(data) == 1
    for offset in (0, 777, 1999):
        content = bytearray(whole)
        content[whole.index(data) + offset] ^= 0x40
        bad.write_bytes(bytes(content))
        assert find(tmp_path)[0] == 3


def test_every_damaged_file_is_told_and_nothing_is_found_if_all_are(tmp_path: Path) -> None:
    """Loss: the run starts over without a word about the checkpoints it had."""
    paths = saved(tmp_path, 1, 2)
    for path in paths:
        path.write_bytes(b"")
    (tmp_path / "epoch_003.pt").mkdir()
    epoch, told = find(tmp_path)
    assert epoch is None
    assert [name in message for name, message in zip(("epoch_003", "epoch_002", "epoch_001"), told, strict=True)] == [True] * 3


def test_file_that_was_renamed_is_passed_over(tmp_path: Path) -> None:
    """Loss: an old checkpoint copied over a newer name repeats or skips epochs unnoticed."""
    (path,) = saved(tmp_path, 3)
    path.rename(tmp_path / "epoch_008.pt")
    saved(tmp_path, 2)
    epoch, told = find(tmp_path)
    assert epoch == 2
    assert len(told) == 1 and "epoch_008.pt" in told[0] and "epoch 3" in told[0]


@pytest.mark.parametrize(
    "content", [{**state(4), "format": FORMAT + 1}, {**state(4), "format": "2"}, {"epoch": 4}, state(4)["model_state_dict"]]
)
def test_checkpoint_of_another_version_is_refused_not_passed_over(content: dict[str, Any], tmp_path: Path) -> None:
    """Loss: an older program silently goes back to its own last epoch and overwrites the work of a newer one."""
    saved(tmp_path, 3)
    torch.save(content, tmp_path / "epoch_004.pt")
    with pytest.raises(CheckpointError, match=r"epoch_004\.pt.*--fresh"):
        find(tmp_path)


class Touch:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.victim,))


def pickled(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("writer", [torch.save, pickled])
def test_checkpoint_that_carries_code_is_passed_over_and_does_not_run(writer: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """Loss: a downloaded checkpoint runs somebody's program with the rights of the user."""
    saved(tmp_path, 3)
    victim, path = tmp_path / "victim", tmp_path / "epoch_004.pt"
    writer({**state(4), "extra": Touch(victim)} if writer is torch.save else {"epoch": 4, "extra": Touch(victim)}, path)
    epoch, told = find(tmp_path)
    assert not victim.exists()
    assert epoch == 3
    assert len(told) == 1 and str(path) in told[0]
    assert writer is not torch.save or "could run code" in told[0]
    if writer is torch.save:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert victim.exists(), "the file was dangerous indeed"
