"""Which checkpoint a run goes on from, and which ones it writes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import pickle
import random
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor

from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.checkpointing.manager import CheckpointManager
from gai_yolo.checkpointing.recovery import newest
from gai_yolo.checkpointing.schedule import bytes_to_come
from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT, TrainingState
from gai_yolo.checkpointing.tier import DiskTier
from gai_yolo.checkpointing.writer_process import Answer, serve
from gai_yolo.checkpointing.writer_start import START_CODE
from gai_yolo.config import Config, fingerprint
from gai_yolo.errors import CheckpointError
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import MANIFEST_FORMAT, Kind, Manifest, Position, decode, encode
from gai_yolo.store.retention import Policy
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.store import Store

MakeState = Callable[..., TrainingState]
STEPS = 10
"""Of an epoch."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, empty."""
    folder = RunFolder(tmp_path / "run")
    folder.make()
    return folder.path


def state(epoch: int, step: int | None = None) -> dict[str, Any]:
    """A captured state in small, after an epoch or after a step of the next one."""
    step = STEPS * epoch if step is None else step
    weights = {"w": torch.full((500,), float(step)), "n": torch.tensor(epoch)}
    position = {"epoch": epoch, "step": step, "samples": 8 * step}
    return {"format": CHECKPOINT_FORMAT, **position, "model_state_dict": weights, "history": [{"epoch": 1, "loss": None}]}


def store_of(run: Path, fs: FileSystem | None = None) -> Store:
    """With the right to publish, until it is called again."""
    return Store(run, raise_fence(run.parent / f".{run.name}.fence"), fs or FileSystem())


def manifest_of(content: dict[str, Any], kind: Kind = "epoch", metric: float | None = None) -> Manifest:
    position = Position(content["step"], content["epoch"], content["samples"])
    return Manifest(kind, position, 0, "", 0, "f" * 16, torch.__version__, "2026-01-01T00:00:00Z", metric)


def published(run: Path, content: dict[str, Any], kind: Kind = "epoch") -> Path:
    """As the writer does it; returns the data file."""
    store = store_of(run)
    manifest, notes = store.publish(manifest_of(content, kind), lambda file: torch.save(content, file))
    assert notes == []
    return store.data_path(manifest)


def saved(run: Path, *epochs: int) -> list[Path]:
    return [published(run, state(epoch)) for epoch in epochs]


def forged(run: Path, data: bytes, content: dict[str, Any], kind: Kind = "epoch") -> Path:
    """Any bytes, with a manifest that fits them and says that they are `content`."""
    manifest = dataclasses.replace(manifest_of(content, kind), size=len(data), sha256=hashlib.sha256(data).hexdigest())
    path = Catalogue(run).data_path(manifest)
    path.write_bytes(data)
    path.with_suffix(".json").write_bytes(encode(manifest))
    return path


def find(run: Path, fs: FileSystem | None = None) -> tuple[int | None, list[str]]:
    """Step of what is found, and what is told."""
    found, told = newest(Catalogue(run, fs or FileSystem()))
    if found is None:
        return None, told
    content = found.content
    expected = state(content["epoch"], content["step"])
    assert torch.equal(content["model_state_dict"]["w"], expected["model_state_dict"]["w"])
    assert found.path.stem in (f"epoch_{content['epoch']:03d}", f"step_{content['step']:08d}")
    assert found.path.exists()
    return content["step"], told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- finding ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_was_written(run: Path) -> None:
    """Loss: the first start of a run fails for want of a second."""
    assert find(run) == (None, [])
    assert find(run / "missing") == (None, [])


def test_the_highest_epoch_is_found_whatever_names_and_clocks_say(run: Path) -> None:
    """Loss: epoch 1000 sorts before 999, or a copied folder's dates bring back an old state."""
    paths = saved(run, 2, 1000, 10, 999)
    for age, path in enumerate(reversed(paths)):
        for file in (path, path.with_suffix(".json")):
            os.utime(file, (1e9 + age, 1e9 + age))
    assert find(run) == (10_000, [])
    published(run, state(1000, 123_456_789), "step")
    published(run, state(1000, 99_999_999), "step")
    assert find(run) == (123_456_789, [])


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ([(3, 31)], "snapshots/step_00000031.pt"),
        ([(3, 39), (3, 35), (2, 25)], "snapshots/step_00000039.pt"),
        ([(2, 29), (1, 15)], "checkpoints/epoch_003.pt"),
        ([(2, 30)], "checkpoints/epoch_003.pt"),
    ],
)
def test_the_furthest_of_snapshots_and_epochs_wins(snapshots: list[tuple[int, int]], expected: str, run: Path) -> None:
    """Loss: half an epoch trained again; or an evaluation done twice, because the snapshot before it was taken for newer."""
    for epoch, step in snapshots:
        published(run, state(epoch, step), "step")
    saved(run, 3, 1)
    found, passed_over = newest(Catalogue(run))
    assert found is not None and found.path == run / expected and passed_over == []


def test_damaged_snapshot_falls_back_to_what_is_left_of_either_kind(run: Path) -> None:
    """Loss: one torn snapshot, and training goes back further than it has to."""
    saved(run, 2, 3)
    for epoch, number in ((2, 25), (3, 33), (3, 36)):
        published(run, state(epoch, number), "step")
    steps: list[int | None] = []
    for name in ("snapshots/step_00000036.pt", "snapshots/step_00000033.pt", "checkpoints/epoch_003.pt", "snapshots/step_00000025.pt"):
        flip(run / name, 1000)
        step, told = find(run)
        assert any(name in sentence for sentence in told)
        steps.append(step)
    assert steps == [33, 30, 25, 20]


@pytest.mark.parametrize(
    "name",
    [
        *("epoch_9.pt", "epoch_abc.pt", "epoch_009.pt.tmp", ".epoch_009.pt.x.tmp", ".epoch_009.pt~1-ab~cd.tmp", "epoch_009 (copy).pt"),
        *("best.pt", "last.pt", "xepoch_009.pt", "epoch_009.pt.aside-1", "step_00000090.pt", "../snapshots/epoch_009.pt"),
        *("../snapshots/step_90.pt", "../epoch_009.pt"),
    ],
)
def test_other_names_are_nobodys_checkpoints(name: str, run: Path) -> None:
    """Loss: somebody's copy, a temporary file or the best epoch is taken for the newest."""
    saved(run, 3)
    made = forged(run, b"", state(9))
    manifest = made.with_suffix(".json").read_bytes()
    made.unlink()
    made.with_suffix(".json").unlink()
    torch.save(state(9), run / "checkpoints" / name)
    (run / "checkpoints" / name).with_suffix(".json").write_bytes(manifest)
    assert find(run) == (30, [])


def test_file_without_a_manifest_is_not_trusted_and_told_what_to_do(run: Path) -> None:
    """Loss: a half-written file of an old version or a bad copy is believed; or a good one is passed over without a word."""
    (path,) = saved(run, 3)
    bare = path.with_name("epoch_004.pt")
    torch.save(state(4), bare)
    step, told = find(run)
    assert step == 30
    (sentence,) = told
    assert str(bare) in sentence and "no manifest" in sentence and f"gai-yolo snapshots adopt {run}" in sentence
    assert "left in place" in sentence and bare.exists()
    for number in (5, 6):
        torch.save(state(number), path.with_name(f"epoch_00{number}.pt"))
    _, told = find(run)
    assert len(told) == 1 and "2 others" in told[0], "one sentence, however many"


def test_manifest_without_its_file_is_told_and_passed_over(run: Path) -> None:
    """Loss: a file that somebody deleted ends the search."""
    _, gone = saved(run, 2, 3)
    gone.unlink()
    step, told = find(run)
    assert step == 20 and len(told) == 1 and str(gone) in told[0] and "gone" in told[0]


# --- damage ----------------------------------------------------------------------------------------------------------------


def truncated(part: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(len(whole) * part)]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda whole: whole[:1],
    "a tenth": truncated(0.1),
    "half": truncated(0.5),
    "without the end": lambda whole: whole[:-1],
    "one byte more": lambda whole: whole + b"\0",
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "all zeros": lambda whole: bytes(len(whole)),
    "a text": lambda _: b"<html>404</html>",
    "random": lambda _: random.Random(6).randbytes(5000),
    "random of the same size": lambda whole: random.Random(6).randbytes(len(whole)),
    "a list": lambda _: pickle.dumps([1, 2, 3], protocol=2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(damage: str, run: Path) -> None:
    """Loss: one torn file, and the run cannot be continued at all; or it goes on from garbage."""
    _, _, good, bad = saved(run, 1, 2, 3, 4)
    content = DAMAGES[damage](bad.read_bytes())
    size = bad.stat().st_size
    bad.write_bytes(content)
    step, told = find(run)
    assert step == 30
    assert len(told) == 1 and str(bad) in told[0] and "left in place" in told[0]
    assert bad.read_bytes() == content and good.exists(), "somebody may still mend or examine it"
    assert bad.with_suffix(".json").exists()
    defects = [defect.path for defect in Catalogue(run).listing().defects]
    assert defects == ([bad] if len(content) != size else []), "a wrong size is seen without reading the file"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_manifest_falls_back_to_the_one_before(damage: str, run: Path) -> None:
    """Loss: a manifest that was not on the disk when the power went stops the run, or vouches for anything."""
    _, bad = saved(run, 3, 4)
    manifest = bad.with_suffix(".json")
    content = DAMAGES[damage](manifest.read_bytes())
    manifest.write_bytes(content)
    step, told = find(run)
    assert step == 30
    assert len(told) == 1 and str(manifest) in told[0] and "left in place" in told[0]
    assert manifest.read_bytes() == content


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "one byte more"])
def test_garbage_whose_manifest_fits_is_passed_over_too(damage: str, run: Path) -> None:
    """Loss: a copy that was damaged before it was adopted or hashed ends the search with a traceback."""
    _, path = saved(run, 3, 4)
    bad = forged(run, DAMAGES[damage](path.read_bytes()), state(4))
    step, told = find(run)
    assert step == 30
    assert len(told) == 1 and str(bad) in told[0] and "left in place" in told[0]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_garbage_whatsoever_ends_the_search(run: Path) -> None:
    """Loss: the one pattern of bytes that the parser trips over stops a run that has good checkpoints."""
    saved(run, 3)
    plain = bytearray(pickle.dumps({"a": [1, 2.0, "x", None, b"y"], "b": (1, {2: 3})}, protocol=2))
    rng = random.Random(0)
    for _ in range(300):
        mutated = bytearray(plain)
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        for content in (rng.randbytes(rng.randrange(1, 200)), bytes(mutated)):
            forged(run, content, state(4))
            with contextlib.suppress(CheckpointError):  # a readable dictionary of another program is refused, not passed over
                assert find(run)[0] == 30


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def test_a_flipped_bit_anywhere_is_noticed(run: Path) -> None:
    """Loss: a bad disk or memory changes a weight to 1e30 or the step to another one, and the run goes on from it."""
    _, bad = saved(run, 3, 4)
    data = torch.full((500,), 40.0).numpy().tobytes()
    whole = bad.read_bytes()
    assert whole.count(data) == 1
    start, rng = 8 * whole.index(data), random.Random(5)
    weights = [start + 30, start + 8 * 777, start + 8 * 1999 + 7]
    for bit in [0, 8 * len(whole) - 1, *weights, *(rng.randrange(8 * len(whole)) for _ in range(300))]:
        flip(bad, bit)
        step, told = find(run)
        assert step == 30 and len(told) == 1 and str(bad) in told[0] and "SHA-256" in told[0]
        flip(bad, bit)
    assert find(run) == (40, []), "and it is good without"


def test_every_damaged_file_is_told_and_nothing_is_found_if_all_are(run: Path) -> None:
    """Loss: the run starts over without a word about the checkpoints it had."""
    one, two, three, four = saved(run, 1, 2, 3, 4)
    one.write_bytes(b"")
    flip(two, 99)
    flip(three, 99)
    four.unlink()
    four.mkdir()
    (run / "checkpoints" / "epoch_005.pt").mkdir()
    step, told = find(run)
    assert step is None and len(told) == 5
    for number in range(1, 6):
        assert sum(f"epoch_00{number}" in sentence for sentence in told) == 1


@pytest.mark.parametrize("kind", ["both", "data", "data over another", "manifest over another"])
def test_renamed_files_are_passed_over(kind: str, run: Path) -> None:
    """Loss: an old checkpoint copied over a newer name repeats or skips epochs unnoticed."""
    _, old = saved(run, 2, 3)
    manifest, new = old.with_suffix(".json"), old.with_name("epoch_008.pt")
    if kind == "both":
        old.rename(new)
        manifest.rename(new.with_suffix(".json"))
    elif kind == "data":
        old.rename(new)
    else:
        saved(run, 8)
        if kind == "data over another":
            shutil.copyfile(old, new)
        else:
            shutil.copyfile(manifest, new.with_suffix(".json"))
    step, told = find(run)
    assert step == (20 if old != new and not old.exists() else 30)
    assert any("epoch_008" in sentence for sentence in told)
    assert kind not in ("both", "manifest over another") or "epoch_003, renamed" in told[0]
    assert kind != "data" or any("epoch_003.pt is gone" in sentence for sentence in told)


@pytest.mark.parametrize("content", [state(3), state(4, 39), state(3, 40), {**state(4), "samples": 7}])
def test_content_that_is_not_what_its_manifest_says_is_passed_over(content: dict[str, Any], run: Path) -> None:
    """Loss: an old checkpoint adopted under a newer name repeats epochs unnoticed."""
    _, bad = saved(run, 2, 4)
    torch.save(content, bad)
    forged(run, bad.read_bytes(), state(4))
    step, told = find(run)
    assert step == 20
    assert len(told) == 1 and str(bad) in told[0] and f"step {content['step']} of epoch {content['epoch'] + 1}" in told[0]


def test_the_parser_is_handed_the_verified_bytes_and_nothing_else(run: Path) -> None:
    """Loss: the file is exchanged between its verification and its opening; or read from its end."""
    (path,) = saved(run, 3)
    seen: list[bytes] = []

    def parse(name: Path, file: BinaryIO, manifest: Manifest) -> int:
        assert name == path
        published(run, state(4))
        path.unlink()
        path.write_bytes(b"exchanged")
        seen.append(file.read())
        return manifest.size

    whole = path.read_bytes()
    found, passed_over = Catalogue(run).newest(parse)
    assert seen == [whole] and found is not None and found[1] == len(whole) and passed_over == []


# --- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {**state(4), "format": CHECKPOINT_FORMAT + 1},
        {**state(4), "format": CHECKPOINT_FORMAT - 1},
        {**state(4), "format": str(CHECKPOINT_FORMAT)},
        {"epoch": 4},
        state(4)["model_state_dict"],
    ],
)
def test_checkpoint_of_another_version_is_refused_not_passed_over(content: dict[str, Any], run: Path) -> None:
    """Loss: an older program silently goes back to its own last epoch and overwrites the work of a newer one."""
    saved(run, 3)
    store_of(run).publish(manifest_of(state(4)), lambda file: torch.save(content, file))
    with pytest.raises(CheckpointError, match=r"epoch_004\.pt.*--fresh"):
        find(run)


@pytest.mark.parametrize("part", ["step", "epoch", "samples"])
@pytest.mark.parametrize("value", [None, "4", -1, 4.0])
def test_checkpoint_that_does_not_say_how_far_training_was_is_refused(part: str, value: Any, run: Path) -> None:
    """Loss: a file of this format that this program did not write is continued from some step or other."""
    saved(run, 3)
    store_of(run).publish(manifest_of(state(4)), lambda file: torch.save({**state(4), part: value}, file))
    with pytest.raises(CheckpointError, match=r"epoch_004\.pt.*how far"):
        find(run)


@pytest.mark.parametrize("epoch", [2, 4])
def test_manifest_of_another_version_is_refused_not_passed_over(epoch: int, run: Path) -> None:
    """Loss: an older program passes over what a newer one wrote, and prunes it."""
    saved(run, 2, 3, 4)
    path = run / "checkpoints" / f"epoch_00{epoch}.json"
    old = b'"format": %d,' % MANIFEST_FORMAT
    body, _ = path.read_bytes().split(b',\n "checksum"')
    assert body.count(old) == 1
    body = body.replace(old, b'"format": %d,' % (MANIFEST_FORMAT + 1))
    checksum = hashlib.sha256(body + b"\n}\n").hexdigest()
    path.write_bytes(body + b',\n "checksum": "%s"\n}\n' % checksum.encode())
    with pytest.raises(CheckpointError, match=rf"epoch_00{epoch}\.json.*format.*--fresh"):
        find(run)


class Touch:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.victim,))


def pickled(content: Any, file: BinaryIO) -> None:
    file.write(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("writer", [torch.save, pickled])
def test_checkpoint_that_carries_code_is_refused_and_does_not_run(writer: Callable[[Any, BinaryIO], None], run: Path) -> None:
    """Loss: a downloaded checkpoint runs somebody's program with the rights of the user."""
    saved(run, 3)
    victim = run / "victim"
    content = {**state(4), "extra": Touch(victim)} if writer is torch.save else {"epoch": 4, "extra": Touch(victim)}
    store = store_of(run)
    manifest, _ = store.publish(manifest_of(state(4)), lambda file: writer(content, file))
    path = store.data_path(manifest)
    with pytest.raises(CheckpointError, match=r"epoch_004\.pt.*could run code"):
        find(run)
    assert not victim.exists()
    if writer is torch.save:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert victim.exists(), "the file was dangerous indeed"


class Unlisted(FileSystem):
    """One folder cannot be listed."""

    def __init__(self, name: str, error: OSError) -> None:
        self.name, self.error = name, error

    def names(self, folder: Path) -> list[str]:
        if folder.name == self.name:
            raise self.error
        return super().names(folder)


@pytest.mark.parametrize("name", ["checkpoints", "snapshots"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_folder_that_cannot_be_looked_into_is_refused_not_taken_for_empty(name: str, error: OSError, run: Path) -> None:
    """Loss: the disk hiccups while the job starts, and it starts over beside its checkpoints."""
    saved(run, 3)
    with pytest.raises(CheckpointError, match=error.strerror or "") as refused:
        find(run, Unlisted(name, error))
    assert str(run / name) in str(refused.value)


def test_file_in_the_place_of_a_folder_is_refused_not_taken_for_empty(run: Path) -> None:
    """Loss: as above."""
    saved(run, 3)
    (run / "snapshots").rmdir()
    (run / "snapshots").write_text("x")
    with pytest.raises(CheckpointError, match="snapshots"):
        find(run)


class Unreadable(FileSystem):
    """One file cannot be read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, path: Path) -> BinaryIO:
        if path.name == self.name:
            raise OSError(5, "Input/output error", str(path))
        return super().open(path)


@pytest.mark.parametrize("name", ["epoch_004.pt", "epoch_004.json"])
def test_file_that_cannot_be_read_is_told_and_passed_over(name: str, run: Path) -> None:
    """Loss: one bad sector, and the run cannot be continued at all."""
    saved(run, 3, 4)
    step, told = find(run, Unreadable(name))
    assert step == 30
    assert len(told) == 1 and "epoch_004" in told[0] and "Input/output error" in told[0]


# --- writing ---------------------------------------------------------------------------------------------------------------


def served(store: Store, content: dict[str, Any], metric: float | None = None, room: int = resource.RLIM_INFINITY) -> Answer:
    """What the writer process does with a request, in this process. Writing beyond `room` bytes of a file fails, as on a full
    disk."""
    buffer = StateBuffer(0, pinned=False)
    buffer.fill(content)
    descriptor = os.dup(buffer.descriptor)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        return serve(store, Policy(), manifest_of(content, metric=metric), buffer.content, descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        buffer.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_full_disk_is_told_in_one_sentence_and_keeps_what_is_there(run: Path) -> None:
    """Loss: a message from inside torch in place of the disk's own; or the good checkpoint is gone too."""
    (old,) = saved(run, 1)
    before = names(old.parent)
    big = {**state(2), "big": torch.zeros(1_000_000)}
    store = store_of(run)
    answer = served(store, big, metric=0.5, room=20_000)
    assert answer.failure is not None and answer.failure.startswith("File too large") and "\n" not in answer.failure
    assert answer.taken_over is None
    assert names(old.parent) == before
    assert find(run) == (10, [])
    answer = served(store, big, metric=0.5)
    assert answer.failure is None
    assert find(run) == (20, [])


def test_complete_checkpoint_is_never_overwritten(run: Path) -> None:
    """Loss: a run that was set back trains an epoch again and spoils the good checkpoint while writing it anew."""
    (path,) = saved(run, 3)
    data, manifest = path.read_bytes(), path.with_suffix(".json").read_bytes()
    answer = served(store_of(run), {**state(3), "extra": torch.ones(1000)}, metric=0.5)
    assert answer.failure is None
    assert len(answer.notes) == 1 and str(path) in answer.notes[0] and "complete already" in answer.notes[0]
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == (data, manifest)


def test_file_that_is_not_complete_is_moved_aside_and_told_not_lost(run: Path) -> None:
    """Loss: the only copy of a checkpoint, whose manifest was lost, is overwritten; or an epoch can never be saved again."""
    bare = run / "checkpoints" / "epoch_003.pt"
    for number in (1, 2):
        bare.write_bytes(b"%d" % number)
        bare.with_suffix(".json").unlink(missing_ok=True)
        answer = served(store_of(run), state(3))
        assert answer.failure is None and find(run) == (30, [])
        assert len(answer.notes) == 1 and f"epoch_003.pt.aside-{number}" in answer.notes[0]
    assert [(bare.parent / f"epoch_003.pt.aside-{number}").read_bytes() for number in (1, 2)] == [b"1", b"2"]


def test_writer_that_was_overtaken_publishes_nothing_and_says_so(run: Path) -> None:
    """Loss: the writer of a job that was declared dead writes into the run of its successor."""
    saved(run, 1)
    overtaken = store_of(run)
    store_of(run)
    before = names(run / "checkpoints")
    answer = served(overtaken, state(2), metric=0.5)
    assert answer.taken_over is not None and f"process {os.getpid()}" in answer.taken_over
    assert names(run / "checkpoints") == before


class Thawing:
    """Goes into a buffer and comes out as something that goes into no file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Unwritable, ())


class Unwritable:
    """As its name says."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise ValueError("no luck")


def test_broken_state_is_a_failure_like_any_other(run: Path) -> None:
    """Loss: one state that cannot be written kills the writer, and the next one, and the next one."""
    answer = served(store_of(run), {**state(2), "extra": Thawing()})
    assert answer.failure is not None and "no luck" in answer.failure
    assert names(run / "checkpoints") == []


# --- a whole run, with its writer process ----------------------------------------------------------------------------------

IDENTITY = {"config": {"training": {"epochs": 7}}, "class_names": ["a"], "data_digest": "d"}


def config_of(**sections: Any) -> Config:
    return Config.model_validate(sections)


class Saving:
    """A saver with the disk only, and its writer process."""

    def __init__(self, run: Path, config: Config, state: TrainingState) -> None:
        self.disk = DiskTier(store_of(run), config, state)
        self.manager = CheckpointManager(config, state, state.capture, IDENTITY, [self.disk])
        self.state = state

    def step_ended(self) -> None:
        """What the loop does around a step."""
        self.manager.after_step(agreed=self.manager.is_due(self.state.step))


@contextlib.contextmanager
def saving_of(run: Path, config: Config, state: TrainingState) -> Iterator[Saving]:
    """Saving begins here, and the writer process has ended after."""
    saving = Saving(run, config, state)
    try:
        yield saving
    finally:
        saving.manager.close(30.0)


LOSS = {"total": 0.0, "box": 0.5, "cls": 0.0, "dfl": 0.0}


def train_a_step(state: TrainingState, value: float) -> None:
    """Changes all weights."""
    with torch.no_grad():
        for parameter in (*state.model.parameters(), *state.ema.model.parameters()):
            parameter.fill_(value)
    state.advance(8, LOSS)


def content_of(state: TrainingState) -> dict[str, Any]:
    """What a checkpoint has to hold now."""
    return {**copy.deepcopy(state.capture()), **IDENTITY}


def manifests(folder: Path) -> dict[str, Manifest]:
    return {path.stem: decode(path.read_bytes()) for path in sorted(folder.glob("*.json"))}


def assert_equal(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Equality all the way down; a checkpoint keeps no types of dictionaries."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{number}]")
    else:
        assert a == b, where


def test_epochs_are_saved_when_due_or_best_and_a_former_best_that_was_not_due_goes(
    run: Path, make_state: MakeState, told: list[str]
) -> None:
    """Loss: the best epoch is not kept because no interval asked for it; or every former best is, and the disk fills up."""
    config = config_of(training={"epochs": 7, "checkpoint_interval": 3}, snapshots={"interval_seconds": None})
    state = make_state()
    metrics = [None, 0.1, 0.05, 0.3, 0.3, 0.2, 0.25]
    contents: dict[str, dict[str, Any]] = {}
    with saving_of(run, config, state) as saving:
        for epoch, metric in enumerate(metrics, start=1):
            train_a_step(state, float(epoch))
            state.end_epoch({"epoch": epoch, "mAP50-95": metric, "train_loss": 1.0 / epoch, "val_loss": None})
            contents[f"epoch_{epoch:03d}"] = content_of(state)
            saving.step_ended()
            saving.manager.after_epoch()
        saving.manager.finish()
        assert saving.disk.writer.is_idle
    assert told == [] and saving.disk.count == 5, "2, 3, 4, 6 and 7; not 1 and 5, which are neither due nor better"
    found = manifests(run / "checkpoints")
    assert [(stem, one.due, one.metric) for stem, one in found.items()] == [
        ("epoch_003", True, 0.05),
        ("epoch_004", False, 0.3),
        ("epoch_006", True, 0.2),
        ("epoch_007", True, 0.25),
    ]
    assert names(run / "checkpoints") == [".best", "best.pt", *(f"{stem}{suffix}" for stem in found for suffix in (".json", ".pt"))]
    assert names(run / "snapshots") == [], "none was asked for"
    for stem, manifest in found.items():
        data = (run / "checkpoints" / f"{stem}.pt").read_bytes()
        assert (manifest.size, manifest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        epoch = manifest.position.epoch
        assert (manifest.kind, manifest.position, manifest.fence) == ("epoch", Position(epoch, epoch, 8 * epoch), 1)
        assert (manifest.config_fingerprint, manifest.torch_version) == (fingerprint(config), torch.__version__)
        assert_equal(torch.load(run / "checkpoints" / f"{stem}.pt", weights_only=True), contents[stem])
    assert not (run / "checkpoints" / "best.pt").samefile(run / "checkpoints" / "epoch_004.pt")
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    assert best["epoch"] == 4 and best["ema_state_dict"]["model.0.conv.weight"].unique().tolist() == [4.0]


@pytest.mark.parametrize("there", ["nothing", "damaged", "a snapshot", "the checkpoint"])
def test_an_epochs_state_that_only_memory_had_is_brought_to_the_disk(there: str, run: Path, make_state: MakeState) -> None:
    """Loss: a killed job's last epoch is found in memory, called finished, and thrown away with it."""
    config = config_of(training={"epochs": 2, "checkpoint_interval": 2}, snapshots={"interval_seconds": None})
    state = make_state()
    for epoch in (1, 2):
        train_a_step(state, float(epoch))
        state.end_epoch({"epoch": epoch, "step": epoch, "mAP50-95": None})
    with saving_of(run, config, state) as saving:
        if there == "a snapshot":
            assert saving.manager.save_now() == []
        elif there != "nothing":
            saving.manager.after_epoch()
            saving.manager.finish()
        data = run / "checkpoints" / "epoch_002.pt"
        if there == "damaged":
            data.write_bytes(bytes(data.stat().st_size))
    with saving_of(run, config, state) as saving:
        saving.manager.catch_up()
        saving.manager.finish()
        assert saving.disk.count == (0 if there == "the checkpoint" else 1)
        train_a_step(state, 3.0)
        saving.manager.catch_up()
        assert saving.disk.writer.is_idle, "in the middle of an epoch there is none to catch up with"
    assert_equal(torch.load(data, weights_only=True)["history"], state.history)
    assert Catalogue(run).defect_of(manifests(run / "checkpoints")["epoch_002"]) is None


def test_snapshots_come_at_their_interval_and_hold_the_state_and_whose_it_is(run: Path, make_state: MakeState, told: list[str]) -> None:
    """Loss: a snapshot of another step than its name says, one that cannot be told from one of another run, or too many."""
    config = config_of(training={"epochs": 2, "checkpoint_interval": 2}, snapshots={"interval_steps": 3, "keep": 2})
    state = make_state("adamw")
    content: dict[str, Any] = {}
    seen: list[list[str]] = []
    with saving_of(run, config, state) as saving:
        for step in range(1, 12):
            state.progress.seconds += 2.0
            train_a_step(state, float(step))
            content = content_of(state) if step == 9 else content
            saving.step_ended()
            assert saving.disk.writer.drain(60.0)
            seen.append([path.stem for path in sorted((run / "snapshots").glob("*.pt"))])
        told_bytes = state.expected_bytes()
        state.end_epoch({"epoch": 1, "mAP50-95": None})
        saving.manager.after_epoch()  # neither due nor evaluated
        assert saving.disk.writer.is_idle
        train_a_step(state, 12.0)
        saving.step_ended()
        assert not saving.disk.writer.is_idle
        saving.manager.finish()
    three, six, nine, twelve = (f"step_{step:08d}" for step in (3, 6, 9, 12))
    assert seen == [[], [], [three], [three], [three], [three, six], [three, six], [three, six], [six, nine], [six, nine], [six, nine]]
    assert told == [] and saving.disk.count == 4
    found = manifests(run / "snapshots")
    assert list(found) == [nine, twelve] and names(run / "checkpoints") == []
    assert names(run / "snapshots") == [f"{stem}{suffix}" for stem in found for suffix in (".json", ".pt")]
    assert (found[nine].kind, found[nine].position, found[nine].metric, found[nine].due) == ("step", Position(9, 0, 72), None, True)
    assert found[twelve].position == Position(12, 1, 96)
    assert_equal(torch.load(run / "snapshots" / f"{nine}.pt", weights_only=True), content)
    assert content["progress"] == {"losses": {"total": 0.0, "box": 4.5, "cls": 0.0, "dfl": 0.0}, "seconds": 18.0, "bad_steps": 0}
    assert {key: content[key] for key in IDENTITY} == IDENTITY
    assert found[nine].size <= told_bytes, "room that was foreseen is enough"
    other = make_state("adamw", seed=1)
    loaded, passed_over = newest(Catalogue(run))
    assert loaded is not None and passed_over == []
    other.apply(loaded.content)
    assert_equal(other.capture(), state.capture())


def test_run_whose_last_checkpoint_cannot_be_written_says_so_and_does_not_end_well(
    run: Path, make_state: MakeState, told: list[str]
) -> None:
    """Loss: a run that reports success, and whose result is nowhere."""
    config = config_of(training={"epochs": 1}, snapshots={"interval_seconds": None, "patience_seconds": 0.2})
    state = make_state()
    with saving_of(run, config, state) as saving:
        (run / "checkpoints").rmdir()
        train_a_step(state, 1.0)
        state.end_epoch({"epoch": 1, "mAP50-95": 0.5})
        saving.manager.after_epoch()
        with pytest.raises(CheckpointError, match=r"checkpoints/epoch_001\.pt.*snapshots\.patience_seconds"):
            saving.manager.finish()
        while not told:
            saving.disk.writer.poll(0.05)
        assert "epoch_001.pt could not be written: No such file or directory" in told[0] and saving.disk.count == 0
        (run / "checkpoints").mkdir()
        assert saving.disk.writer.drain(60.0), "and it was not given up for good"
    assert list(manifests(run / "checkpoints")) == ["epoch_001"]
    assert len(told) == 2


def test_room_for_the_rest_of_a_run_is_foreseen(make_state: MakeState) -> None:
    """Loss: the disk is full in the last night of a week; or a run that would fit is warned of."""
    state = make_state()
    one = state.expected_bytes()

    def files(epochs: int, present: list[Manifest], **snapshots: Any) -> float:
        training = {"epochs": epochs, "checkpoint_interval": 2}
        return bytes_to_come(config_of(training=training, snapshots=snapshots), state.epoch, one, present) / one

    step = manifest_of({"step": 3, "epoch": 0, "samples": 24}, "step")
    assert files(7, [], interval_seconds=None) == 4 + 3, "2, 4, 6, 7, a best one, best.pt and its next draft"
    assert files(7, [], keep=2) == 4 + 3 + 3, "one more snapshot than is kept, for a moment"
    assert files(7, [step, step], keep=2) == 4 + 3 + 1
    assert files(1000, [], keep_epochs=3, interval_seconds=None) == 3 + 1 + 3
    state.epoch = 6
    assert files(7, [], interval_seconds=None) == 1 + 3


def test_a_writer_whose_training_process_has_left_ends_without_a_word(run: Path) -> None:
    """Loss: a traceback in the terminal of everybody who stops a job, because an answer was on its way."""
    store = store_of(run)
    own, other = socket.socketpair()
    connection = Connection(os.dup(own.fileno()))
    with other:
        writer = subprocess.Popen([sys.executable, "-c", START_CODE], stdin=other.fileno(), stderr=subprocess.PIPE, text=True)
    buffer = StateBuffer(1 << 16, pinned=False)
    buffer.fill(state(1))
    connection.send((run, store.fence, Policy()))
    socket.send_fds(own, [b"."], [buffer.descriptor])
    connection.send((manifest_of(state(1)), buffer.content))
    while not connection.poll(0.1):
        assert writer.poll() is None
    own.close()  # with the answer unread, as by a process that was killed
    connection.close()
    assert writer.communicate(timeout=60)[1] == "" and writer.returncode == 0
    buffer.close()
