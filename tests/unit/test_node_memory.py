"""A run's folder in the memory of a node: whose it is, and when it counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from gai_yolo.errors import CheckpointError, Refusal, RunFolderBusy
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.manifest import Position
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_record import RunRecord
from tests.states import content_of, foreign, manifest_of, names


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "experiments" / "run"


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gai_yolo.store.node_memory.MEMORY_LOCK_PATIENCE", 0.1)


def opened(base: Path, run: Path, run_id: str = "1-a") -> NodeMemory:
    memory = NodeMemory(base, run)
    memory.open()
    memory.keep(RunRecord(run_id))
    return memory


def save(memory: NodeMemory, step: int) -> None:
    content = content_of(step)
    memory.store.publish(manifest_of(content), lambda file: torch.save(content, file))


def test_a_state_outlives_the_process_that_saved_it(base: Path, run: Path) -> None:
    """Loss: a crashed process costs what the memory was to keep."""
    memory = opened(base, run)
    save(memory, 5)
    memory.release()
    again = opened(base, run)
    assert [manifest.position.step for manifest in again.store.listing().present] == [5]
    assert again.store.fence.number == memory.store.fence.number + 1


def test_what_is_not_to_come_back_is_moved_aside_and_not_deleted(base: Path, run: Path) -> None:
    """Loss: a run that was started over goes on from its old state; or that state, which nothing else holds, is deleted."""
    memory = opened(base, run)
    save(memory, 5)
    aside = memory.set_aside()
    assert aside is not None and [aside] == list(memory.asides())
    assert names(aside) == ["step_00000005.json", "step_00000005.pt"]
    memory.keep(RunRecord("2-b"))
    assert names(memory.path) == [] and memory.record() == RunRecord("2-b")
    assert memory.set_aside() is None, "there is nothing"
    memory.keep(RunRecord("2-b"))
    for step in (6, 7, 8):
        save(memory, step)
    other = memory.set_aside(beyond=Position(6, 0, 48))
    assert other is not None and other != aside and len(list(other.glob("snapshots/*"))) == 4
    assert names(memory.path) == ["step_00000006.json", "step_00000006.pt"]
    found, _ = Catalogue(other).newest(lambda _path, file, _manifest: torch.load(file, weights_only=True)["step"])
    assert found is not None, "whole"
    assert memory.set_aside(beyond=Position(6, 0, 48)) is None


def test_the_id_that_an_older_version_has_left_is_read(base: Path, run: Path) -> None:
    """Loss: an update of the program throws away what the node's memory holds."""
    memory = opened(base, run)
    save(memory, 5)
    (memory.path / "run.json").unlink()
    (memory.path / "run_id").write_text("1-a")
    memory.release()
    again = NodeMemory(base, run)
    again.open()
    assert again.record() == RunRecord("1-a")
    assert names(again.path) == ["step_00000005.json", "step_00000005.pt"]


def test_a_removal_that_was_interrupted_is_completed(base: Path, run: Path) -> None:
    """Loss: half of an old run's state under the name of the new one."""
    memory = opened(base, run)
    save(memory, 5)
    (memory.path / "run.json").unlink()
    memory.release()
    assert names(opened(base, run).path) == []


def test_jobs_of_one_name_in_two_folders_have_nothing_in_common(base: Path, tmp_path: Path) -> None:
    """Loss: the one's state is removed, or continued, by the other."""
    one, other = (NodeMemory(base, tmp_path / name / "run") for name in ("a", "b"))
    assert one.path != other.path
    one.open()
    other.open()
    for memory in (one, other):
        memory.keep(RunRecord("1-a"))
    save(one, 5)
    assert names(other.path) == []


def test_the_same_folder_named_in_two_ways_is_the_same(base: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: started once from another directory, the job does not find its memory."""
    run.parent.mkdir()
    monkeypatch.chdir(run.parent)
    assert NodeMemory(base, Path("run")).path == NodeMemory(base, run).path


def test_only_one_process_of_a_machine_keeps_a_run(base: Path, run: Path) -> None:
    """Loss: two jobs, or two nodes that share a machine's memory, remove each other's states."""
    memory = opened(base, run)
    save(memory, 5)
    with pytest.raises(RunFolderBusy, match=f"process {os.getpid()}"):
        opened(base, run, "2-b")
    assert [manifest.position.step for manifest in memory.store.listing().present] == [5]
    memory.release()
    opened(base, run)
    with pytest.raises(RunFolderBusy):
        save(memory, 6)


def test_the_folder_is_for_its_user_alone(base: Path, run: Path) -> None:
    """Loss: everybody on the machine can read the weights."""
    memory = opened(base, run)
    assert memory.path.parent.stat().st_mode & 0o077 == 0


def test_a_link_in_the_place_of_the_folder_is_refused(base: Path, run: Path, tmp_path: Path) -> None:
    """Loss: another user's link leads a removal to any place."""
    target = tmp_path / "target"
    target.mkdir()
    (base / f"gai-yolo-{os.getuid()}").symlink_to(target)
    with pytest.raises(Refusal, match=r"belongs to another user; set elastic\.memory_folder"):
        opened(base, run)
    assert list(target.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user_is_refused(base: Path, run: Path) -> None:
    """Loss: a state that somebody else has put there."""
    owner = base / f"gai-yolo-{os.getuid()}"
    owner.mkdir()
    os.chown(owner, 12345, 12345)
    with pytest.raises(Refusal, match="belongs to another user"):
        opened(base, run)
    assert list(owner.iterdir()) == []


def test_memory_that_is_not_there_is_refused_by_name(base: Path, run: Path) -> None:
    """Loss: a traceback where one line would do."""
    with pytest.raises(Refusal, match="gone"):
        opened(base / "gone", run)
    (base / "file").write_text("")
    with pytest.raises(Refusal, match="Not a directory"):
        opened(base / "file", run)


def test_who_could_not_open_it_does_not_lock_others_out(base: Path, run: Path) -> None:
    """Loss: after one failure no process of the machine can keep the state, and each waits for it at its start."""
    first = NodeMemory(base, run)
    first.path.parent.mkdir()
    first.path.write_text("in the way")
    with pytest.raises(Refusal, match="cannot be used"):
        first.open()
    first.path.unlink()
    second = opened(base, run)
    save(second, 5)
    second.release()
    # Of another version of this program, and a file without a manifest, so that the listing is read at the start.
    manifest = second.path / "snapshots" / "step_00000005.json"
    shutil.copy(manifest.with_suffix(".pt"), manifest.with_name("step_00000004.pt"))
    manifest.write_bytes(foreign())
    third = NodeMemory(base, run)
    third.open()
    with pytest.raises(CheckpointError, match="format 99"):
        third.keep(RunRecord("1-a"))
    third.release()
    fourth = NodeMemory(base, run)
    fourth.open()
    fourth.set_aside()
    fourth.keep(RunRecord("2-b"))
    assert names(fourth.path) == []


def test_the_memory_is_given_back_when_the_run_is_finished(base: Path, run: Path) -> None:
    """Loss: every finished run keeps a state's size of the machine's memory until it is switched off."""
    memory = opened(base, run)
    save(memory, 5)
    memory.remove()
    memory.remove()
    assert not memory.path.exists()
    memory.release()
    assert sum(path.stat().st_size for path in memory.path.parent.iterdir()) < 1000
