"""After a start: the newest complete state that any node holds, on every rank.

All ranks tell what they can read, on whatever tier: the run folder (shared, or each node's own) and the node's memory. The
newest state that somebody can verify wins. Ranks that can read it do so themselves; the others get its bytes from one that can.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gai_yolo.checkpointing.digest import tensors_digest
from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT
from gai_yolo.detector.archive import DamagedFile, load_checkpoint
from gai_yolo.distributed.world import World
from gai_yolo.errors import CheckpointError, Departure, Ending
from gai_yolo.log import OF_NODE, ONCE
from gai_yolo.store.catalogue import LEFT_IN_PLACE, Catalogue, Damaged
from gai_yolo.store.manifest import Manifest, Position

logger = logging.getLogger(__name__)
PEER = "another node"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was verified and read completely."""

    path: Path
    content: dict[str, Any]
    tier: str
    """Where it was read: `disk`, `memory`, or another node."""
    manifest: Manifest


def agree(world: World, tiers: Mapping[str, Catalogue], alike: bool = True) -> tuple[LoadedCheckpoint | None, bool]:
    """The newest complete state of all nodes; None if there is none, and then whether anybody has passed something over. A collective.

    Args:
        tiers: of this rank, by name, the fastest first.
        alike: states of one position are equal wherever they come from, as with exact sums. Otherwise all nodes take that of one: two
            halves of a job may have gone on apart.

    Raises:
        CheckpointError: on all ranks: a folder cannot be read, or holds what another version has written, or program code.
    """
    mine, passed_over = world.together(lambda: list_holdings(tiers))
    _tell(world, passed_over)
    positions = {manifest.position for holdings in world.gather(mine) for _, manifest in holdings}
    for position in sorted(positions, reverse=True):
        found, damaged = world.together(lambda position=position: read_own(tiers, mine, position))  # type: ignore[misc]
        _tell(world, damaged)
        passed_over += damaged
        holders = world.gather(found is not None)
        if any(holders):
            is_one_node = world.world_size == world.local_world_size
            equal = is_one_node or (alike and are_equal(world, found))
            return found if all(holders) and equal else share(world, found, holders.index(True), equal), bool(passed_over)
    return None, any(world.gather(bool(passed_over)))


def _tell(world: World, passed_over: Sequence[str]) -> None:
    """On each node's first rank: the others see the same."""
    for text in passed_over if world.is_first_on_node else ():
        logger.warning(text, extra={**OF_NODE, **ONCE})


def are_equal(world: World, found: LoadedCheckpoint | None) -> bool:
    """Whether all ranks that hold the state hold the same one. Nodes of different processors, or versions, that have trained apart do not.
    A collective."""
    digests = world.gather(None if found is None else tensors_digest(found.content))
    equal = len({digest for digest in digests if digest is not None}) == 1
    if not equal and world.is_first:
        logger.warning("nodes that trained apart, on unlike machines, hold different states of one step; all go on from that of the first")
    return equal


def list_holdings(tiers: Mapping[str, Catalogue]) -> tuple[list[tuple[str, Manifest]], list[str]]:
    """The checkpoints that this rank can see with their tiers, the fastest first, and sentences about what is none."""
    listings = [(tier, catalogue.listing()) for tier, catalogue in tiers.items()]
    holdings = [(tier, manifest) for tier, listing in listings for manifest in listing.present]
    return holdings, [text for tier, listing in listings for text in tiers[tier].passed_over(listing)]


def read_own(
    tiers: Mapping[str, Catalogue], mine: Sequence[tuple[str, Manifest]], position: Position
) -> tuple[LoadedCheckpoint | None, list[str]]:
    """The state at a position from this rank's own tiers, and sentences about what is damaged, which is left in place."""
    damaged: list[str] = []
    for tier, manifest in mine:
        if manifest.position != position:
            continue
        path = tiers[tier].data_path(manifest)
        try:
            return LoadedCheckpoint(path, tiers[tier].read(manifest, parse), tier, manifest), damaged
        except Damaged as error:
            damaged.append(f"{path} {error}; {LEFT_IN_PLACE}.")
    return None, damaged


def share(world: World, found: LoadedCheckpoint | None, source: int, alike: bool) -> LoadedCheckpoint:
    """Send a state from a rank that has it to all that lack it; unless `alike`, to all. A collective.

    Raises:
        Departure: on all ranks: it is not what was verified any more; the next start looks again.
    """
    message = (found.path, found.manifest, socket.gethostname()) if world.rank == source and found is not None else None
    path, manifest, host = world.gather(message)[source] or (Path(), None, "")
    data = b""
    if world.rank == source:
        with contextlib.suppress(OSError):  # all learn of it by the digest
            data = path.read_bytes()
    received = world.broadcast_bytes(data, source)
    assert manifest is not None
    if hashlib.sha256(received).hexdigest() != manifest.sha256:
        raise Departure(f"{host}:{path} has changed while it was sent", Ending.PEER_LOST)
    if found is not None and (alike or world.rank == source):
        return found
    return LoadedCheckpoint(path, parse(path, io.BytesIO(received), manifest), f"{PEER} ({host})", manifest)


def newest(catalogue: Catalogue) -> tuple[LoadedCheckpoint | None, list[str]]:
    """The newest checkpoint under a run folder, mid-epoch or after an epoch, and sentences about what was passed over. Raises as
    `Catalogue.newest` and `parse`."""
    found, passed_over = catalogue.newest(parse)
    return None if found is None else LoadedCheckpoint(catalogue.data_path(found[0]), found[1], "disk", found[0]), passed_over


def load(catalogue: Catalogue, name: str) -> LoadedCheckpoint:
    """The checkpoint of a name such as `epoch_010`, verified.

    Raises:
        CheckpointError: there is none, or it is damaged or foreign.
    """
    by_name = {manifest.stem: manifest for manifest in catalogue.listing().present}
    if name not in by_name:
        raise CheckpointError(f"{catalogue.run}: has no checkpoint {name}; there are: {', '.join(sorted(by_name)) or 'none'}.")
    path = catalogue.data_path(by_name[name])
    try:
        return LoadedCheckpoint(path, catalogue.read(by_name[name], parse), "disk", by_name[name])
    except Damaged as error:
        raise CheckpointError(f"{path} {error}.") from None


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
    """How far the training was whose state this is. Raises `CheckpointError` if this version of this program did not write it."""
    if content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: not in this program's checkpoint format {CHECKPOINT_FORMAT} (found {content.get('format')!r}); "
            "continue with the version that wrote it, or start over with --fresh."
        )
    values = [content.get(key) for key in ("step", "epoch", "samples")]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise CheckpointError(f"{path}: does not say how far training was; it was not written by this program.")
    return Position(*cast(list[int], values))
