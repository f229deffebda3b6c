"""After a start: the newest complete state that any node holds, on every rank.

All ranks tell what they can read, on whatever tier: the run folder (shared, or each node's own) and the node's memory. The
newest state that somebody can verify wins. Ranks that can read it do so themselves; the others get its bytes from one that can.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gai_yolo.checkpointing.digest import tensors_digest
from gai_yolo.checkpointing.disk_tier import LoadedCheckpoint, parse
from gai_yolo.distributed.world import World
from gai_yolo.errors import Departure, Ending
from gai_yolo.store.catalogue import Catalogue, Damaged
from gai_yolo.store.manifest import Manifest, Position

PEER = "another node"


@dataclass(frozen=True)
class Holding:
    """A checkpoint that this rank can see."""

    tier: str
    manifest: Manifest


def agree(world: World, tiers: Mapping[str, Catalogue], tell: Callable[[str], None], alike: bool = True) -> LoadedCheckpoint | None:
    """The newest complete state of all nodes; None if there is none. A collective.

    Args:
        tiers: of this rank, by name, the fastest first.
        tell: is given sentences about what was passed over, on every node's first rank.
        alike: states of one position are equal wherever they come from, as with exact sums. Otherwise all nodes take that of one: two
            halves of a job may have gone on apart.

    Raises:
        CheckpointError: on all ranks: a folder cannot be read, or holds what another version has written, or program code.
    """
    told: set[str] = set()

    def tell_once(text: str) -> None:
        if world.is_first_on_node and text not in told:
            told.add(text)
            tell(text)

    mine = world.together(lambda: list_holdings(tiers, tell_once))
    positions = {holding.manifest.position for holdings in world.gather(mine) for holding in holdings}
    for position in sorted(positions, reverse=True):
        found = world.together(lambda position=position: read_own(tiers, mine, position, tell_once))  # type: ignore[misc]
        holders = world.gather(found is not None)
        if any(holders):
            is_one_node = world.world_size == world.local_world_size
            equal = is_one_node or (alike and are_equal(world, found, tell))
            return found if all(holders) and equal else share(world, found, holders.index(True), equal)
    return None


def are_equal(world: World, found: LoadedCheckpoint | None, tell: Callable[[str], None]) -> bool:
    """Whether all ranks that hold the state hold the same one. Nodes of different processors, or versions, that have trained apart do not.
    A collective."""
    digests = world.gather(None if found is None else tensors_digest(found.content))
    equal = len({digest for digest in digests if digest is not None}) == 1
    if not equal and world.is_first:
        tell("nodes that trained apart, on unlike machines, hold different states of one step; all go on from that of the first")
    return equal


def list_holdings(tiers: Mapping[str, Catalogue], tell: Callable[[str], None]) -> list[Holding]:
    """What this rank can see, the fastest tier first."""
    holdings = []
    for tier, catalogue in tiers.items():
        listing = catalogue.listing()
        catalogue.tell_defects(listing, tell)
        holdings += [Holding(tier, manifest) for manifest in listing.present]
    return holdings


def read_own(
    tiers: Mapping[str, Catalogue], mine: Sequence[Holding], position: Position, tell: Callable[[str], None]
) -> LoadedCheckpoint | None:
    """The state at a position from this rank's own tiers; what is damaged is told and left in place."""
    for holding in mine:
        if holding.manifest.position != position:
            continue
        catalogue = tiers[holding.tier]
        path = catalogue.data_path(holding.manifest)
        try:
            content = catalogue.read(holding.manifest, lambda file, manifest, path=path: parse(path, file, manifest))  # type: ignore[misc]
        except Damaged as error:
            tell(f"{path} {error}; it is left in place and passed over.")
        else:
            return LoadedCheckpoint(path, content, holding.tier, holding.manifest)
    return None


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
