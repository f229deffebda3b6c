"""What a node has to do with the run that all have agreed on: it tells what it holds, joins, and remembers.

The record (`store/run_record`) is durable on every node before the first step, on its disk or, where that refuses, in its memory.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gai_yolo.checkpointing.compatibility import settings_of
from gai_yolo.checkpointing.recovery import LoadedCheckpoint, newest
from gai_yolo.config import value_at
from gai_yolo.data.formats.reading import expand
from gai_yolo.errors import CheckpointError, Refusal, refused_by
from gai_yolo.log import OF_NODE
from gai_yolo.membership.decision import KEPT, Claim, Fate, is_open, turns_after
from gai_yolo.membership.environment import file_digest
from gai_yolo.store.aside import ASIDE, bring, free_name, move_beyond, names_beyond
from gai_yolo.store.catalogue import START_PATIENCE, Catalogue
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_record import START, RecordError, RunRecord, Turn
from gai_yolo.training.context import JobContext

BRINGING_PATIENCE = 20.0
"""Seconds that a start waits for states that were moved aside in memory to be on the disk; then it goes on meanwhile."""
UNKNOWN = RunRecord("unknown")
"""Of memory whose record cannot be made out."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Membership:
    """The run that this process takes part in."""

    record: RunRecord
    memory: NodeMemory | None
    """Of this node, on the rank that keeps the node's state there."""


@dataclass(frozen=True)
class Claims:
    """What all nodes hold, the same on every rank."""

    all: list[Claim]
    own: range
    """Places of this rank's."""

    def fate(self, tier: str, fates: Sequence[Fate]) -> Fate:
        """What is to become of this node's disk or memory; of one that claims nothing, nothing."""
        return next((fates[place] for place in self.own if self.all[place].tier == tier), KEPT)


def gather_claims(context: JobContext, memory: NodeMemory | None, started_over: bool) -> Claims:
    """What all nodes hold; they look at their states only if it takes that to tell whose run it is. A collective.

    Raises:
        Refusal: on all ranks: a folder cannot be read.
    """
    world = context.world
    mine = world.together(lambda: own_claims(context, memory, started_over) if world.is_first_on_node else [])
    gathered = world.gather(mine)
    if not started_over and is_open(list(itertools.chain(*gathered))):
        mine = world.together(lambda: [looked_at(claim, context, memory) for claim in mine])
        gathered = world.gather(mine)
    first = sum(map(len, gathered[: world.rank]))
    return Claims(list(itertools.chain(*gathered)), range(first, first + len(mine)))


def own_claims(context: JobContext, memory: NodeMemory | None, started_over: bool) -> list[Claim]:
    """What this node's run folder and memory say of themselves."""
    host = socket.gethostname()
    in_memory = None
    if memory is not None:
        try:
            in_memory = memory.record()
        except (RecordError, CheckpointError, OSError):
            in_memory = UNKNOWN
    on_disk = None
    try:
        on_disk = context.folder.record()
    except RecordError as error:
        on_disk = in_memory  # which was a copy
        instead = "that of this node's memory is taken" if in_memory else "whose run this is follows from its checkpoints"
        tell(f"{context.folder.record_path} {error}; {instead}.")
    except CheckpointError:
        if not started_over:
            raise
    except OSError as error:
        refusal = Refusal(f"{error.filename or context.folder.record_path}: cannot be read ({error.strerror}); make it readable.")
        raise refused_by(error, refusal) from None
    if on_disk is None and names_beyond(context.folder.path, None):
        on_disk = RunRecord("")
    claims = []
    if on_disk is not None:
        claims.append(Claim(f"{host}:{context.folder.path}", "disk", on_disk))
    if memory is not None and in_memory is not None:
        claims.append(Claim(f"{host}:{memory.path}", "memory", in_memory))
    return claims


def looked_at(claim: Claim, context: JobContext, memory: NodeMemory | None) -> Claim:
    """A claim of this node with its progress, and its turns, if an older version has left them unsaid.

    Raises:
        CheckpointError: a folder cannot be read, or was written by another version of this program.
    """
    if claim.tier == "memory":
        assert memory is not None
        catalogue: Catalogue = memory.store
    else:
        catalogue = Catalogue(context.folder.path, patience=START_PATIENCE)
    if claim.record.turns:
        complete, _ = catalogue.newest(lambda *_: None)
        return replace(claim, progress=None if complete is None else complete[0].position)
    found, _ = newest(catalogue)
    if found is None:
        return claim
    turns = (Turn(START, settings_of(found.content)),) if found.content.get("config") else ()
    return replace(claim, progress=found.manifest.position, record=replace(claim.record, turns=turns))


def join(
    context: JobContext, memory: NodeMemory | None, record: RunRecord, claims: Claims, fates: Sequence[Fate], moved: Path | None = None
) -> NodeMemory | None:
    """Let this node's folder and memory be those of the run that was agreed on. A collective.

    Args:
        moved: where the first rank has moved its run folder already.

    Returns:
        The memory, if it can be used.

    Raises:
        Refusal: on all ranks: what is not to be gone on from cannot be moved aside.
    """
    world = context.world
    fate = claims.fate("disk", fates)
    first = world.from_first(lambda: join_folder(context, record, fate))  # first alone, because the folder may be shared
    gone = first or moved
    # A network file system may show the old record under the old name for a while, but knows where the folder is now.
    is_shared = gone is not None and gone.parent == context.folder.path.parent and gone.is_dir()
    own = world.together(lambda: join_folder(context, record, KEPT if is_shared else fate) if world.is_first_on_node else None)
    if memory is None:
        return None
    home = own or (gone if gone is not None and is_shared else context.folder.path)
    try:
        return join_memory(context, memory, record, claims.fate("memory", fates), home)
    except (OSError, Refusal) as error:
        memory.release()
        tell(f"{memory.path}: cannot be used ({getattr(error, 'strerror', None) or error}). No state is kept in this node's memory.")
        return None


def join_folder(context: JobContext, record: RunRecord, fate: Fate) -> Path | None:
    """The same for the run folder; returns where it was moved to, if it was. What another node has done already is not done again."""
    folder = context.folder
    moved = None
    with contextlib.suppress(RecordError):
        if folder.record() == record:
            return None
    try:
        if fate.aside:
            moved = folder.move_aside()
            if moved is not None:
                tell(f"{folder.path}: {fate.why}; it is kept in {moved}")
                if context.world.is_first:
                    folder.make()
        elif fate.beyond is not None:
            target = free_name(folder.path / ASIDE, "")
            if names := move_beyond(folder.path, fate.beyond, target):
                tell(f"{folder.path}: {fate.why}: {', '.join(names)} are kept in {target}")
        folder.set_record(record)
    except OSError as error:
        if fate != KEPT:
            refusal = Refusal(f"{error.filename or folder.path}: cannot be written ({error.strerror}); mend that and start again.")
            raise refused_by(error, refusal) from None
        # That it is durable is seen to before the first step.
    return moved


def join_memory(context: JobContext, memory: NodeMemory, record: RunRecord, fate: Fate, home: Path) -> NodeMemory:
    """The same for this node's memory, whose states belong to the run in the folder `home`."""
    aside = memory.set_aside(fate.beyond) if fate.aside or fate.beyond is not None else None
    if aside is not None:
        size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        tell(f"{memory.path}: {fate.why}; {size / 1e6:.0f} MB of states are moved aside, and brought to {home / ASIDE / aside.name}")
    memory.keep(replace(record, anchored=is_anchored(context, record)))
    bring_home(memory, home)
    return memory


def bring_home(memory: NodeMemory, home: Path) -> None:
    """Bring to the disk what was moved aside in memory, beside the training if it takes long; what a former start has left there too."""
    asides = memory.asides()
    if not asides:
        return
    failures: list[str] = []

    def work() -> None:
        for aside in asides:
            try:
                bring(aside, home / ASIDE / aside.name)
            except OSError as error:
                failures.append(f"{aside}: cannot be brought to {home / ASIDE} ({error.strerror}); it stays in this node's memory")

    thread = threading.Thread(target=work, name="aside", daemon=True)
    thread.start()
    thread.join(BRINGING_PATIENCE)
    for failure in failures:
        tell(failure)


def is_anchored(context: JobContext, record: RunRecord) -> bool:
    """Whether the run folder knows its run."""
    try:
        known = context.folder.record()
    except (OSError, RecordError, CheckpointError):
        return False
    return known is not None and known.run_id == record.run_id


def remember(context: JobContext, run: Membership, found: LoadedCheckpoint | None, identity: dict[str, Any]) -> None:
    """Make what holds for the rest of the run, what is settled included, durable on every node, before the first step. A collective.

    Raises:
        Refusal: on all ranks: nothing was saved yet, and a node can keep the record neither on its disk nor in its memory.
    """
    world = context.world
    settings = settings_of(identity)
    weights = value_at(identity["config"], "model.weights")
    if found is None and weights is not None:
        # By their content: runs that began with others are others, whatever the files are called.
        settings["model.weights"] = "SHA-256 " + world.from_first(lambda: file_digest(expand(Path(weights))))
    turns = turns_after(run.record, None if found is None else found.manifest.position, settings)
    record = replace(run.record, turns=turns)
    world.from_first(lambda: write_record(context, record))  # first alone, because the folder may be shared
    failure = write_record(context, record) if world.is_first_on_node else None
    failed = "" if failure is None else f"{socket.gethostname()}:{context.folder.record_path}: cannot be written ({failure.strerror})"
    if run.memory is not None:
        try:
            run.memory.keep(replace(record, anchored=failure is None or is_anchored(context, record)))
            if failure is not None:
                tell(f"{failed}; the run record is kept in this node's memory")
            failure = None
        except (OSError, Refusal) as error:
            tell(f"{run.memory.path}: the run record cannot be kept there ({getattr(error, 'strerror', None) or error})")
    failures = [(failed, failure) for failed, failure in world.gather((failed, failure)) if failure is not None]
    if failures and found is None:
        said, first = failures[0]
        raise refused_by(first, Refusal(f"{said}: without a run record on every node no training begins; make room there."))
    if failure is not None:
        tell(f"{failed}; training goes on")


def write_record(context: JobContext, record: RunRecord) -> OSError | None:
    """Write it to this node's run folder; returns why that failed."""
    folder = context.folder
    try:
        with contextlib.suppress(RecordError):
            if folder.record() == record:
                return None
        folder.set_record(record)
    except OSError as error:
        return error
    return None


def tell(text: str) -> None:
    """A warning of what this node alone may know."""
    logger.warning(text, extra=OF_NODE)
