"""Checkpoints of a run: when to save, what goes in, and which one to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from gai_yolo.checkpointing.background_writer import HANGING, BackgroundWriter
from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.checkpointing.schedule import Cost, SnapshotSchedule
from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT, TrainingState
from gai_yolo.checkpointing.writer_handle import Job, WriterProcess
from gai_yolo.checkpointing.writer_process import Answer
from gai_yolo.config import Config, fingerprint
from gai_yolo.detector.weights import DamagedFile, load_checkpoint
from gai_yolo.errors import CheckpointError, transient
from gai_yolo.store.catalogue import Catalogue, Damaged
from gai_yolo.store.manifest import Kind, Manifest, Position
from gai_yolo.store.retention import Policy
from gai_yolo.store.store import Store


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was verified and read completely."""

    path: Path
    content: dict[str, Any]
    tier: str
    """Where it was read: `disk`, `memory`, or another node."""
    manifest: Manifest


class DiskTier:
    """Saves the state of a run on the disk, in the background, mid-epoch and after epochs. On the rank that writes.

    Args:
        store: with the right to publish.
        config: settled.
        identity: what is saved beside the state to recognise the run: configuration, classes, data digest.
        tell: is given sentences for people.
        alive: is called while the training thread waits here for a disk.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        identity: dict[str, Any],
        state: TrainingState,
        pinned: bool,
        tell: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.identity, self.pinned, self._tell = config, identity, pinned, tell
        self.store = store
        run, fence, policy = store.run, store.fence, policy_of(config, state.best_since)
        self.writer = BackgroundWriter(
            lambda: WriterProcess(run, fence, policy), tell, self._written, lambda: store.fs.free_bytes(run), alive=alive
        )
        self._fingerprint = fingerprint(config)
        self._expected = expected_bytes(state)
        # Made now, so that the first capture does not wait for memory.
        self._first_buffer: StateBuffer | None = StateBuffer(self._expected, pinned)
        self.cadence = SnapshotSchedule(config.snapshots, state.step, self._expected)
        self._is_given_up = False
        self.count, self.write_seconds = 0, 0.0
        """Checkpoints that are complete on the disk, and the seconds that writing them took beside the training."""

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved; to be called before each step."""
        self.writer.poll()
        return self.cadence.is_due(step) and self.writer.accepts_snapshots

    def save_step(self, state: TrainingState) -> None:
        """Save the state after a step."""
        self._save(make_manifest("step", state, self._fingerprint), state)

    def after_epoch(self, state: TrainingState) -> None:
        """To be called when an epoch is complete, its evaluation included."""
        due = is_due(state.epoch, self.config)
        metric: float | None = state.history[-1]["mAP50-95"]
        # Written anew as the first of equals only, so that a run that does not improve does not write.
        before = [row["mAP50-95"] for row in state.history[:-1] if row.get("step", math.inf) > state.best_since]
        best = metric is not None and all(one is None or one < metric for one in before)
        if due or best:
            self._save(make_manifest("epoch", state, self._fingerprint, metric, due), state)
        self.writer.poll()

    def save_now(self, manifest: Manifest, content: dict[str, Any]) -> None:
        """Write a state in the calling thread, whichever that is; it is complete on return. What the writer has in hand at the
        same time does not matter: each has its own temporary files.

        Raises:
            OSError: the disk refuses.
            RunFolderBusy: another job has taken the run over.
        """
        self.store.publish(manifest, lambda file: torch.save(content, file))

    def catch_up(self, state: TrainingState) -> None:
        """Save an epoch's state that was found elsewhere, in a node's memory say, because a fault came between it and the disk. Without
        this the epoch's checkpoint would never be there, and after the last epoch the result would not."""
        if not state.history or state.history[-1].get("step") != state.step:
            return
        there = [one for one in self.store.listing().present if one.kind == "epoch" and one.position.step == state.step]
        if not any(self.store.defect_of(one) is None for one in there):
            self.after_epoch(state)

    def finish(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            CheckpointError: it could not be written, for as long as `snapshots.patience_seconds`.
        """
        if not self.writer.drain(self.config.snapshots.patience_seconds, HANGING, while_moving=True):
            self._is_given_up = True
            raise transient(
                CheckpointError(
                    f"{', '.join(self.writer.unwritten)}: could not be written within snapshots.patience_seconds; make room and start "
                    "again: it goes on from the newest complete checkpoint."
                )
            )

    @property
    def summary(self) -> str:
        """For people, at the end."""
        return f"{self.count} checkpoints and snapshots written, in {self.write_seconds:.1f} s beside the training"

    def close(self, patience: float) -> None:
        """To be called whatever happened; waits at most so many seconds for what is on its way to the disk, unless `finish` has waited for
        it in vain."""
        patience = 0.0 if self._is_given_up else patience
        deadline = time.monotonic() + patience
        self.writer.drain(patience)
        self.writer.close(max(0.0, deadline - time.monotonic()))

    def _save(self, manifest: Manifest, state: TrainingState) -> None:
        started = time.monotonic()
        buffer = self.writer.buffer() or self._first_buffer or StateBuffer(self._expected, self.pinned)
        self._first_buffer = None
        buffer.fill({**state.capture(), **self.identity})
        self.writer.submit(Job(manifest, buffer, time.monotonic() - started))
        self.cadence.saved(state.step)

    def _written(self, job: Job, answer: Answer) -> None:
        self.count += 1
        self.write_seconds += answer.seconds
        cores = max(1, self.config.training.threads if isinstance(self.config.training.threads, int) else torch.get_num_threads())
        self.cadence.measured(Cost(answer.seconds, job.stall, answer.cpu_seconds / cores))


def make_manifest(kind: Kind, state: TrainingState, fingerprint: str, metric: float | None = None, due: bool = True) -> Manifest:
    """The manifest of a state, without size and digest.

    Args:
        metric: mAP50-95 of the epoch.
        due: whether the checkpoint interval asks for it.
    """
    return Manifest(
        kind=kind,
        position=Position(state.step, state.epoch, state.samples),
        size=0,
        sha256="",
        fence=0,
        config_fingerprint=fingerprint,
        torch_version=torch.__version__,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        metric=metric,
        due=due,
    )


def policy_of(config: Config, best_since: int) -> Policy:
    """What retention is to keep."""
    return Policy(config.snapshots.keep, config.snapshots.keep_epochs, config.snapshots.keep_every, best_since)


def is_due(epoch: int, config: Config) -> bool:
    """Whether the checkpoint interval asks for a checkpoint after an epoch."""
    return epoch % config.training.checkpoint_interval == 0 or epoch == config.training.epochs


def bytes_to_come(config: Config, state: TrainingState, present: Sequence[Manifest]) -> int:
    """Bytes of disk that the rest of the run will take beyond what its present checkpoints do, about."""
    settings, training = config.snapshots, config.training
    mid_epoch = settings.interval_steps is not None or settings.interval_seconds is not None
    have_steps = sum(manifest.kind == "step" for manifest in present)
    steps = max(0, settings.keep + 1 - have_steps) if mid_epoch else 0
    due = sum(
        epoch % training.checkpoint_interval == 0 or epoch == training.epochs for epoch in range(state.epoch + 1, training.epochs + 1)
    )
    if settings.keep_epochs != "all":
        for_ever = training.epochs // settings.keep_every if settings.keep_every else 0
        due = min(due, settings.keep_epochs + for_ever + 1)
    best = 1 + 2  # where the best is none of those that are due; best.pt, and the draft of the next one
    return (steps + due + best) * expected_bytes(state)


def expected_bytes(state: TrainingState) -> int:
    """Size of a snapshot, a little too large rather than too small, also before the optimizer has state of its own."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state.model.state_dict().values())
    moments = 2 if isinstance(state.optimizer, torch.optim.AdamW) else 1
    return int((2 + moments) * weights * 1.02) + (1 << 20)


def newest(store: Catalogue, tell: Callable[[str], None]) -> LoadedCheckpoint | None:
    """The newest checkpoint under a run folder, mid-epoch or after an epoch; damaged ones are told, left in place and passed over.

    Raises:
        CheckpointError: the newest complete one carries program code, or was written by another version of this program.
    """
    found = store.newest(lambda file, manifest: parse(store.data_path(manifest), file, manifest), tell)
    return None if found is None else LoadedCheckpoint(store.data_path(found[0]), found[1], "disk", found[0])


def load(store: Catalogue, name: str) -> LoadedCheckpoint:
    """The checkpoint of a name such as `epoch_010`, verified.

    Raises:
        CheckpointError: there is none, or it is damaged or foreign.
    """
    by_name = {manifest.stem: manifest for manifest in store.listing().present}
    if name not in by_name:
        raise CheckpointError(f"{store.run}: has no checkpoint {name}; there are: {', '.join(sorted(by_name)) or 'none'}.")
    manifest = by_name[name]
    path = store.data_path(manifest)
    reason = store.defect_of(manifest)
    try:
        if reason is None:
            with store.fs.open(path) as file:
                return LoadedCheckpoint(path, parse(path, file, manifest), "disk", manifest)
    except Damaged as error:
        reason = str(error)
    raise CheckpointError(f"{path} {reason}.")


def parse(path: Path, file: BinaryIO, manifest: Manifest) -> dict[str, Any]:
    """The state in a verified file.

    Raises:
        Damaged: it does not hold what its manifest says.
        CheckpointError: it carries program code, or was written by another version of this program.
    """
    try:
        content = load_checkpoint(path, file)
    except DamagedFile:
        raise Damaged("is whole, but cannot be opened as a checkpoint") from None
    position = position_of(path, content)
    if position != manifest.position:
        raise Damaged(f"holds step {position.step} of epoch {position.epoch + 1}, not what its manifest says")
    return content


def position_of(path: Path, content: dict[str, Any]) -> Position:
    """How far the training was whose state this is.

    Raises:
        CheckpointError: not a state of this version of this program.
    """
    if content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: not in this program's checkpoint format {CHECKPOINT_FORMAT} (found {content.get('format')!r}); "
            "continue with the version that wrote it, or start over with --fresh."
        )
    values = [content.get(key) for key in ("step", "epoch", "samples")]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise CheckpointError(f"{path}: does not say how far training was; it was not written by this program.")
    return Position(*cast(list[int], values))
