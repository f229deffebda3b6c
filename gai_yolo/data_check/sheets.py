"""Contact sheets: random images with their boxes, and what is wrong with the image and box concerned."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np

from gai_yolo.data.formats.check import MISSING, Split
from gai_yolo.data.formats.reading import CannotRead, Doubt
from gai_yolo.data.header import TOO_LARGE, UNOPENED, UNREADABLE, image_size
from gai_yolo.data.index import ImageRecord, Index, Problem, Sighting, empty_record
from gai_yolo.data_check.inspection import UNDECODABLE, Findings
from gai_yolo.data_check.report import without_root
from gai_yolo.data_check.tile import LINE, PICTURE_HEIGHT, TILE_WIDTH, Mark, Tile, draw_tile
from gai_yolo.reporting.canvas import FAINT, GAP, INK, OTHERS, SMALL_TEXT, TEXT, WRONG, headed, letters, wrapped
from gai_yolo.reporting.drawing import Image, class_colour, in_ascii

NUM_SAMPLES = 16
"""Random images of a split that are shown."""
MOST_TILES = 24
"""Images with something wrong that are shown."""
TILES_IN_ROW = 4
SAMPLE_LINES, PROBLEM_LINES = 2, 5
"""Lines of a caption."""
WITHOUT_PICTURE = frozenset({MISSING, UNREADABLE, TOO_LARGE, UNOPENED, UNDECODABLE})
"""Kinds of problems of which there is nothing to be seen."""


def sample_sheet(split: Split, index: Index) -> Image:
    """Random images of a split with their boxes; the same ones each time. (H, W, 3) RGB."""
    count = min(NUM_SAMPLES, len(index))
    positions = sorted(np.random.default_rng(0).choice(len(index), count, replace=False).tolist())
    labels = [in_ascii(name, position) for position, name in enumerate(index.class_names)]
    tiles = [_sample(index.images[position], labels) for position in positions]
    return _sheet(f"{split}: {count} random images of {len(index)}", tiles, SAMPLE_LINES, labels, [])


def problem_sheet(findings: Findings, root: Path) -> Image | None:
    """Images with something wrong, some of each kind, (H, W, 3) RGB; None if there is nothing wrong.

    Args:
        root: the data set's folder, which is left out of names.
    """
    groups = [(split, problem, _by_image(problem)) for split, found in findings.splits.items() for problem in found.problems]
    if not groups:
        return None
    chosen = _in_turns([len(images) for _, _, images in groups], MOST_TILES)
    shown = [(split, problem, one) for (split, problem, images), most in zip(groups, chosen, strict=True) for one in images[:most]]
    records = {
        split: _records(found.index, {sightings[0].path for of_split, _, sightings in shown if of_split == split})
        for split, found in findings.splits.items()
    }
    tiles = [_problem_tile(split, problem, group, records[split].get(group[0].path), root) for split, problem, group in shown]
    unseen = [
        f"no image: {split}: {problem.count} x {problem.kind}, {problem.action} (first: {without_root(problem.example, root)})"
        for split, problem, images in groups
        if not images
    ]
    total = sum(problem.count for _, problem, _ in groups)
    return _sheet(f"what is wrong: {_counted(total, 'record', 'records')}", tiles, PROBLEM_LINES, [], unseen)


def _sheet(title: str, tiles: Sequence[Tile], lines: int, labels: Sequence[str], notes: Sequence[str]) -> Image:
    """Put tiles under a title and a legend of classes, and notes below."""
    width = TILES_IN_ROW * (TILE_WIDTH + GAP) + GAP
    rows, row_height = math.ceil(len(tiles) / TILES_IN_ROW), PICTURE_HEIGHT + 5 + lines * LINE + GAP
    footer = [line for note in notes for line in wrapped(letters(note), width - 2 * GAP, TEXT, 2)]
    canvas, top = headed(title, labels, width, rows * row_height + len(footer) * (TEXT + 6) + GAP)
    for number, tile in enumerate(tiles):
        draw_tile(canvas, GAP + number % TILES_IN_ROW * (TILE_WIDTH + GAP), top + number // TILES_IN_ROW * row_height, tile)
    for number, line in enumerate(footer):
        canvas.text(GAP, top + rows * row_height + number * (TEXT + 6), line, colour=WRONG)
    return canvas.array()


def _sample(record: ImageRecord, labels: Sequence[str]) -> Tile:
    crowds = int(record.crowd.sum())
    size = f"{record.width} x {record.height}, {_counted(len(record.boxes) - crowds, 'box', 'boxes')}"
    size += f", {_counted(crowds, 'crowd region', 'crowd regions')}" if crowds else ""
    rows = zip(record.boxes.tolist(), record.classes.tolist(), record.crowd.tolist(), strict=True)
    marks = [Mark(tuple(box), class_colour(one), labels[one] + (" (crowd)" if crowd else "")) for box, one, crowd in rows]
    return Tile(record, marks, [(letters(record.path.name), INK), (size, FAINT)])


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _by_image(problem: Problem) -> list[list[Sighting]]:
    """The sightings of a problem, those of an image together."""
    groups: dict[Path, list[Sighting]] = {}
    for sighting in problem.sightings:
        groups.setdefault(sighting.path, []).append(sighting)
    return list(groups.values())


def _in_turns(sizes: Sequence[int], most: int) -> list[int]:
    """How many are taken of each group, if each in its turn gives one until there are `most`."""
    taken = [0] * len(sizes)
    for _ in range(max(sizes, default=0)):
        for number, size in enumerate(sizes):
            if taken[number] < size and sum(taken) < most:
                taken[number] += 1
    return taken


def _records(index: Index | None, paths: Set[Path]) -> dict[Path, ImageRecord]:
    """What the index says of images."""
    return {} if index is None else {record.path: record for record in index.images if record.path in paths}


def _problem_tile(split: Split, problem: Problem, sightings: Sequence[Sighting], record: ImageRecord | None, root: Path) -> Tile:
    if record is None and problem.kind not in WITHOUT_PICTURE:
        record = _foreign(sightings[0].path)
    marks = [] if record is None else [Mark(tuple(corners), OTHERS) for corners in record.boxes.tolist()]
    wrong = [] if record is None else [_in_pixels(one, record) for one in sightings if one.corners]
    marks += [Mark(corners, WRONG, is_wrong=True) for corners in wrong if all(map(math.isfinite, corners))]
    caption = [(letters(problem.kind), WRONG), (letters(f"{split}: {problem.action}; {problem.count} in all"), INK)]
    more = f" and {len(sightings) - 1} more in this image" if len(sightings) > 1 else ""
    caption += [(line, FAINT) for line in wrapped(letters(without_root(sightings[0].record, root) + more), TILE_WIDTH, SMALL_TEXT, 2)]
    if wrong and record is not None:
        x1, y1, x2, y2 = (f"{value:.5g}" for value in wrong[0])
        caption.append((f"box {x1}, {y1} to {x2}, {y2} in {record.width} x {record.height} pixels", FAINT))
    return Tile(None if problem.kind in WITHOUT_PICTURE else record, marks, caption)


def _foreign(path: Path) -> ImageRecord | None:
    """An image that is not in the index, without boxes."""
    try:
        header = image_size(path, Doubt())
    except CannotRead:
        return None
    return None if isinstance(header, str) else empty_record(0, path, header.width, header.height)


def _in_pixels(sighting: Sighting, record: ImageRecord) -> tuple[float, ...]:
    sides = (record.width, record.height) * 2 if sighting.fractions else (1, 1, 1, 1)
    return tuple(value * side for value, side in zip(sighting.corners, sides, strict=True))
