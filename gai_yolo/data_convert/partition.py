"""A partition of images into splits: random, the same for the same names and seed, and of a group all in one split."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data.formats.folders import plain_name
from gai_yolo.errors import DataError

NO_GROUP = "image that is in no group"


def group_pattern(text: str) -> re.Pattern[str]:
    """Raises `DataError` if a text is no regular expression with a group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise DataError(f"--group {text}: not a regular expression ({error}); correct it.") from None
    if not pattern.groups:
        raise DataError(f"--group {text}: nothing is in parentheses; put them around what images of one group have in common.")
    return pattern


def groups_by_name(names: Sequence[str], pattern: re.Pattern[str]) -> list[str | None]:
    """The group of each name; None where the pattern does not match."""
    return [match[1] if (match := pattern.search(name)) else None for name in names]


def partition(
    names: Sequence[str], groups: Sequence[str | None], shares: Mapping[Split, float], seed: int, problems: Problems
) -> dict[Split, list[int]]:
    """Positions of the images of each split, ascending.

    Groups are gone through in the order of a hash of seed and group. A split takes what brings it nearer to its share, val before test;
    the rest is train. An image without a group is one by itself. So neither the order of the images nor that of the groups has a say.

    Args:
        names: of the images, each in one form of Unicode or another.
        shares: of val and test, from 0 to 1.

    Raises:
        DataError: a split gets no image.
    """
    members: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for position, (name, group) in enumerate(zip(names, groups, strict=True)):
        members[("image", plain_name(name)) if group is None else ("group", plain_name(group))].append(position)
    ordered = sorted(members, key=lambda key: (_hash(seed, key), key))
    wanted = {split: share * len(names) for split, share in shares.items()}
    found: dict[Split, list[int]] = {"train": [], **{split: [] for split in wanted}}
    for key in ordered:
        some = members[key]
        # Half of it beyond the share is as far from it as half of it below.
        taker: Split = next((split for split, number in wanted.items() if len(found[split]) + len(some) / 2 <= number), "train")
        found[taker] += some
    for split, positions in found.items():
        if not positions:
            largest = max(map(len, members.values()))
            what = f"{len(names)} images in {len(members)} groups, of which the largest has {largest}"
            raise DataError(f"{split} would get no image ({what}); give it another share, or smaller groups.")
    alone = [position for position, group in enumerate(groups) if group is None]
    problems.add_many(
        NO_GROUP, len(alone) if len(alone) < len(names) else 0, names[alone[0]] if alone else "", "taken for a group by itself"
    )
    return {split: sorted(positions) for split, positions in found.items()}


def _hash(seed: int, key: tuple[str, str]) -> str:
    return hashlib.sha256(f"{seed} {key[0]} {key[1]}".encode(errors="surrogateescape")).hexdigest()
