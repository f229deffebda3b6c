"""From what the configuration says to an index: finds out how a data set is written and hands it to its reader."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from gai_yolo.data.content import content_digest, look, part_digests, sample_positions
from gai_yolo.data.formats import coco, voc_files, yolo_txt
from gai_yolo.data.formats.check import Split
from gai_yolo.data.formats.coco import read_coco
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.reading import Doubt, expand, patiently
from gai_yolo.data.formats.voc import has_split, read_voc
from gai_yolo.data.formats.yolo_txt import read_yolo
from gai_yolo.data.index import Index, Problem, Recorded
from gai_yolo.data.index_cache import IndexCache
from gai_yolo.data.shapes import SHAPES_VERSION, ensure_shapes
from gai_yolo.errors import DataError, refused_by
from gai_yolo.sections import DataConfig, SplitConfig

BUILT_IN = Path("shapes")
NO_BOXES = "validation image in a set without any box"
NO_INSTANCE = "class without a box"
TOO_MANY = "image with more boxes of a class than COCO's metrics count"
MOST_COUNTED = 100
"""Detections of an image and a class that COCO's metrics look at."""
SPLITS: tuple[Split, ...] = ("train", "val")


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of small objects come into being, none of which refers back to another: looking for such takes a sixth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load_index(config: DataConfig, split: Split, from_cache: bool = True) -> Index:
    """Read one split of the configured data set.

    `config.path` is the word `shapes` (the built-in data set, written below `config.cache_folder` when it is first asked
    for; a folder of that name is given as an absolute path), a data set folder, or a YOLO data.yaml.

    Args:
        from_cache: take the index of a big data set from its cache if there is one; a cache knows no sightings of problems.

    Raises:
        DataError: there is no data set, it is damaged beyond `config.max_bad_fraction`, the split has no images, or
            the training split has no boxes.
        CannotRead: the disk or the network fails.
    """
    return _from(IndexCache(config) if from_cache else None, config, split)


def read_any(config: DataConfig, split: Split) -> Index:
    """Read one split, also one that there is nothing to learn in, or that no training reads (test). Never from the cache.

    Raises:
        DataError, CannotRead: as `load_index`, or it has no test split.
    """
    if split == "test" and config.path == BUILT_IN:
        raise DataError(f"data.path {config.path}: the built-in data set has the splits train and val.")
    if split == "test" and split not in splits_of(config)[1]:
        raise DataError(f"data.path {config.path}: has no test split; docs/data.md says where one is looked for.")
    return _read_patiently(None, config, split)


def splits_of(config: DataConfig) -> tuple[Literal["coco", "yolo", "voc"], list[Split]]:
    """How a data set is written, and which splits it has, whether they can be read or not.

    Raises:
        DataError: there is no data set.
    """
    folders = Folders(Doubt())
    path = expand(config.path)
    kind = _kind(path, config, folders)
    places: dict[Split, SplitConfig] = {"train": config.train, "val": config.val, "test": SplitConfig()}
    if kind == "coco":
        return kind, [split for split, place in places.items() if coco.find_annotations(path, place, split, folders)]
    if kind == "voc":
        return kind, [split for split, place in places.items() if has_split(path, place, split)]
    named = yolo_txt.named_splits(_description(path, folders), folders.doubt)
    return kind, [split for split, place in places.items() if split in named or place.images is not None]


def _from(cache: IndexCache | None, config: DataConfig, split: Split) -> Index:
    index = _read_patiently(cache, config, split)
    if split == "train" and index.images.crowd.all():  # crowd regions are not learned
        crowds = len(index.images.boxes)
        told = [f"{crowds} x crowd region, not learned"] if crowds else []
        found = "; ".join([*told, *(f"{p.count} x {p.kind}, {p.action} (first: {p.example})" for p in index.problems)])
        raise DataError(f"{index.source}: none of the {len(index)} training images has a usable box ({found or 'no labels were found'}).")
    return index


def _read_patiently(cache: IndexCache | None, config: DataConfig, split: Split) -> Index:
    doubt = Doubt()

    def read() -> Index:
        folders = Folders(doubt)
        with _without_collector():
            if cache is None:
                return _read(config, split, folders)
            return cache.get(split, lambda: _read(config, split, folders), folders)

    try:
        return patiently(read, config.path, doubt)
    except OSError as error:
        refusal = DataError(f"data.path {config.path}: {error.filename or 'something there'} cannot be read ({error.strerror}).")
        raise refused_by(error, refusal) from None


def _remarks(index: Index, split: Split) -> Iterator[Problem]:
    """What there is nothing of to learn, or to measure; and where even a perfect detector gets less than 1."""
    counts = index.images.class_counts(len(index.categories))
    absent = [category.name for category, count in zip(index.categories, counts, strict=True) if not count]
    if split != "train" and not counts.any():
        yield Problem(NO_BOXES, len(index), index.source, "there will be no metrics, no best epoch and no best.pt")
    elif absent:
        yield Problem(NO_INSTANCE, len(absent), f"{absent[0]} in {index.source}", "not learned" if split == "train" else "not measured")
    if split == "train":
        return
    crowded = [index.images[position] for position in index.images.with_more_than(MOST_COUNTED)]
    many = [image.path for image in crowded if np.bincount(image.classes[~image.crowd], minlength=1).max() > MOST_COUNTED]
    if many:
        yield Problem(TOO_MANY, len(many), str(many[0]), f"the best {MOST_COUNTED} detections count, no mAP can reach 1")


def load_indexes(config: DataConfig) -> tuple[Index, Index]:
    """Read both splits, train and val, and check that they belong together.

    Raises:
        DataError: as `load_index`, or the classes of the splits differ.
    """
    cache = IndexCache(config)
    train, val = (described(_from(cache, config, split), split, config, cache) for split in SPLITS)
    check_classes(train, val)
    return train, val


def check_classes(train: Index, val: Index, splits: tuple[Split, Split] = ("train", "val")) -> None:
    """Refuse splits that do not belong together; `splits` are their names.

    Raises:
        DataError: their classes differ.
    """
    if train.categories != val.categories:
        ours = {(category.id, category.name) for category in train.categories}
        theirs = {(category.id, category.name) for category in val.categories}
        differences = [
            f"only in {name}: {_listed(these)}" for name, these in zip(splits, (ours - theirs, theirs - ours), strict=True) if these
        ]
        raise DataError(
            f"{val.source}: its classes differ from those of {train.source} ({'; '.join(differences)}); use the same categories in both."
        )


def described(index: Index, split: Split, config: DataConfig, cache: IndexCache | None = None) -> Index:
    """The index with what its image files hold now, and what there is nothing of in it; raises as `load_index`.

    Args:
        cache: that it comes from, and that is not to be believed if an image has changed.
    """
    if config.path == BUILT_IN:  # it follows from its version; its low bits may differ between kinds of processors
        index = replace(index, content=f"shapes {SHAPES_VERSION}")
    else:
        may_be_old = cache is not None and index.recorded is not None
        stamps = look(index.images, may_be_gone=may_be_old)  # a name in the listing may be a link to nowhere
        if cache is not None and index.recorded is not None and not np.array_equal(stamps, index.recorded.stamps):
            cache.forget(split)
            index = _from(cache, config, split)
            stamps = look(index.images)
        sample = sample_positions(index.images) if index.recorded is None else index.recorded.sample
        parts = part_digests(index.images, sample)
        index = replace(index, content=content_digest(stamps, parts), recorded=Recorded(index.digest(), sample, stamps, parts))
    return replace(index, problems=(*index.problems, *_remarks(index, split)))


def _listed(categories: set[tuple[int, str]]) -> str:
    shown = [f"{number} {name!r}" for number, name in sorted(categories)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _read(config: DataConfig, split: Split, folders: Folders) -> Index:
    if config.path == BUILT_IN:
        if config.format not in ("auto", "coco"):
            raise DataError(f"data.format: the built-in data set `shapes` is COCO, not {config.format}; remove data.format.")
        root = ensure_shapes(expand(config.cache_folder))
        return read_coco(root, config.model_copy(update={"train": SplitConfig(), "val": SplitConfig()}), split, folders)
    path = expand(config.path)
    kind = _kind(path, config, folders)
    if kind == "coco":
        return read_coco(path, config, split, folders)
    if kind == "yolo":
        return read_yolo(_description(path, folders), config, split, folders)
    return read_voc(path, config, split, folders)


def _description(path: Path, folders: Folders) -> Path:
    found = path if path.is_file() else yolo_txt.find_yaml(path, folders)
    if found is None:
        raise DataError(f"data.path {path}: found no YOLO description there (looked for {yolo_txt.USUAL_YAML}).")
    return found


def _kind(path: Path, config: DataConfig, folders: Folders) -> Literal["coco", "yolo", "voc"]:
    if path.is_file():
        if path.suffix.lower() not in (".yaml", ".yml") or config.format in ("coco", "voc"):
            raise DataError(f"data.path {path}: give the data set's folder (a single file can only be a YOLO data.yaml).")
        return "yolo"
    if not path.is_dir():
        raise DataError(f"data.path {path}: there is no such folder or file; give `shapes`, a data set folder, or a YOLO data.yaml.")
    if config.format != "auto":
        return config.format
    places: dict[Split, SplitConfig] = {"train": config.train, "val": config.val}
    if any(coco.find_annotations(path, place, split, folders) for split, place in places.items()):
        return "coco"
    if yolo_txt.find_yaml(path, folders):
        return "yolo"
    if voc_files.find_xml(path, folders):
        return "voc"
    raise DataError(
        f"data.path {path}: found no data set there; looked for COCO ({coco.USUAL_JSON}), YOLO ({yolo_txt.USUAL_YAML}) "
        f"and VOC ({voc_files.USUAL_XML})."
    )
