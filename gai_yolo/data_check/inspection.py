"""A data set, read by the functions that training reads it with, and its images decoded.

A split that training would refuse does not keep the other one from being looked at: its sentence is a finding like others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track

from gai_yolo.data.formats.check import MOST_SIGHTINGS, Split
from gai_yolo.data.formats.reading import CannotRead
from gai_yolo.data.images import decode, refuse_undecodable, tried_positions
from gai_yolo.data.index import Index, Problem, Sighting
from gai_yolo.data.sources import SPLITS, check_classes, described, load_index
from gai_yolo.errors import DataError
from gai_yolo.machine import available_cores
from gai_yolo.sections import DataConfig

UNDECODABLE = "image that cannot be decoded"
FATE: dict[Split, str] = {"train": "a grey image without boxes", "val": "left out of the metrics"}
"""What becomes of such an image in a training."""


@dataclass(frozen=True)
class SplitFindings:
    """What was found in a split."""

    index: Index | None
    """None if it could not be read."""
    refusal: str | None
    """Why training would refuse it."""
    num_decoded: int = 0
    """Images that were tried."""
    num_undecodable: int = 0
    """Those of them that cannot be decoded."""
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What was found in a data set."""

    splits: dict[Split, SplitFindings]
    refusals: list[str]
    """Every reason for which training would refuse the data set, each once."""


def inspect(config: DataConfig, most: int | None) -> Findings:
    """Read and decode both splits.

    Args:
        most: images to decode of each split, at least those that training tries; None for all.
    """
    splits = {split: _inspect_split(config, split, most) for split in SPLITS}
    refusals = [found.refusal for found in splits.values() if found.refusal is not None]
    train, val = splits["train"].index, splits["val"].index
    if train is not None and val is not None:
        try:
            check_classes(train, val)
        except DataError as error:
            refusals.append(str(error))
    return Findings(splits, list(dict.fromkeys(refusals)))


def _inspect_split(config: DataConfig, split: Split, most: int | None) -> SplitFindings:
    try:
        index = described(load_index(config, split, from_cache=False), split, config)
    except (DataError, CannotRead) as error:
        return SplitFindings(None, str(error))
    positions: Sequence[int] = range(len(index))
    if most is not None and most < len(index):
        spread = np.linspace(0, len(index) - 1, most).round().astype(int).tolist()
        positions = sorted({*tried_positions(len(index)), *spread})  # those that training tries among them
    undecodable: list[int] = []
    refusal = None
    try:
        for position in _undecodable(index, positions, config.image_size, f"decoding {split}"):
            undecodable.append(position)
        refuse_undecodable(index, set(undecodable), config.max_bad_fraction)
    except (DataError, CannotRead, MemoryError) as error:
        refusal = str(error)
    problems = index.problems
    if undecodable:
        paths = [index.images[position].path for position in undecodable]
        sightings = tuple(Sighting(str(path), path) for path in paths[:MOST_SIGHTINGS])
        problems = (*problems, Problem(UNDECODABLE, len(paths), str(paths[0]), FATE[split], sightings))
    return SplitFindings(index, refusal, len(positions), len(undecodable), problems)


def _undecodable(index: Index, positions: Sequence[int], image_size: int, title: str) -> Iterator[int]:
    """Decode, some at a time in threads; raises as `decode`, without waiting for what has not begun. A terminal sees a bar meanwhile."""
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(min(32, available_cores() + 4))
    try:
        results = pool.map(lambda position: decode(index.images[position], image_size) is None, positions)
        shown = track(results, title, len(positions), console=console, transient=True, disable=not console.is_terminal)
        for position, is_bad in zip(positions, shown, strict=True):
            if is_bad:
                yield position
    finally:
        pool.shutdown(cancel_futures=True)
