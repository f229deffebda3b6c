"""Saving on all tiers of a rank: when all ranks have agreed, and when nobody can be asked any more."""

from __future__ import annotations

import copy
import errno
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gai_yolo.checkpointing.digest import part_digests
from gai_yolo.checkpointing.manager import CheckpointManager
from gai_yolo.checkpointing.memory_tier import MemoryTier, stand_in
from gai_yolo.checkpointing.recovery import newest
from gai_yolo.checkpointing.schedule import Schedule
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.checkpointing.tier import Tier
from gai_yolo.config import Config
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.distributed.world import World
from gai_yolo.log import showing
from gai_yolo.sections import SnapshotsConfig, TrainingConfig
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import Manifest
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_record import RunRecord
from gai_yolo.store.store import Store
from gai_yolo.training.optimizer import make_schedule
from gai_yolo.training.step import TrainingStep
from tests.conftest import MakeBatch, MakeState
from tests.states import Gate, Refusing, store_at


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


class Durable(Tier):
    """The tier on the disk without its writer process: notes what it is to save in the background."""

    accepts = True

    def __init__(self, store: Store) -> None:
        super().__init__(lambda: nullcontext(store), Schedule.never(), "due", None)
        self.due_at: set[int] = set()
        self.did: list[str] = []

    def is_due(self, step: int) -> bool:
        return step in self.due_at

    def poll(self, wait: bool) -> None:
        raise AssertionError(f"poll {wait}")

    def hand_over(self, manifest: Manifest, content: dict[str, Any]) -> None:
        position = manifest.position
        assert (content["epoch"], content["step"], content["config"]) == (position.epoch, position.step, {})
        self.did.append(f"{manifest.kind} {position.step if manifest.kind == 'step' else position.epoch}")

    def finish(self) -> None:
        self.did.append("finish")

    def close(self, patience: float) -> None:
        self.did.append(f"close {patience:g}")


class Saving:
    """A saver with both tiers over a state."""

    def __init__(self, folder: Path, state: TrainingState, memory_fs: FileSystem | None = None, disk_fs: FileSystem | None = None) -> None:
        self.state = state
        self.runs = {"memory": folder / "memory", "disk": folder / "disk"}
        self.durable = Durable(store_at(self.runs["disk"], disk_fs))
        memory, schedule = store_at(self.runs["memory"], memory_fs), Schedule.of_memory(5, SnapshotsConfig(), 0, 1 << 20)
        self.memory = MemoryTier(lambda: nullcontext(memory), memory.run, schedule, 1 << 20)
        self.boundary: Callable[[], dict[str, Any]] = state.capture
        self.saver = CheckpointManager(Config(), state, lambda: self.boundary(), {"config": {}}, [self.durable, self.memory])

    def steps(self) -> dict[str, int | None]:
        """What is complete on each tier."""
        return {tier: None if content is None else content["step"] for tier, content in self.contents().items()}

    def contents(self) -> dict[str, dict[str, Any] | None]:
        found = {tier: newest(Catalogue(run)) for tier, run in self.runs.items()}
        assert not any(passed_over for _, passed_over in found.values())
        return {tier: None if one is None else one.content for tier, (one, _) in found.items()}


@pytest.fixture
def state(make_state: MakeState) -> TrainingState:
    made = make_state()
    made.step, made.samples = 7, 56
    return made


@pytest.fixture
def saving(tmp_path: Path, state: TrainingState) -> Saving:
    return Saving(tmp_path, state)


# --- agreed by all ranks -----------------------------------------------------------------------------------------------------


def test_a_state_is_due_if_any_tier_says_so_or_it_is_to_be_saved_at_once(saving: Saving) -> None:
    """Loss: an advice of the cloud, or a tier, that nobody hears."""
    saving.durable.due_at = {7}
    saved = []
    for step in range(1, 14):
        due = saving.saver.is_due(step)
        saving.state.step = step
        saving.saver.after_step(due)
        saved += [step] * due
    assert saved == [4, 7, 11] and saving.durable.did == ["step 7"]
    assert saving.saver.is_due(8, at_once=True)


def test_what_is_agreed_is_saved_where_it_is_due(saving: Saving, state: TrainingState) -> None:
    """Loss: a step at which other nodes save is missing on this one; or the disk gets what is meant for memory."""
    for due, agreed, on_disk in ((False, False, []), (False, True, []), (True, False, []), (True, True, ["step 7"])):
        saving.durable.due_at = {7} if due else set()
        saving.saver.is_due(7)
        saving.saver.after_step(agreed)
        assert saving.durable.did == on_disk
    saving.saver.is_due(8, at_once=True)
    state.step = 8
    saving.saver.after_step(agreed=True)
    assert saving.durable.did == ["step 7", "step 8"]
    saving.memory.close(0.0)
    assert saving.steps()["memory"] == 8
    assert saving.saver.stall > 0


def test_nothing_is_saved_while_steps_go_bad(saving: Saving, state: TrainingState) -> None:
    """Loss: the last good state is replaced by one that the run has to go back from."""
    saving.durable.due_at = {7}
    saving.saver.is_due(7)
    state.bad_in_row = 1
    saving.saver.after_step(agreed=True)
    saving.memory.close(0.0)
    assert saving.durable.did == [] and saving.steps()["memory"] is None


def test_an_epochs_end_is_saved_on_both_tiers(saving: Saving, state: TrainingState) -> None:
    """Loss: an evaluation is done again after every crash."""
    state.end_epoch({"mAP50-95": 0.5})
    saving.saver.after_epoch()
    saving.saver.finish()
    saving.saver.close(1.0)
    assert saving.durable.did == ["epoch 1", "finish", "close 1"]
    content = saving.contents()["memory"]
    assert content is not None and (content["epoch"], content["best_metric"], content["config"]) == (1, 0.5, {})


def test_a_rank_without_tiers_only_passes_on(state: TrainingState) -> None:
    """Loss: most ranks of a large job fail where they have nothing to do."""
    saver = CheckpointManager(Config(), state, state.capture, {}, [])
    assert not saver.is_due(5) and saver.is_due(5, at_once=True)
    saver.after_step(agreed=True)
    saver.after_epoch()
    saver.finish()
    assert saver.save_now() == []
    saver.close(0.0)


def test_the_disk_is_waited_for_even_if_the_memory_fails(tmp_path: Path, state: TrainingState) -> None:
    """Loss: the last checkpoint is cut off because of the tier that was only a bonus."""
    fs = Refusing()
    saving = Saving(tmp_path, state, memory_fs=fs)

    def fail(_: object) -> None:
        raise BrokenPipeError

    fs.full = True
    saving.saver.after_step(agreed=True)
    with showing(fail), pytest.raises(BrokenPipeError):
        saving.saver.close(3.0)
    assert saving.durable.did == ["close 3"]


@pytest.mark.parametrize("first", ["dead", "alive", "of another run"])
def test_another_process_of_a_node_saves_at_once_for_a_dead_first_one_and_nothing_else(
    first: str, tmp_path: Path, state: TrainingState
) -> None:
    """Loss: the process that keeps a node's state is killed, and the others let their states go; or two processes write into one memory."""
    memory = NodeMemory(tmp_path, tmp_path / "run")
    memory.open()
    memory.keep(RunRecord("1-abc" if first != "of another run" else "1-def"))
    if first != "alive":
        memory.release()
    saver = CheckpointManager(Config(), state, state.capture, {}, [stand_in(tmp_path, tmp_path / "run", "1-abc", 1 << 20)])
    assert not saver.is_due(8) and saver.is_due(8, at_once=True)
    saver.after_step(agreed=True)
    state.end_epoch({"mAP50-95": 0.5})
    saver.after_epoch()
    saver.catch_up()
    assert newest(Catalogue(memory.path)) == (None, [])
    assert saver.save_now() == []
    found, _ = newest(Catalogue(memory.path))
    assert (None if found is None else found.content["step"]) == (7 if first == "dead" else None)
    saver.finish()
    saver.close(0.0)
    if first != "alive":
        memory.open(patience=0.0)  # it was let go
    memory.release()


# --- without anybody else ----------------------------------------------------------------------------------------------------


def in_thread(saver: CheckpointManager) -> tuple[threading.Thread, list[list[str]]]:
    """Saves from another thread, as the watchdog does; returns it and what failed."""
    failures: list[list[str]] = []
    return in_background(lambda: failures.append(saver.save_now())), failures


def test_all_tiers_hold_the_state_on_return(saving: Saving, state: TrainingState) -> None:
    """Loss: the process ends while its last state is on its way."""
    expected = part_digests(state.capture())
    thread, failures = in_thread(saving.saver)
    thread.join(20)
    assert failures == [[]] and saving.steps() == {"memory": 7, "disk": 7}
    for content in saving.contents().values():
        assert content is not None and part_digests(content) == expected
    assert saving.saver.save_now() == [], "twice does not matter"


class Blocking(DetectionLoss):
    """Waits in the middle of a step, as for a peer."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            self.reached.set()
            assert self.go_on.wait(30)
        return super().__call__(*arguments)


def training(state: TrainingState, loss: DetectionLoss, world: World, make_batch: MakeBatch) -> tuple[TrainingStep, Callable[[], object]]:
    state.model.train()
    config = TrainingConfig.model_validate({"optimizer": "sgd", "lr": 0.01, "warmup_epochs": 0})
    step = TrainingStep(state, loss, make_schedule(config, 3, 10), world, config)
    batches = [make_batch(0, (1, 2)), make_batch(0, (4, 5))]
    return step, lambda: step(batches, 2, 4, 64)


def parts(content: dict[str, Any] | None) -> dict[str, str]:
    """Digests; a step's learning rate is set at its beginning and is a function of the step."""
    assert content is not None
    return {part: digest for part, digest in part_digests(content).items() if part != "optimizer"}


def test_a_rescue_in_mid_step_saves_the_last_whole_steps_state(
    saving: Saving, state: TrainingState, world: World, make_batch: MakeBatch
) -> None:
    """Loss: a step is lost although it was complete; or what is saved is none, and no digest will ever tell."""
    loss = Blocking(at=6)  # the second micro-batch of the second step; the first one is measured before it is summed
    step, train = training(state, loss, world, make_batch)
    saving.boundary = step.boundary
    train()
    whole = parts(copy.deepcopy(state.capture()))
    trainer = in_background(train)
    assert loss.reached.wait(20)
    rescue, failures = in_thread(saving.saver)
    rescue.join(20)
    assert failures == [[]] and saving.steps() == {"memory": 8, "disk": 8}
    assert [parts(content) for content in saving.contents().values()] == [whole, whole]
    loss.go_on.set()
    trainer.join(20)
    assert state.step == 9, "and training can go on, should it be wanted"


def test_a_step_that_begins_while_the_state_is_saved_leaves_no_trace_in_it(
    tmp_path: Path, state: TrainingState, world: World, make_batch: MakeBatch
) -> None:
    """Loss: the next batch arrives at last, and its BatchNorm statistics get into the state that is just being saved."""

    class Slow(FileSystem):
        """Begins to write when it is let."""

        begun, go_on = threading.Event(), threading.Event()

        def create(self, path: Path) -> int:
            self.begun.set()
            assert self.go_on.wait(20)
            return super().create(path)

    fs, loss = Slow(), Blocking(at=6)
    saving = Saving(tmp_path, state, memory_fs=fs)
    step, train = training(state, loss, world, make_batch)
    saving.boundary = step.boundary
    train()
    whole = parts(copy.deepcopy(state.capture()))
    rescue, failures = in_thread(saving.saver)
    assert fs.begun.wait(20)
    trainer = in_background(train)
    loss.reached.wait(1.0)
    fs.go_on.set()
    rescue.join(20)
    loss.go_on.set()
    trainer.join(20)
    assert failures == [[]]
    assert [parts(content) for content in saving.contents().values()] == [whole, whole]


def test_a_state_that_changes_is_waited_for(saving: Saving, state: TrainingState) -> None:
    """Loss: half of one step and half of another."""
    changing, done = threading.Event(), threading.Event()

    def change() -> None:
        with state.changing:
            changing.set()
            assert done.wait(20)
            state.step, state.samples = 8, 64

    trainer = in_background(change)
    assert changing.wait(10)
    rescue, failures = in_thread(saving.saver)
    rescue.join(0.1)
    assert rescue.is_alive() and saving.steps() == {"memory": None, "disk": None}
    done.set()
    rescue.join(20)
    trainer.join(10)
    assert failures == [[]] and saving.steps() == {"memory": 8, "disk": 8}


def test_a_state_that_never_stops_changing_is_not_saved(saving: Saving, state: TrainingState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: as above, under a whole digest; or a process that never ends, because it waits for a GPU that hangs."""
    monkeypatch.setattr("gai_yolo.checkpointing.manager.STATE_LOCK_PATIENCE", 0.1)
    with state.changing:
        rescue, failures = in_thread(saving.saver)
        rescue.join(20)
    assert failures == [["the state is just changing and cannot be saved"]]
    assert saving.steps() == {"memory": None, "disk": None}
    assert saving.saver.save_now() == [], "the lock was not kept"


def test_a_rescue_waits_for_the_training_threads_own_last_save(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: the watchdog ends the process in the middle of the save that was in time."""
    monkeypatch.setattr("gai_yolo.checkpointing.manager.STATE_LOCK_PATIENCE", 0.1)
    gate = Gate()
    saving = Saving(tmp_path, state, disk_fs=gate)
    gate.shut()
    first, first_failures = in_thread(saving.saver)
    assert gate.reached.wait(10)
    second, second_failures = in_thread(saving.saver)
    second.join(0.4)
    assert second.is_alive()
    gate.open_.set()
    first.join(20)
    second.join(20)
    assert first_failures == second_failures == [[]] and saving.steps() == {"memory": 7, "disk": 7}


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_one_tier_that_fails_is_reported_and_the_other_is_saved(tier: str, tmp_path: Path, state: TrainingState) -> None:
    """Loss: full memory, and the disk, which had room, is never tried."""
    full = Refusing()
    full.full = True
    saving = Saving(tmp_path, state, **{f"{tier}_fs": full})
    (failure,) = saving.saver.save_now()
    assert "No space left" in failure
    assert saving.steps() == {"memory": 7, "disk": 7, tier: None}


def test_a_tier_that_was_taken_over_is_reported(saving: Saving) -> None:
    """Loss: a process that should say that another job has its run ends with a traceback."""
    raise_fence(saving.runs["disk"].parent / ".disk.fence")
    (failure,) = saving.saver.save_now()
    assert "taken over by another job" in failure and saving.steps() == {"memory": 7, "disk": None}


def test_a_folder_that_cannot_be_read_is_reported(tmp_path: Path, state: TrainingState) -> None:
    """Loss: the thread that was to end the process dies of a refusal."""
    fs = Refusing()
    fs.unreadable = True
    saving = Saving(tmp_path, state, memory_fs=fs)
    (failure,) = saving.saver.save_now()
    assert os.strerror(errno.EACCES) in failure and saving.steps()["disk"] == 7


def test_a_state_that_cannot_be_had_is_reported(saving: Saving, state: TrainingState) -> None:
    """Loss: a GPU that is gone, and a thread that dies of it with the lock in its hand."""

    def gone() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    saving.boundary = gone
    assert saving.saver.save_now() == ["CUDA error: an illegal memory access was encountered"]
    rescue, failures = in_thread(saving.saver)
    rescue.join(10)
    assert failures == [["CUDA error: an illegal memory access was encountered"]]
    saving.boundary = lambda: {**state.capture(), "model_state_dict": {"w": torch.ones(1), "bad": lambda: None}}
    assert len(saving.saver.save_now()) == 2, "cannot be pickled"
