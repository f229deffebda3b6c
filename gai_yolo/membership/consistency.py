"""Comparing what all nodes must have in common for their work to be one run.

A node that differs is refused, and the others go on without it, if it can be told which one is wrong: the run folder remembers what the
run was trained with, and otherwise most nodes are right. Where neither says it, all are refused.
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gai_yolo.distributed.world import World
from gai_yolo.errors import Departure, Ending, Refusal

Facts = Mapping[str, Any]
"""By a name for people, such as a key of the configuration; plain data, as JSON holds it."""
MOST_NAMED = 4
"""Differences, and nodes, that one sentence names."""


@dataclass(frozen=True)
class Member:
    """What one rank says of itself."""

    host: str
    rank: int
    node: int
    facts: Facts
    record: Facts | None = None
    """Facts of an earlier start, as its run folder has them."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host} (rank {self.rank})"


@dataclass(frozen=True)
class Difference:
    """Members that are not all alike."""

    keys: tuple[str, ...]
    """Which facts differ."""
    groups: tuple[tuple[Member, ...], ...] = field(repr=False)
    """Members that are alike; those that are right first, otherwise rank 0's."""
    right_known: bool
    """Whether the first group is right, and all others are wrong."""

    def sentence(self) -> str:
        """Who has what, where others have something else."""
        reference, *others = (group[0] for group in self.groups)
        parts = []
        for other in others[:MOST_NAMED]:
            keys = [key for key in self.keys if other.facts.get(key) != reference.facts.get(key)]
            has = " and ".join(f"{key} {other.facts.get(key)!r}" for key in keys[:MOST_NAMED])
            more = f" (and {len(keys) - MOST_NAMED} more)" if len(keys) > MOST_NAMED else ""
            there = " and ".join(repr(reference.facts.get(key)) for key in keys[:MOST_NAMED])
            parts.append(f"{other.name} has {has}{more}, {reference.name} has {there}")
        return "; ".join(parts)


def compare(members: Sequence[Member]) -> Difference | None:
    """Which members, given in rank order, differ in what; None if none does."""
    names = dict.fromkeys(key for member in members for key in member.facts)
    keys = tuple(key for key in names if len({_text(member.facts.get(key)) for member in members}) > 1)
    if not keys:
        return None
    by_values: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_values[_text([member.facts.get(key) for key in keys])].append(member)
    groups = [tuple(group) for group in by_values.values()]
    right = _right(groups, keys, [member.record for member in members if member.record is not None])
    ordered = groups if right is None else [right, *(group for group in groups if group is not right)]
    return Difference(keys, tuple(ordered), right is not None)


def _right(groups: Sequence[tuple[Member, ...]], keys: Sequence[str], records: Sequence[Facts]) -> tuple[Member, ...] | None:
    """The group that goes on; None if that cannot be told."""
    known = {_text([record.get(key) for key in keys]) for record in records}
    recorded = [group for group in groups if _text([group[0].facts.get(key) for key in keys]) in known]
    if len(recorded) == 1:
        return recorded[0]
    nodes = [{member.node for member in group} for group in groups]
    num_nodes = len(set.union(*nodes))
    for place, group in enumerate(groups):
        whole = nodes[place].difference(*nodes[:place], *nodes[place + 1 :])  # a node that is at odds with itself has no say
        if 2 * len(whole) > num_nodes:
            return group
    return None


def must_agree(world: World, facts: Facts, record: Facts | None = None) -> None:
    """Compare facts of all ranks. A collective.

    Args:
        facts: of this rank.
        record: of an earlier start, as this node's run folder has it.

    Raises:
        Refusal: on the ranks that are wrong, or on all if it cannot be told which are.
        Departure: on the others; they are to be started again without those.
    """
    difference = compare(_members(world, facts, record))
    if difference is None:
        return
    sentence = difference.sentence()
    if not difference.right_known:
        raise Refusal(f"the nodes are not alike: {sentence}. Give all nodes the same and start again.")
    if world.rank in {member.rank for member in difference.groups[0]}:
        raise Departure(f"a node that is not like the others is refused, they go on without it: {sentence}", Ending.PEER_LEFT)
    raise Refusal(f"this node is not like the others: {sentence}. Give it what they have and start it again.")


def should_agree(world: World, facts: Facts) -> str | None:
    """A line that says who differs in what, the same on every rank; None if none does. A collective."""
    difference = compare(_members(world, facts, None))
    return None if difference is None else difference.sentence()


def _members(world: World, facts: Facts, record: Facts | None) -> list[Member]:
    return world.gather(Member(socket.gethostname(), world.rank, world.node, facts, record))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
