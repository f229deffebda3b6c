"""What is converted: every split of a data set, by the readers that training reads with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gai_yolo.data.formats import yolo_txt
from gai_yolo.data.formats.check import Problems, Split
from gai_yolo.data.formats.folders import Folders
from gai_yolo.data.formats.reading import Doubt, expand, read_text
from gai_yolo.data.index import Index
from gai_yolo.data.shapes import ensure_shapes
from gai_yolo.data.sources import BUILT_IN, check_classes, read_any, splits_of
from gai_yolo.data_convert import bdd100k
from gai_yolo.data_convert.dates import Dates
from gai_yolo.data_convert.part import Form
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

ALL_SPLITS: tuple[Split, ...] = ("train", "val", "test")
WHOLE: Split = "train"
"""As which a data set is read that has no splits."""


@dataclass(frozen=True)
class Wish:
    """What is to be read, as the command line says it."""

    path: Path
    form: Literal["auto", "coco", "yolo", "voc", "bdd100k"] = "auto"
    splits: tuple[Split, ...] = ()
    """Empty: all that there are."""
    annotations: Path | None = None
    """With `images`: where a data set of one split lies, if not in a usual place; relative to `path`."""
    images: Path | None = None
    max_bad_fraction: float = 0.1
    dates: Dates = field(default_factory=Dates)


@dataclass(frozen=True)
class Source:
    """A data set that was read."""

    form: Literal["coco", "yolo", "voc", "bdd100k"]
    root: Path
    config: DataConfig
    indexes: dict[Split, Index]
    beyond: tuple[tuple[Split, Problems], ...] = ()
    """Of BDD100K: what was there beside boxes."""

    def place(self, split: Split) -> SplitConfig:
        """Where a split lies, if not in a usual place."""
        return {"train": self.config.train, "val": self.config.val}.get(split, SplitConfig())


def read_source(wish: Wish) -> Source:
    """Read every split.

    Raises:
        DataError: there is no data set, a split cannot be read, or the classes of its splits differ.
        CannotRead: the disk or the network fails.
    """
    path = ensure_shapes(expand(DataConfig().cache_folder)) if wish.path == BUILT_IN else expand(wish.path)
    if not path.exists():
        raise DataError(f"{path}: there is no such folder or file; give `shapes`, a data set folder, or a YOLO data.yaml.")
    dates = wish.dates
    if wish.form == "bdd100k" or (wish.form == "auto" and wish.annotations is None and bdd100k.is_there(path)):
        found = bdd100k.read_bdd100k(path, _chosen(wish, bdd100k.splits_in(path), path), dates, wish.max_bad_fraction)
        source = Source("bdd100k", path, DataConfig(path=path), found.indexes, found.beyond)
    elif dates.are_asked_for:
        raise DataError("--since, --until: only BDD100K has dates; leave them out for other formats.")
    else:
        source = _read_usual(wish, path)
    first, *others = source.indexes
    for other in others:
        check_classes(source.indexes[first], source.indexes[other], (first, other))
    return source


def _chosen(wish: Wish, there: Sequence[Split], path: Path) -> list[Split]:
    for split in wish.splits:
        if split not in there:
            raise DataError(f"{path}: there is no split {split}, but {', '.join(there) or 'none'}; correct --splits.")
    return [split for split in ALL_SPLITS if split in (wish.splits or there)]


def _read_usual(wish: Wish, path: Path) -> Source:
    form: Literal["auto", "coco", "yolo", "voc"] = "auto" if wish.form == "bdd100k" else wish.form
    whole = SplitConfig(annotations=wish.annotations, images=wish.images)
    config = DataConfig(path=path, format=form, max_bad_fraction=wish.max_bad_fraction, train=whole)
    folders = Folders(Doubt())
    if whole == SplitConfig():
        try:
            kind, there = splits_of(config)
        except DataError:
            config, kind, there = _without_splits(config, path, folders)
        else:
            if not there:
                config, kind, there = _without_splits(config, path, folders)
    else:
        kind, there = splits_of(config)[0], [WHOLE]
    indexes = {split: _read(config, split, len(there)) for split in _chosen(wish, there, path)}
    root = path
    if kind == "yolo":
        description = path if path.is_file() else yolo_txt.find_yaml(path, folders)
        assert description is not None
        root = yolo_txt.root_of_yaml(description, folders.doubt)
    return Source(kind, root, config.model_copy(update={"format": kind}), indexes)


def _read(config: DataConfig, split: Split, count: int) -> Index:
    try:
        return read_any(config, split)
    except DataError as error:
        if count == 1:
            raise
        raise DataError(f"{error} (Or leave the split out: --splits.)") from None


def _without_splits(config: DataConfig, path: Path, folders: Folders) -> tuple[DataConfig, Form, list[Split]]:
    """Where a data set lies that has no splits; raises what reading it says if it is not found."""
    form = config.format
    if form in ("auto", "coco") and path.is_dir():
        found = [one for folder in (path, path / "annotations") for one in folders.matching(folder, "*.json") if _is_coco(one)]
        if len(found) > 1:
            names = ", ".join(str(one.relative_to(path)) for one in found)
            raise DataError(f"{path}: several files could be meant ({names}); say which with --annotations.")
        if found:
            return _whole(config, annotations=found[0].relative_to(path)), "coco", [WHOLE]
    kind, there = splits_of(config)  # raises if there is nothing
    if kind == "voc" or (kind == "yolo" and not there):
        folder = path.parent if path.is_file() else path
        usual = ("JPEGImages", "images", ".") if kind == "voc" else ("images",)
        images = next((name for name in usual if (folder / name).is_dir()), None)
        if images is not None:
            return _whole(config, images=Path(images)), kind, [WHOLE]
    raise DataError(f"{path}: found neither splits nor a folder of images; say where they are with --annotations and --image-folder.")


def _whole(config: DataConfig, annotations: Path | None = None, images: Path | None = None) -> DataConfig:
    return config.model_copy(update={"train": SplitConfig(annotations=annotations, images=images)})


def _is_coco(path: Path) -> bool:
    try:
        content: Any = json.loads(read_text(path, "json", Doubt()))
    except (DataError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories"))


def folders_of(source: Source) -> list[Path]:
    """Everything that is read from: nothing may be written there."""
    return [source.root, *(Path(folder) for index in source.indexes.values() for folder in index.images.folders)]
