"""Places where the state is saved: the run folder on a disk here, a node's memory in `memory_tier`. All are the same to the manager, with
one kind of schedule and one way to save at once; they differ in who brings a copy there beside the training.

What is saved goes through `Store.publish`, whichever the tier and whoever does it.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, Literal, cast

import torch

from gai_yolo.checkpointing.background_writer import HANGING, BackgroundWriter
from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.checkpointing.schedule import Cost, Schedule
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.checkpointing.writer_process import Answer, Job, WriterProcess
from gai_yolo.checkpointing.writer_start import SpareWriter
from gai_yolo.config import Config
from gai_yolo.errors import CheckpointError, transient
from gai_yolo.store.manifest import Manifest
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store

Takes = Literal["due", "all", "nothing"]
"""What a tier takes beside what is saved at once: the states that its own schedule asks for, and the epochs that are due or the best;
all that is saved on any tier of any rank, so that the tiers of all nodes hold the same step; nothing."""


class Tier(ABC):
    """Saves states beside the training, and at once. All but `save_now` is for the training thread.

    Args:
        opened: the store, with the right to publish, for the time of one save; None where this process is not to save just now.
        takes: what is saved here.
        policy: what is to stay when a state was saved at once; None: who writes beside the training sees to it.
    """

    def __init__(
        self, opened: Callable[[], AbstractContextManager[Store | None]], schedule: Schedule, takes: Takes, policy: Policy | None
    ) -> None:
        self.opened, self.schedule, self.takes, self._policy = opened, schedule, takes, policy
        self._publishing = threading.Lock()
        self.num_writes = 0
        """Pieces that were written by `save_now`: how another thread sees it move."""

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved; to be called before each step. Waits if that step must not begin before the
        last save is complete."""
        self.poll(wait=self.schedule.outruns(step))
        return self.schedule.is_due(step) and self.accepts

    def save(self, manifest: Manifest, content: dict[str, Any]) -> None:
        """Copy a state and have it written. It may change as soon as this returns."""
        self.hand_over(manifest, content)
        self.schedule.saved(manifest.position.step)

    def save_now(self, manifest: Manifest, content: dict[str, Any]) -> None:
        """Write a state in the calling thread, whichever that is; it is complete on return. Waits for another thread that does the same.
        Raises as `Store.publish`."""
        with self._publishing, self.opened() as store:
            if store is None:
                return
            store.publish(manifest, lambda file: torch.save(content, cast(BinaryIO, _Noticed(file, self))))
            if self._policy is not None:
                store.prune(self._policy)

    def holds(self, manifest: Manifest) -> bool:
        """Whether a complete checkpoint of that kind is there, at that step."""
        with self.opened() as store:
            return store is not None and any(
                (one.kind, one.position.step) == (manifest.kind, manifest.position.step) and store.defect_of(one) is None
                for one in store.listing().present
            )

    @property
    @abstractmethod
    def accepts(self) -> bool:
        """Whether a state that is handed over now has a chance to be written."""

    @abstractmethod
    def poll(self, wait: bool) -> None:
        """Take note of what was written, with `wait` once what is on its way is complete. Raises as `BackgroundWriter.poll`."""

    @abstractmethod
    def hand_over(self, manifest: Manifest, content: dict[str, Any]) -> None:
        """Copy a state for who writes beside the training."""

    @abstractmethod
    def finish(self) -> None:
        """Wait, at the end of training, until everything is complete.

        Raises:
            CheckpointError: it could not be written, for as long as `snapshots.patience_seconds`.
        """

    @abstractmethod
    def close(self, patience: float) -> None:
        """To be called whatever happened; waits at most so many seconds for what is on its way to a disk."""

    @property
    def summary(self) -> str:
        """For people, at the end; empty if there is nothing to say."""
        return ""


class _Noticed:
    """A file whose writes are counted."""

    def __init__(self, file: BinaryIO, tier: Tier) -> None:
        self._file, self._tier, self.flush = file, tier, file.flush

    def write(self, data: bytes) -> int:
        self._tier.num_writes += 1
        return self._file.write(data)


class DiskTier(Tier):
    """The run folder, on the rank that writes: takes what is due mid-epoch, and epochs that are due or the best, and a process of its own
    writes them in the background.

    Args:
        config: settled.
        state: from which the run goes on.
        spare: is the first writer.
        alive: is called while the training thread waits here for a disk.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        state: TrainingState,
        spare: SpareWriter | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        snapshots, size = config.snapshots, state.expected_bytes()
        super().__init__(lambda: nullcontext(store), Schedule.of_disk(snapshots, state.step, size), "due", policy=None)
        self._config, self._size, self._pinned = config, size, state.is_on_gpu
        policy = Policy(snapshots.keep, snapshots.keep_epochs, snapshots.keep_every, state.best_since)
        self.writer = BackgroundWriter(lambda: WriterProcess(store.run, store.fence, policy, spare), self._written, alive=alive)
        self.writer.spare.append(StateBuffer(size, self._pinned))  # now, so that the first capture does not wait for memory
        self._is_given_up = False
        self.count, self.write_seconds = 0, 0.0
        """Checkpoints that are complete on the disk, and the seconds that writing them took beside the training."""

    @property
    def accepts(self) -> bool:
        return self.writer.accepts_snapshots

    def poll(self, wait: bool) -> None:
        assert not wait, "no number of steps is promised of a disk"
        self.writer.poll()

    def hand_over(self, manifest: Manifest, content: dict[str, Any]) -> None:
        started = time.monotonic()
        buffer = self.writer.spare.pop() if self.writer.spare else StateBuffer(self._size, self._pinned)
        buffer.fill(content)
        self.writer.submit(Job(manifest, buffer, time.monotonic() - started))

    @property
    def summary(self) -> str:
        return f"{self.count} checkpoints and snapshots written, in {self.write_seconds:.1f} s beside the training"

    def finish(self) -> None:
        patience = self._config.snapshots.patience_seconds
        if not self.writer.drain(patience, HANGING, while_moving=True):
            self._is_given_up = True
            raise transient(
                CheckpointError(
                    f"{', '.join(self.writer.unwritten)}: could not be written within snapshots.patience_seconds; make room and start "
                    "again: it goes on from the newest complete checkpoint."
                )
            )

    def close(self, patience: float) -> None:
        patience = 0.0 if self._is_given_up else patience  # `finish` has waited for it in vain
        deadline = time.monotonic() + patience
        self.writer.drain(patience)
        self.writer.close(max(0.0, deadline - time.monotonic()))

    def _written(self, job: Job, answer: Answer) -> None:
        self.count += 1
        self.write_seconds += answer.seconds
        threads = self._config.training.threads
        cores = max(1, threads if isinstance(threads, int) else torch.get_num_threads())
        self.schedule.measured(Cost(answer.seconds, job.stall, answer.cpu_seconds / cores))
