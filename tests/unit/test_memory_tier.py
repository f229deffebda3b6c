"""The newest state in a node's memory: always one that is complete, and training never ends because of it."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pytest
import torch

from gai_yolo.checkpointing import memory_tier as memory
from gai_yolo.checkpointing.memory_tier import MemoryTier
from gai_yolo.checkpointing.recovery import newest
from gai_yolo.checkpointing.schedule import ASSUMED_OF_MEMORY, Schedule
from gai_yolo.errors import RunFolderBusy
from gai_yolo.log import showing
from gai_yolo.sections import SnapshotsConfig
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import FileSystem
from gai_yolo.store.lease import raise_fence
from tests.states import Gate, Refusing, content_of, manifest_of, names, store_at

SIZE = 1 << 16
"""Expected bytes of a state."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tier_at(
    run: Path,
    fs: FileSystem | None = None,
    interval: int | Literal["auto"] = 5,
    clock: Callable[[], float] = time.monotonic,
    alive: Callable[[], None] = lambda: None,
) -> MemoryTier:
    store = store_at(run, fs)
    return MemoryTier(lambda: nullcontext(store), run, Schedule.of_memory(interval, SnapshotsConfig(), 0, SIZE, clock), SIZE, alive)


class Kept:
    """A tier over a folder."""

    def __init__(self, run: Path, fs: FileSystem | None = None, interval: int | Literal["auto"] = 5) -> None:
        self.run, self.clock = run, Clock()
        self.tier = tier_at(run, fs, interval, self.clock)

    def save(self, step: int) -> None:
        content = content_of(step)
        self.tier.save(manifest_of(content), content)

    def save_now(self, step: int) -> None:
        content = content_of(step)
        self.tier.save_now(manifest_of(content), content)

    def newest(self) -> int | None:
        found, passed_over = newest(Catalogue(self.run))
        assert passed_over == []
        if found is None:
            return None
        step: int = found.content["step"]
        assert torch.equal(found.content["model_state_dict"]["w"], content_of(step)["model_state_dict"]["w"])
        return step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_a_state_is_due_every_so_many_steps(run: Path) -> None:
    """Loss: more steps than the configuration says."""
    kept, saved = Kept(run), []
    for step in range(1, 21):
        if kept.tier.is_due(step) or step == 9:  # as another tier asks for
            saved.append(step)
            kept.save(step)
    assert saved == [4, 8, 9, 13, 17]


def test_auto_saves_as_often_as_its_cost_allows(run: Path) -> None:
    """Loss: training that is slower than promised; or minutes lost where a second would do."""
    kept = Kept(run, interval="auto")
    pause = SIZE / ASSUMED_OF_MEMORY / 0.01
    kept.clock.now = 0.9 * pause
    assert not kept.tier.is_due(1)
    kept.clock.now = pause
    assert kept.tier.is_due(2)
    kept.save(2)
    assert not kept.tier.is_due(3)


def test_what_is_kept_is_the_state_at_the_time_of_saving(run: Path, told: list[str]) -> None:
    """Loss: half of one step and half of another."""
    gate = Gate()
    kept, content = Kept(run, gate), content_of(5)
    kept.tier.save(manifest_of(content), content)
    content["model_state_dict"]["w"].zero_()
    kept.tier.close(0.0)
    assert kept.newest() == 5 and told == []


def test_only_the_newest_is_kept_and_the_one_before_until_it_is_complete(run: Path) -> None:
    """Loss: a node's memory fills up; or a process that is killed while it saves leaves nothing."""
    gate = Gate()
    kept = Kept(run, gate)
    kept.save(5)
    assert not kept.tier.is_due(7)  # waits for it
    gate.shut()
    kept.save(10)
    assert gate.reached.wait(10)
    assert kept.newest() == 5
    gate.open_.set()
    kept.tier.close(0.0)
    assert kept.newest() == 10
    assert names(run) == ["step_00000010.json", "step_00000010.pt"]


def test_the_state_after_an_epoch_takes_the_place_of_the_one_before_its_evaluation(run: Path) -> None:
    """Loss: two states in memory that was made for one; or the evaluation is done again."""
    kept = Kept(run)
    kept.tier.save_now(manifest_of(content_of(10, 0)), content_of(10, 0))
    kept.tier.save_now(manifest_of(content_of(10, 1), "epoch"), content_of(10, 1))
    assert names(run) == ["epoch_001.json", "epoch_001.pt"]


def test_no_step_begins_while_too_many_would_be_lost(run: Path) -> None:
    """Loss: memory that is slower than the steps, and a crash that costs more of them than the configuration says."""
    gate = Gate()
    kept = Kept(run, gate)
    gate.shut()
    kept.save(5)
    assert not kept.tier.is_due(6), "one step may go on meanwhile"
    waiting = in_background(lambda: kept.tier.is_due(7))
    waiting.join(0.2)
    assert waiting.is_alive() and kept.newest() is None
    gate.open_.set()
    waiting.join(10)
    assert kept.newest() == 5


def test_auto_never_holds_up_a_step(run: Path) -> None:
    """Loss: training waits for memory that nobody has promised anything of."""
    gate = Gate()
    kept = Kept(run, gate, "auto")
    gate.shut()
    kept.save(5)
    assert [kept.tier.is_due(step) for step in range(6, 50)] == [False] * 44
    gate.open_.set()
    kept.tier.close(0.0)
    assert kept.newest() == 5


def test_full_memory_is_told_once_and_training_goes_on(run: Path, told: list[str]) -> None:
    """Loss: the job ends because somebody else fills the node's memory; or a line at every step; or the old state is gone too."""
    fs = Refusing()
    kept = Kept(run, fs)
    kept.save(5)
    kept.tier.is_due(7)
    fs.full = True
    for step in (10, 15):
        kept.save(step)
        kept.tier.is_due(step + 2)
    (sentence,) = told
    assert str(run) in sentence and "No space left on device" in sentence and "training goes on" in sentence
    assert kept.newest() == 5
    fs.full = False
    kept.save(20)
    kept.tier.is_due(22)
    assert kept.newest() == 20
    fs.full = True
    kept.save(25)
    kept.tier.close(0.0)
    assert len(told) == 2, "that it happens again is news"
    assert names(run) == ["step_00000020.json", "step_00000020.pt"], "no drafts are left in memory that is short"


def test_a_folder_that_cannot_be_looked_into_is_told_and_training_goes_on(run: Path, told: list[str]) -> None:
    """Loss: one rank raises a refusal of its own, and the others wait for it."""
    fs = Refusing()
    kept = Kept(run, fs)
    fs.unreadable = True
    kept.save(5)
    assert not kept.tier.is_due(7)
    assert len(told) == 1 and "training goes on" in told[0]


def test_a_folder_that_somebody_removed_is_told_and_training_goes_on(run: Path, told: list[str]) -> None:
    """Loss: a clean-up of /dev/shm ends every job on the machine."""
    kept = Kept(run)
    for folder in ("snapshots", "checkpoints"):
        (run / folder).rmdir()
    run.rmdir()
    kept.save(5)
    kept.tier.close(0.0)
    assert len(told) == 1 and "training goes on" in told[0]


def test_a_tier_that_was_taken_over_keeps_nothing_any_more(run: Path, told: list[str]) -> None:
    """Loss: two jobs that remove each other's states."""
    kept = Kept(run)
    raise_fence(run.parent / f".{run.name}.fence")
    kept.save(5)
    kept.tier.is_due(7)
    assert not kept.tier.is_due(10)
    kept.save(10)
    assert len(told) == 1 and "No state is kept in this node's memory" in told[0]
    assert kept.newest() is None
    with pytest.raises(RunFolderBusy):
        kept.save_now(11)


@pytest.mark.parametrize("step", [5, 7])
def test_a_rescue_waits_for_what_is_being_written(step: int, run: Path, told: list[str]) -> None:
    """Loss: two threads publish and prune at once, and the one takes the other's state away, or leaves a second copy."""
    gate = Gate()
    kept = Kept(run, gate)
    gate.shut()
    kept.save(5)
    assert gate.reached.wait(10)
    rescue = in_background(lambda: kept.save_now(step))
    rescue.join(0.2)
    assert rescue.is_alive()
    gate.open_.set()
    rescue.join(10)
    kept.tier.close(0.0)
    assert kept.newest() == step and told == []
    assert names(run) == [f"step_{step:08d}.json", f"step_{step:08d}.pt"]


def test_many_threads_that_save_at_once_leave_the_newest(run: Path, told: list[str]) -> None:
    """Loss: as above, in an order that nobody thought of."""
    kept = Kept(run, interval=1)
    failures: list[Exception] = []

    def rescue(step: int) -> None:
        try:
            kept.save_now(step)
        except Exception as error:
            failures.append(error)

    threads = []
    for step in range(1, 21):
        kept.save(step)
        threads.append(in_background(lambda step=step: rescue(step)))  # type: ignore[misc]
    for thread in threads:
        thread.join(10)
    kept.tier.close(0.0)
    assert failures == [] and told == []
    assert names(run) == ["step_00000020.json", "step_00000020.pt"]


def test_closing_waits_for_the_last_state_and_gives_the_memory_back(run: Path) -> None:
    """Loss: the last state is lost for want of a moment; or every start leaks a state's size."""
    gate = Gate()
    gc.collect()  # of other tests
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    kept = Kept(run, gate)
    gate.shut()
    kept.save(5)
    closing = in_background(partial(kept.tier.close, 0.0))
    closing.join(0.1)
    assert closing.is_alive()
    gate.open_.set()
    closing.join(10)
    kept.tier.close(0.0)  # twice does not matter
    assert kept.newest() == 5
    del kept, closing
    gc.collect()  # a mapping goes when nobody looks at it any more
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_closing_gives_the_memory_back_even_if_telling_fails(run: Path) -> None:
    """Loss: a console that is gone, and the durable state is not waited for."""
    fs = Refusing()
    before = threading.enumerate()

    def fail(_: object) -> None:
        raise BrokenPipeError

    tier = tier_at(run, fs)
    fs.full = True
    tier.save(manifest_of(content_of(5)), content_of(5))
    with showing(fail), pytest.raises(BrokenPipeError):
        tier.close(0.0)
    assert [thread for thread in threading.enumerate() if thread not in before] == []


@pytest.mark.parametrize("moves", [True, False])
def test_who_waits_for_a_write_that_moves_says_so(moves: bool, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: slow storage under `elastic.memory_folder` is taken for a step that hangs; or a write that hangs is waited for."""
    monkeypatch.setattr(memory, "WATCHED_EVERY", 0.05)

    def slow(_content: dict[str, Any], file: BinaryIO) -> None:
        for _ in range(40):
            time.sleep(0.01)
            if moves:
                file.write(b"x")

    monkeypatch.setattr(torch, "save", slow)
    said: list[int] = []
    tier = tier_at(run, alive=lambda: said.append(1))
    content = content_of(5)
    tier.save(manifest_of(content), content)
    tier.close(0.0)
    assert len(said) >= 3 if moves else len(said) == 1, "the first look only"
