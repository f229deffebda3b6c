"""A node's memory as a tier: the newest state of a run, which survives the node's processes, not the node."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gai_yolo.checkpointing.capture import StateBuffer, open_state
from gai_yolo.checkpointing.schedule import Cost, Schedule
from gai_yolo.checkpointing.tier import Takes, Tier
from gai_yolo.errors import Refusal, RunFolderBusy
from gai_yolo.log import OF_NODE
from gai_yolo.store.manifest import Manifest
from gai_yolo.store.node_memory import NodeMemory, free_memory
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store

logger = logging.getLogger(__name__)

WATCHED_EVERY = 1.0
"""Seconds between two looks at a write that is waited for."""
NEWEST_ONLY = Policy(keep_steps=0, keep_epochs=0)
"""The newest complete one is always kept."""


@contextlib.contextmanager
def memory_of_the_first(base: Path, run: Path, run_id: str, size: int) -> Iterator[Store | None]:
    """The memory of this node on behalf of its first process, if that is dead: another process of the node then saves there at once. None
    if it lives, and saves by itself, if nobody can, or if there is no room.

    Args:
        base, run: as for `NodeMemory`.
        size: bytes that the state takes at most.

    Raises:
        OSError: the memory refuses.
        RecordError: its run record is damaged.
    """
    memory = NodeMemory(base, run)
    try:
        memory.open(patience=0.0)
    except Refusal:
        yield None
        return
    try:
        record = memory.record()
        if record is None or record.run_id != run_id:
            yield None  # the first process kept nothing here, or another run has come
            return
        memory.keep(record)
        yield memory.store if free_memory(memory.store) >= size else None
    finally:
        memory.release()


class MemoryTier(Tier):
    """Keeps the newest state, through the same store as on disks.

    The training thread copies the state; a thread writes the copy, which is a few long calls that leave the interpreter to
    others. With an interval in steps no step begins while more than that many steps would be lost.

    Args:
        opened: the store in memory-backed storage, or `memory_of_the_first`.
        path: where it is, for people.
        size: bytes of a state, about.
        alive: is called while the training thread waits for something that moves.
    """

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[Store | None]],
        path: Path,
        schedule: Schedule,
        size: int,
        alive: Callable[[], None] = lambda: None,
        takes: Takes = "all",
    ) -> None:
        super().__init__(opened, schedule, takes, NEWEST_ONLY)
        self.path, self._alive = path, alive
        self._buffer = StateBuffer(size, pinned=False)
        self._thread = ThreadPoolExecutor(1, "memory-tier")
        self._writing: Future[float] | None = None
        self._stall = 0.0
        self._is_failing, self._is_lost = False, False

    @property
    def accepts(self) -> bool:
        return not self._is_lost

    def poll(self, wait: bool) -> None:
        if self._writing is not None and (wait or self._writing.done()):
            self._end_writing()

    def hand_over(self, manifest: Manifest, content: dict[str, Any]) -> None:
        self._end_writing()
        if self._is_lost:
            return
        started = time.monotonic()
        self._buffer.fill(content)
        while not self._buffer.ready():
            time.sleep(0.001)
        self._stall = time.monotonic() - started
        # An epoch's metric is for the disk: here retention would keep the best beside the newest, and there is room for one.
        self._writing = self._thread.submit(self._write, replace(manifest, metric=None))

    def finish(self) -> None:
        self._end_writing()

    def close(self, patience: float) -> None:  # noqa: ARG002
        try:
            self._end_writing()
        finally:
            self._thread.shutdown()
            self._buffer.close()

    def _write(self, manifest: Manifest) -> float:
        started = time.monotonic()
        self.save_now(manifest, open_state(self._buffer.descriptor, self._buffer.content))
        return time.monotonic() - started

    def _end_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            seen = -1
            while not wait([writing], WATCHED_EVERY).done:
                if seen != self.num_writes:
                    self._alive()
                seen = self.num_writes
            seconds = writing.result()
        except RunFolderBusy as busy:
            self._is_lost = True
            logger.warning(f"{busy} No state is kept in this node's memory any more.", extra=OF_NODE)
        except Exception as error:
            # Also torch's own errors and a store that cannot be read: whatever it is, training goes on and somebody is told.
            if not self._is_failing:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                logger.warning(f"{self.path}: the state cannot be kept in memory ({reason}); training goes on", extra=OF_NODE)
            self._is_failing = True
        else:
            self._is_failing = False
            self.schedule.measured(Cost(write=seconds, stall=self._stall, cpu=seconds))


def stand_in(base: Path, run: Path, run_id: str, size: int) -> MemoryTier:
    """The tier of a node's other processes: takes nothing, and saves at once what the first process cannot any more, if that is dead."""
    opened = partial(memory_of_the_first, base, run, run_id, size)
    return MemoryTier(opened, base, Schedule.never(), size=0, takes="nothing")
