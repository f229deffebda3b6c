"""Everything that saves the state on this rank: on the disk (rank 0), in memory (the first rank of each node)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from gai_yolo.checkpointing.disk_tier import DiskTier, make_manifest
from gai_yolo.checkpointing.memory_tier import MemoryTier
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.store.manifest import Kind, Manifest

STATE_LOCK_PATIENCE = 2.0
"""Seconds to wait for the training thread to come to a whole step's state."""


class CheckpointManager:
    """Asks and feeds the tiers of this rank; most ranks have none.

    Args:
        identity: what is saved beside the state to recognise the run.
        fingerprint: of the configuration.
        boundary: the state after the last completed step, from any thread, with `state.changing` held.
        substitute: saves a state where the node's first process, which is another one, would have; see `memory_tier.save_for_the_first`.
    """

    def __init__(
        self,
        state: TrainingState,
        boundary: Callable[[], dict[str, Any]],
        identity: dict[str, Any],
        fingerprint: str,
        durable: DiskTier | None,
        memory: MemoryTier | None,
        substitute: Callable[[Manifest, dict[str, Any]], None] | None = None,
    ) -> None:
        self.state, self.boundary, self.identity, self.fingerprint = state, boundary, identity, fingerprint
        self.durable, self.memory, self.substitute = durable, memory, substitute
        self._durable_is_due = False
        self._saving = threading.Lock()
        self.stall = 0.0
        """Seconds that the training loop has stood still for saving."""

    def is_due(self, step: int, at_once: bool = False) -> bool:
        """Whether the state after `step` steps is to be saved. Asked before the last of them, so that all ranks can be told to compare
        their states first, and to save at the same step.

        Args:
            at_once: also if no interval is over.
        """
        with self._stalling():
            self._durable_is_due = self.durable is not None and (self.durable.is_due(step) or at_once)
            in_memory = self.memory is not None and self.memory.is_due(step)
        return self._durable_is_due or in_memory or at_once

    def after_step(self, agreed: bool) -> None:
        """To be called after each optimizer step; `agreed` if it was due on any rank. Nothing is saved while steps go bad: the run may
        have to go back."""
        if not agreed or self.state.bad_in_row:
            return
        with self._stalling():
            # First for the disk: the memory's thread begins to write at once, and would take the interpreter from the other's copy.
            if self._durable_is_due and self.durable is not None:
                self.durable.save_step(self.state)
            if self.memory is not None:
                self.memory.save(self._manifest("step"), self._whole())

    def after_epoch(self) -> None:
        """To be called when an epoch is complete, its evaluation included."""
        with self._stalling():
            if self.durable is not None:
                self.durable.after_epoch(self.state)
            if self.memory is not None:
                self.memory.save(self._manifest("epoch"), self._whole())

    def catch_up(self) -> None:
        """To be called before the first step: the disk gets what only another tier has; see `DiskTier.catch_up`."""
        if self.durable is not None:
            self.durable.catch_up(self.state)

    def finish(self) -> None:
        """To be called after the last epoch: everything is on the disk on return; as `DiskTier.finish`."""
        if self.durable is not None:
            self.durable.finish()

    def save_now(self) -> list[str]:
        """Save the last completed step's state on all tiers of this rank, without another process, without any collective, from any
        thread, in the middle of a step too. Waits for another thread that is doing the same: its work counts for both.

        Returns:
            What failed, for people.
        """
        with self._saving:
            if not self.state.changing.acquire(timeout=STATE_LOCK_PATIENCE):
                return ["the state is just changing and cannot be saved"]
            try:
                if not self.state.is_whole:
                    return ["the step was broken off while it changed the state, which is worth nothing now"]
                with _own_stream():
                    return self._save_on_all_tiers()
            except Exception as error:
                # The state cannot be had: a GPU that is gone, say.
                return [str(error) or type(error).__name__]
            finally:
                self.state.changing.release()

    def _save_on_all_tiers(self) -> list[str]:
        content, failures = {**self.boundary(), **self.identity}, []
        for save in self._direct():
            try:
                save(self._manifest("step"), content)
            except Exception as error:
                # Whatever it is, the other tier is to have its chance; torch's archive writer has its own words for a disk that refuses.
                failures.append(str(error) or type(error).__name__)
        return failures

    def close(self, patience: float) -> None:
        """To be called whatever happened; waits at most so many seconds for what is on its way to the disk."""
        try:
            if self.memory is not None:
                self.memory.close()
        finally:
            if self.durable is not None:
                self.durable.close(patience)

    @property
    def summary(self) -> str:
        """For people, at the end."""
        written = f"{self.durable.summary}, " if self.durable else ""
        return f"{written}training stood still for saving for {self.stall:.2f} s"

    def _direct(self) -> list[Callable[[Manifest, dict[str, Any]], object]]:
        own: list[Callable[[Manifest, dict[str, Any]], object]] = [
            tier.save_now for tier in (self.memory, self.durable) if tier is not None
        ]
        return own if self.substitute is None else [*own, self.substitute]

    def _whole(self) -> dict[str, Any]:
        return {**self.state.capture(), **self.identity}

    def _manifest(self, kind: Kind) -> Manifest:
        return make_manifest(kind, self.state, self.fingerprint)

    @contextlib.contextmanager
    def _stalling(self) -> Any:
        started = time.monotonic()
        yield
        self.stall += time.monotonic() - started


def _own_stream() -> contextlib.AbstractContextManager[object]:
    """On a GPU, a queue of its own: the training thread's may wait for a peer for ever."""
    if not torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
