"""From a data set that was read to one that is written: `convert` keeps its splits, `split` makes new ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data.formats.folders import plain_name
from gai_yolo.data.index import ImageRecord, Index, Records
from gai_yolo.data_convert.as_coco import check_coco, write_coco
from gai_yolo.data_convert.as_voc import check_voc, write_voc
from gai_yolo.data_convert.as_yolo import check_yolo, write_yolo
from gai_yolo.data_convert.bdd100k import frame_values
from gai_yolo.data_convert.beyond import beyond, coco_values
from gai_yolo.data_convert.classes import ClassMap, mapped
from gai_yolo.data_convert.names import names_in, usable_names
from gai_yolo.data_convert.part import IMAGE_ID, Form, Part
from gai_yolo.data_convert.partition import group_pattern, groups_by_name, partition
from gai_yolo.data_convert.publish import SUMMARY_FILE, Images, new_folder, place_images, refuse_linked, refuse_nested, refuse_output
from gai_yolo.data_convert.source import Source, Wish, folders_of, read_source
from gai_yolo.data_convert.summary import SUMMARY_VERSION, Change, Summary, as_json, changes, merged, written_classes, written_splits
from gai_yolo.errors import DataError

IMAGE_PLACES: dict[Form, str] = {"coco": "images", "yolo": "images", "voc": "JPEGImages"}
CHECKS = {"coco": check_coco, "yolo": check_yolo, "voc": check_voc}
WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}


@dataclass(frozen=True)
class Target:
    """What is to be written, and where."""

    output: Path
    form: Form
    images: Images = "copy"
    overwrite: bool = False


@dataclass(frozen=True)
class Shares:
    """How a data set is to be parted."""

    shares: Mapping[Split, float]
    """Of val and test, above 0, together below 1."""
    seed: int = 0
    pattern: str | None = None
    """Regular expression of the group in an image's name."""
    field: str | None = None
    """Field of the group in an image's record (COCO, BDD100K)."""


def convert(wish: Wish, target: Target, classes: ClassMap | None) -> Summary:
    """Write a data set anew, split by split.

    Raises:
        DataError: as `read_source`, or the output may not be written, or the format cannot hold the classes.
        OSError: the disk refuses; nothing is under the output's name that was not there before.
    """
    source, of_classes = _read(wish, target, classes)
    told = [one for split, index in source.indexes.items() for one in changes(split, index.problems)]
    changed = [one for split, problems in beyond(source) for one in changes(split, problems)]
    parts = [_part(split, index, names_in(index, source.root, split), target, of_classes[split]) for split, index in source.indexes.items()]
    return _write(source, target, parts, (told, changed), None)


def split(wish: Wish, target: Target, shares: Shares, classes: ClassMap | None) -> Summary:
    """Part all images of a data set anew; raises as `convert`, and `DataError` if a split would be empty."""
    pattern = None if shares.pattern is None else group_pattern(shares.pattern)
    source, of_classes = _read(wish, target, classes)
    of_all = Problems()
    names = [name for one, index in source.indexes.items() for name in names_in(index, source.root, one)]
    groups = [None] * len(names) if pattern is None else groups_by_name(names, pattern)
    groups = groups if shares.field is None else _groups_by_field(source, shares.field)
    if (pattern or shares.field is not None) and not any(group is not None for group in groups):
        asked = f"--group {shares.pattern}" if pattern else f"--group-by {shares.field}"
        raise DataError(f"{asked}: no image of {source.root} has such a group (the first is called {names[0]}); correct it.")
    positions = partition(names, groups, shares.shares, shares.seed, of_all)
    images = _numbered_anew([image for index in source.indexes.values() for image in index.images], names, of_all)
    # What is told of an image as a whole holds for its new split as well.
    first, *others = source.indexes.values()
    whole = replace(first, problems=(*first.problems, *(one for index in others for one in index.problems)))
    parts = [
        _part(one, replace(whole, images=Records.of(images[place] for place in some)), [names[place] for place in some], target, Problems())
        for one, some in positions.items()
    ]
    # Of splits that are no more.
    lost = [problems.freeze() for _, problems in (*beyond(source), *of_classes.items())]
    before = (changes(None, merged([one for problems in lost for one in problems])), changes(None, of_all))
    told = [*changes(None, merged(whole.problems))]
    return _write(source, target, parts, (told, [one for rows in before for one in rows]), shares.seed)


def _read(wish: Wish, target: Target, classes: ClassMap | None) -> tuple[Source, dict[Split, Problems]]:
    """The data set, and what a class map changes in its splits."""
    refuse_output(target.output, target.overwrite)
    if wish.path.is_dir():
        refuse_nested(target.output, [wish.path])
    source = read_source(wish)
    refuse_nested(target.output, folders_of(source))
    if os.path.lexists(target.output):
        for index in source.indexes.values():
            refuse_linked(target.output, index)
    told = {one: Problems() for one in source.indexes}
    if classes is None:
        return source, told
    return replace(source, indexes={one: mapped(index, classes, told[one]) for one, index in source.indexes.items()}), told


def _part(split: Split, index: Index, names: list[str], target: Target, problems: Problems) -> Part:
    return Part(split, index, usable_names(names, index, target.form != "coco", problems), problems)


def _write(source: Source, target: Target, parts: list[Part], told: tuple[list[Change], list[Change]], seed: int | None) -> Summary:
    """Everything; `told` are the rows of what was wrong in the source, and of what is changed so far."""
    of_all = Problems()
    CHECKS[target.form](parts, of_all)
    with new_folder(target.output, target.overwrite) as root:
        WRITERS[target.form](root, parts)
        for part in parts:
            place_images(part.index, part.names, root / IMAGE_PLACES[target.form] / part.split, target.images)
        summary = Summary(
            SUMMARY_VERSION,
            str(source.config.path),
            source.form,
            str(target.output),
            target.form,
            target.images,
            written_splits(parts),
            written_classes(parts, target.form),
            told[0],
            [*told[1], *changes(None, of_all), *(one for part in parts for one in changes(part.split, part.problems))],
            seed,
        )
        (root / SUMMARY_FILE).write_text(as_json(summary), encoding="ascii")
    return summary


def _groups_by_field(source: Source, field: str) -> list[str | None]:
    return [group for split, index in source.indexes.items() for group in _groups_in(source, split, index, field)]


def _groups_in(source: Source, split: Split, index: Index, field: str) -> Iterator[str | None]:
    if source.form == "coco":
        by_id = coco_values(source, split, field)
        yield from (by_id.get(key) for key in index.images.image_ids.tolist())
    elif source.form == "bdd100k":
        by_name = {plain_name(name): value for name, value in frame_values(source.root, split, field).items()}
        yield from (by_name.get(plain_name(index.images.name(place))) for place in range(len(index)))
    else:
        raise DataError(
            f"--group-by {field}: {source.form} has no fields of images; give --group with a regular expression on their names."
        )


def _numbered_anew(images: list[ImageRecord], names: list[str], problems: Problems) -> list[ImageRecord]:
    """With ids that are unique over all splits: as they are if they are so, else by name."""
    if len({image.image_id for image in images}) == len(images):
        return images
    found = list(images)
    for number, place in enumerate(sorted(range(len(names)), key=lambda place: (names[place], place)), start=1):
        found[place] = replace(images[place], image_id=number)
    problems.add_many(IMAGE_ID, len(images), f"{names[0]}: {images[0].image_id}, now {found[0].image_id}", "numbered anew, by name")
    return found
