"""Going back: a run that is to go on from an older state than its newest one, because a person says so."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from gai_yolo.checkpointing.compatibility import settings_of
from gai_yolo.checkpointing.recovery import LoadedCheckpoint, load
from gai_yolo.errors import CheckpointError
from gai_yolo.log import told_if_refused
from gai_yolo.reporting.reporter import write_metrics
from gai_yolo.store.aside import ASIDE, free_name, move_beyond
from gai_yolo.store.best import NAME as BEST
from gai_yolo.store.best import BestCopy
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.filesystem import REAL
from gai_yolo.store.manifest import FOLDERS, Manifest
from gai_yolo.store.retention import best_of
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.run_record import START, RecordError, RunRecord, Turn

TARGET = re.compile(r"(epoch|step)[:_](\d{1,12})(?:\.pt)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """What was done."""

    target: Manifest
    """What the next start goes on from."""
    moved: list[str]
    """Names relative to the run folder."""
    aside: Path
    """Where they are now."""


def state_at(catalogue: Catalogue, where: str) -> LoadedCheckpoint:
    """The state that is meant by `epoch:3`, `step:120` or a checkpoint's name, verified.

    Raises:
        CheckpointError: there is none, or it is damaged or foreign.
    """
    match = TARGET.fullmatch(where)
    if match is None:
        raise CheckpointError(f"--to {where}: write epoch:3, or step:120, as `gai-yolo snapshots ls {catalogue.run}` shows them.")
    wanted, number = match[1], int(match[2])
    present = catalogue.listing().present
    numbers = {one.stem: one.position.step if wanted == "step" else one.position.epoch for one in present if wanted in ("step", one.kind)}
    stem = next((stem for stem, its in numbers.items() if its == number), None)
    if stem is None:
        there = ", ".join(f"{wanted}:{its}" for its in dict.fromkeys(numbers.values()))
        raise CheckpointError(
            f"{catalogue.run}: has no complete state at {wanted} {number}; there are: {there or 'none'}. To begin anew, start the job with "
            "--fresh."
        )
    return load(catalogue, stem)


def roll_back(folder: RunFolder, where: str) -> Rollback:
    """Let the next start go on from an older state: move what is newer aside, and outdate it in the nodes' memories, and on the disks of
    other nodes. To be called with the run folder locked; what is broken off may be done again.

    Raises:
        CheckpointError: as `state_at`.
        OSError: the disk refuses.
    """
    found = state_at(folder.store, where)
    position = found.manifest.position
    aside = free_name(folder.path / ASIDE, "")
    moved = move_beyond(folder.path, position, aside)
    record = None
    with contextlib.suppress(RecordError):
        record = folder.record()
    record = record or RunRecord(f"1-{os.urandom(8).hex()}")
    turns = record.turns or (Turn(START, settings_of(found.content)),)
    back = Turn(position, turns[-1].settings, os.urandom(6).hex())
    # Only now do other nodes' states, and those in memory, count as out of date. What follows the next start does as well.
    folder.set_record(replace(record, turns=(*turns, back)))
    with told_if_refused(logger, folder.checkpoints, "cannot be brought up to date", "the next start does it"):
        bring_up_to_date(folder, found, aside)
    return Rollback(found.manifest, moved, aside)


def bring_up_to_date(folder: RunFolder, found: LoadedCheckpoint, aside: Path) -> None:
    """Let `best.pt` and the metrics be those of the state that is gone back to; raises `OSError`."""
    if best_of(folder.store.listing().present) is None and (folder.checkpoints / BEST).is_file():
        REAL.make_folder(aside / FOLDERS["epoch"])
        REAL.rename(folder.checkpoints / BEST, aside / FOLDERS["epoch"] / BEST)
    for note in BestCopy(folder.store, found.content.get("best_since", -1)).renew():
        logger.warning(note)
    write_metrics(folder, found.content["history"])
