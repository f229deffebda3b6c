"""Everything that saves the state on this rank: on the disk (rank 0), in memory (the first rank of each node)."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gai_yolo.checkpointing.completion import reason_to_end
from gai_yolo.checkpointing.schedule import asks_for
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.checkpointing.tier import Tier
from gai_yolo.config import Config, fingerprint
from gai_yolo.detector.weights import Origin
from gai_yolo.store.manifest import Kind, Manifest, Position

STATE_LOCK_PATIENCE = 2.0
"""Seconds to wait for the training thread to come to a whole step's state."""


class CheckpointManager:
    """Asks and feeds the tiers of this rank; most ranks have none that takes anything but what is saved at once.

    Args:
        boundary: the state after the last completed step, from any thread, with `state.changing` held.
        identity: what is saved beside the state to recognise the run.
        tiers: a disk's before a memory's, whose thread begins to write at once, and would take the interpreter from the other's copy.
            What is to be saved at once, and the end, go through them the other way: the fastest first.
    """

    def __init__(
        self,
        config: Config,
        state: TrainingState,
        boundary: Callable[[], dict[str, Any]],
        identity: dict[str, Any],
        tiers: Sequence[Tier],
    ) -> None:
        self.config, self.state, self.boundary, self.identity, self.tiers = config, state, boundary, identity, tiers
        self._fingerprint = fingerprint(config)
        self._due: list[Tier] = []
        self._saving = threading.Lock()
        # A queue of its own for `save_now`: the training thread's may wait for a peer for ever, and then none can be made.
        self._stream = torch.cuda.Stream() if state.is_on_gpu else None  # type: ignore[no-untyped-call]
        self.stall = 0.0
        """Seconds that the training loop has stood still for saving."""

    def is_due(self, step: int, at_once: bool = False) -> bool:
        """Whether the state after `step` steps is to be saved. Asked before the last of them, so that all ranks can be told to compare
        their states first, and to save at the same step; with `at_once` also if no interval is over."""
        with self._stalling():
            self._due = [tier for tier in self.tiers if tier.is_due(step) or (at_once and tier.takes != "nothing")]
        return bool(self._due) or at_once

    def after_step(self, agreed: bool) -> None:
        """To be called after each optimizer step; `agreed` if it was due on any rank. Nothing is saved while steps go bad: the run may
        have to go back."""
        if agreed and not self.state.bad_in_row:
            self._save(self._manifest("step"), [tier for tier in self.tiers if tier.takes == "all" or tier in self._due])

    def after_epoch(self) -> None:
        """To be called when an epoch is complete, its evaluation included."""
        self._save_epoch(self.tiers)

    def catch_up(self) -> None:
        """To be called before the first step. Saves an epoch's state that was found elsewhere, in a node's memory say, because a fault came
        between it and the disk. Without this the epoch's checkpoint would never be there, and after the last epoch the result would not."""
        if self.state.history and self.state.history[-1].get("step") == self.state.step:
            manifest = self._manifest("epoch")
            self._save_epoch([tier for tier in self.tiers if tier.takes == "due" and not tier.holds(manifest)])

    def finish(self) -> None:
        """To be called after the last epoch: everything is on the disk on return. Raises as `Tier.finish`."""
        for tier in self.tiers:
            tier.finish()

    def save_now(self) -> list[str]:
        """Save the last completed step's state on all tiers of this rank, without another process, without any collective, from any
        thread, in the middle of a step too. Waits for another thread that is doing the same: its work counts for both. Returns what failed,
        for people."""
        with self._saving:
            if not self.state.changing.acquire(timeout=STATE_LOCK_PATIENCE):
                return ["the state is just changing and cannot be saved"]
            try:
                if not self.state.is_whole:
                    return ["the step was broken off while it changed the state, which is worth nothing now"]
                if self._stream is not None:
                    torch.cuda.set_device(self._stream.device)  # a thread begins with GPU 0, and would leave something there
                with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                    return self._save_on_all_tiers()
            except Exception as error:
                # The state cannot be had: a GPU that is gone, say.
                return [str(error) or type(error).__name__]
            finally:
                self.state.changing.release()

    def close(self, patience: float) -> None:
        """To be called whatever happened; waits at most so many seconds for what is on its way to the disk, also if another tier fails."""
        with contextlib.ExitStack() as closing:
            for tier in self.tiers:
                closing.callback(tier.close, patience)

    @property
    def summary(self) -> str:
        """For people, at the end."""
        written = [tier.summary for tier in self.tiers if tier.summary]
        return ", ".join([*written, f"training stood still for saving for {self.stall:.2f} s"])

    def _save_on_all_tiers(self) -> list[str]:
        content, failures = {**self.boundary(), **self.identity}, []
        for tier in reversed(self.tiers):
            try:
                tier.save_now(self._manifest("step"), content)
            except Exception as error:
                # Whatever it is, the other tier is to have its chance; torch's archive writer has its own words for a disk that refuses.
                failures.append(str(error) or type(error).__name__)
        return failures

    def _save_epoch(self, tiers: Sequence[Tier]) -> None:
        if not tiers:
            return
        state, training = self.state, self.config.training
        due = asks_for(training, state.epoch) or bool(reason_to_end(training, state.history, state.best_since))
        metric: float | None = state.history[-1]["mAP50-95"]
        # Written anew as the first of equals only, so that a run that does not improve does not write.
        before = [row["mAP50-95"] for row in state.history[:-1] if row.get("step", math.inf) > state.best_since]
        best = metric is not None and all(one is None or one < metric for one in before)
        wanted = [tier for tier in tiers if tier.takes == "all" or (tier.takes == "due" and (due or best))]
        self._save(self._manifest("epoch", metric, due), wanted)

    def _save(self, manifest: Manifest, tiers: Sequence[Tier]) -> None:
        with self._stalling():
            content = {**self.state.capture(), **self.identity} if tiers else {}
            for tier in tiers:
                tier.save(manifest, content)

    def _manifest(self, kind: Kind, metric: float | None = None, due: bool = True) -> Manifest:
        """Without size and digest."""
        state = self.state
        return Manifest(
            kind=kind,
            position=Position(state.step, state.epoch, state.samples),
            size=0,
            sha256="",
            fence=0,
            config_fingerprint=self._fingerprint,
            torch_version=torch.__version__,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            metric=metric,
            due=due,
            origin=None if state.origin is None else str(Origin(**state.origin)),
        )

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.stall += time.monotonic() - started
