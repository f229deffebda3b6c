"""Training images that were lost between two starts: the run goes on, told, and everything else in it is as it would have been.

Each node's run folder remembers the training set that the run began with. Where some of its images are gone later, not more than
`data.max_bad_fraction` of them, they keep their places: the order of samples and the augmentation of all others are the same, and grey
without boxes is trained on where they would have been seen. Put back, they are trained on again. Anything else that changes is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gai_yolo.data.content import content_digest, part_digests
from gai_yolo.data.index import ImageRecord, Index, Problem, Recorded, Records
from gai_yolo.data.index_cache import DAMAGE, load, save
from gai_yolo.log import OF_NODE, told_if_refused
from gai_yolo.store.atomic import publish
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.training.context import JobContext

GONE_IMAGE = "training image that is gone since the run began"
ACTION = "grey is trained on in its place, all else is as it was; put it back, or start over with --fresh"

logger = logging.getLogger(__name__)


def as_it_began(index: Index, folder: RunFolder, max_bad_fraction: float) -> Index:
    """The training set that this node's run folder remembers, if all that is missing of it are images; otherwise `index`."""
    kept = _kept(folder)
    if kept is None or index.recorded is None or kept.digest() == index.digest() or kept.categories != index.categories:
        return index
    places = _places(kept.images, index.images)
    if places is None:
        return index
    lost = sorted(set(range(len(kept))) - set(places))
    if not lost or len(lost) > max_bad_fraction * len(kept):
        return index
    was, now = kept.recorded, index.recorded
    assert was is not None and was.parts is not None
    images = list(kept.images)
    for place, record in zip(places, index.images, strict=True):
        images[place] = replace(images[place], path=record.path)  # the folder may have been moved
    records = Records.of(images)
    stamps, parts, there = was.stamps.copy(), was.parts.copy(), ~np.isin(was.sample, lost)
    stamps[places] = now.stamps
    parts[there] = part_digests(records, was.sample[there])
    return replace(
        index,
        images=records,
        problems=(*index.problems, Problem(GONE_IMAGE, len(lost), str(records[lost[0]].path), ACTION)),
        content=content_digest(stamps, parts),
        recorded=Recorded(was.digest, was.sample, stamps, parts),
        lost=frozenset(lost),
    )


def remember_training_set(index: Index, context: JobContext) -> None:
    """Let each node's run folder remember it. A collective; a disk that refuses is told."""
    recorded = index.recorded
    if recorded is None or index.lost:
        return

    def write() -> None:
        kept, path = _kept(context.folder), context.folder.training_set
        if kept is not None and (kept.digest(), kept.content) == (index.digest(), index.content):
            return
        with told_if_refused(logger, path, then="an image that is lost between two starts will end the run", extra=OF_NODE):
            publish(path, lambda file: save(index, file))

    context.on_each_node(write)


def _kept(folder: RunFolder) -> Index | None:
    with contextlib.suppress(*DAMAGE):
        kept = load(folder.training_set)
        if kept.recorded is not None and kept.recorded.parts is not None:
            return kept
    return None


def _places(before: Records, now: Records) -> list[int] | None:
    """Where each of the present images was before, if they are some of those, in the same order: by their paths, because folders may have
    images of the same names; by what their paths have not in common, where the folder has been moved."""
    return _aligned(before, now, list(before.paths()), list(now.paths())) or _aligned(before, now, _tails(before), _tails(now))


def _tails(images: Records) -> list[str]:
    folder = os.path.commonpath([os.path.abspath(folder) for folder in images.folders])  # noqa: PTH100  # links are not followed
    return [os.path.relpath(path, folder) for path in images.paths()]


def _aligned(before: Records, now: Records, names_before: Sequence[str], names_now: Sequence[str]) -> list[int] | None:
    places: list[int] = []
    rest = iter(enumerate(names_before))
    for record, name in zip(now, names_now, strict=True):
        place = next((place for place, was in rest if was == name and _same(before[place], record)), None)
        if place is None:
            return None
        places.append(place)
    return places


def _same(one: ImageRecord, other: ImageRecord) -> bool:
    """But for the id, which is a number in the row where the annotations have none, and the path."""
    return (
        (one.width, one.height, one.orientation) == (other.width, other.height, other.orientation)
        and np.array_equal(one.boxes, other.boxes)
        and np.array_equal(one.classes, other.classes)
        and np.array_equal(one.crowd, other.crowd)
    )
