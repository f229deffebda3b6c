"""The newest state of a run in a node's memory: survives its processes, not the node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch

from gai_yolo.checkpointing.capture import StateBuffer, open_state
from gai_yolo.errors import Refusal, RunFolderBusy
from gai_yolo.store.manifest import Manifest
from gai_yolo.store.node_memory import NodeMemory, free_memory
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store

WATCHED_EVERY = 1.0
"""Seconds between two looks at a write that is waited for."""
NEWEST_ONLY = Policy(keep_steps=0, keep_epochs=0)
"""The newest complete one is always kept."""
ASSUMED_BYTES_PER_SECOND = 300e6
"""Of serialising, hashing and writing a state that was not measured yet."""


def keep(store: Store, manifest: Manifest, content: Mapping[str, Any], moved: Callable[[], None] = lambda: None) -> None:
    """Write a state, complete on return, and let those before it go; raises as `Store.publish`.

    Args:
        moved: is called for each piece that is written.
    """
    store.publish(manifest, lambda file: torch.save(dict(content), cast(BinaryIO, _Noticed(file, moved))))
    store.prune(NEWEST_ONLY)


def save_for_the_first(base: Path, run: Path, run_id: str, size: int, manifest: Manifest, content: Mapping[str, Any]) -> None:
    """Keep a state in this node's memory on behalf of the node's first process, if that is dead. In the calling thread.

    Args:
        base: memory-backed storage.
        run: the run folder.
        size: bytes that the state takes at most.

    Raises:
        OSError: the memory refuses.
        RecordError: its run record is damaged.
    """
    memory = NodeMemory(base, run)
    try:
        memory.open(patience=0.0)
    except Refusal:
        return  # it lives, and saves by itself; or nobody on this node can
    try:
        record = memory.record()
        if record is None or record.run_id != run_id:
            return  # the first process kept nothing here, or another run has come
        memory.keep(record)
        if free_memory(memory.store) >= size:
            keep(memory.store, manifest, content)
    finally:
        memory.release()


class _Noticed:
    """A file that tells of each write."""

    def __init__(self, file: BinaryIO, moved: Callable[[], None]) -> None:
        self._file, self._moved = file, moved

    def write(self, data: bytes) -> int:
        self._moved()
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class MemoryTier:
    """Keeps the newest state, through the same store as on disks.

    The training thread copies the state; a thread writes the copy, which is a few long calls that leave the interpreter to
    others. With an interval in steps no step begins while more than that many steps would be lost.

    Args:
        store: in memory-backed storage, with the right to publish.
        interval: in steps, or `auto`: at most `max_overhead` of the time.
        expected_bytes: size of a state.
        tell: is given sentences for people; from the training thread only.
        alive: is called while the training thread waits for something that moves.
    """

    def __init__(
        self,
        store: Store,
        interval: int | Literal["auto"],
        max_overhead: float,
        expected_bytes: int,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._alive, self._num_writes = alive, 0
        self.store, self.interval, self.max_overhead, self._tell, self._clock = store, interval, max_overhead, tell, clock
        self._buffer = StateBuffer(expected_bytes, pinned=False)
        self._thread = ThreadPoolExecutor(1, "memory-tier")
        self._writing: Future[float] | None = None
        self._publishing = threading.Lock()
        self._step, self._saved_at = 0, clock()
        self._cost = expected_bytes / ASSUMED_BYTES_PER_SECOND
        self._stall = 0.0
        self._is_failing, self._is_lost = False, False

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved; to be called before each step."""
        # One step may end while the state before it is written, so states are saved one step more often than may be lost.
        every = None if self.interval == "auto" else max(1, self.interval - 1)
        if self._writing is not None and (self._writing.done() or (every is not None and step > self._step + (every > 1))):
            self._end_writing()
        if self._is_lost:
            return False
        if every is not None:
            return step % every == 0
        return self._clock() - self._saved_at >= self._cost / self.max_overhead

    def save(self, manifest: Manifest, content: Mapping[str, Any]) -> None:
        """Copy a state and have it written; waits for the one before."""
        self._end_writing()
        if self._is_lost:
            return
        started = self._clock()
        self._buffer.fill(dict(content))
        while not self._buffer.ready():
            time.sleep(0.001)
        self._stall = self._clock() - started
        self._step, self._saved_at = manifest.position.step, self._clock()
        self._writing = self._thread.submit(self._write, manifest)

    def save_now(self, manifest: Manifest, content: Mapping[str, Any]) -> None:
        """Write a state in the calling thread, whichever that is; it is complete on return. Waits for what this tier's own thread is
        writing.

        Raises:
            OSError: there is no room.
            RunFolderBusy: another job uses this node's memory for the run.
        """
        with self._publishing:
            keep(self.store, manifest, content, self._note_write)

    def close(self) -> None:
        """Wait for what is being written."""
        try:
            self._end_writing()
        finally:
            self._thread.shutdown()
            self._buffer.close()

    def _write(self, manifest: Manifest) -> float:
        started = self._clock()
        state = open_state(self._buffer.descriptor, self._buffer.content)
        self.save_now(manifest, state)
        return self._clock() - started

    def _note_write(self) -> None:
        self._num_writes += 1

    def _end_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            seen = -1
            while not wait([writing], WATCHED_EVERY).done:
                if seen != self._num_writes:
                    self._alive()
                seen = self._num_writes
            seconds = writing.result()
        except RunFolderBusy as busy:
            self._is_lost = True
            self._tell(f"{busy} No state is kept in this node's memory any more.")
        except Exception as error:
            # Also torch's own errors and a store that cannot be read: whatever it is, training goes on and somebody is told.
            if not self._is_failing:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                self._tell(f"{self.store.run}: the state cannot be kept in memory ({reason}); training goes on")
            self._is_failing = True
        else:
            self._is_failing = False
            self._cost = (self._cost + self._stall + seconds) / 2
