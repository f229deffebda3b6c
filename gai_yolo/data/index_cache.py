"""The index of a big data set from one file, instead of a look at every image: what a start after a crash has no time for.

The key is made of the configuration and of the name, size and modification time of every file in the data set's folders, so a
changed, new or missing file makes another key. A cache that cannot be read or written is as good as none, and nobody is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from gai_yolo.data.check import Split, expand
from gai_yolo.data.header import UNOPENED
from gai_yolo.data.index import Category, ImageRecord, Index, Problem
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig
from gai_yolo.store.atomic import publish

FORMAT = 4
"""Raised whenever a reader finds something else in the same files."""
LEAST_IMAGES = 2000
"""A smaller data set is read as fast as its cache would be looked up."""
MOST_KEPT = 8
"""Caches in one folder."""
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
"""What a damaged or foreign file raises."""


def cached(config: DataConfig, split: Split, read: Callable[[], Index]) -> Index:
    """The index that `read` returns, from the cache if it was read before and no file has changed since.

    Raises:
        Whatever `read` does.
    """
    try:
        roots = folders_of(config)
        path = expand(config.cache_folder) / "index" / f"{key_of(config, split, roots)}.npz" if roots else None
    except (OSError, DataError):
        path = None  # `read` says what is wrong with the data set's folder; without one for the cache each start reads anew
    if path is None:
        return read()
    with contextlib.suppress(*DAMAGE):
        return unpack(path.read_bytes())
    index = read()
    if len(index) >= LEAST_IMAGES and is_whole(index, roots):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, lambda file: file.write(pack(index)))
            forget_all_but_newest(path.parent)
    return index


def is_whole(index: Index, roots: Sequence[Path]) -> bool:
    """Whether the key would see any change of what an index follows from: not of images elsewhere, to which a description may lead, nor
    when a file can be opened that could not be."""
    within = all(any(folder.is_relative_to(root) for root in roots) for folder in {image.path.parent for image in index.images})
    return within and not any(problem.kind == UNOPENED for problem in index.problems)


def forget_all_but_newest(folder: Path) -> None:
    """Remove old caches: a data set that changes, by what is written into its own folder for instance, leaves one each time.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)[:-MOST_KEPT]:
        path.unlink(missing_ok=True)


def folders_of(config: DataConfig) -> list[Path]:
    """Everything that the configuration leads to, but for the built-in data set, which is small."""
    path = expand(config.path)
    if config.path == Path("shapes") or not path.exists():
        return []
    root = path.parent if path.is_file() else path
    places = [place for split in (config.train, config.val) for place in (split.annotations, split.images) if place is not None]
    return [root, *(root / expand(place) for place in places if not (root / expand(place)).is_relative_to(root))]


def key_of(config: DataConfig, split: Split, roots: list[Path]) -> str:
    """A digest that changes with the configuration and with any file.

    Raises:
        OSError: a folder cannot be read.
    """
    relevant = config.model_dump(mode="json", include={"path", "format", "train", "val", "max_bad_fraction"})
    hasher = hashlib.sha256(json.dumps([FORMAT, split, relevant, [str(root.absolute()) for root in roots]]).encode())
    for root in roots:
        for name, size, modified in sorted(_files(str(root)) if root.is_dir() else [_file(root)]):
            hasher.update(f"{name}\0{size}\0{modified}\n".encode(errors="surrogateescape"))
    return hasher.hexdigest()[:32]


def pack(index: Index) -> bytes:
    """An index as the bytes of a NumPy archive."""
    images = index.images
    described = {
        "format": FORMAT,
        "source": index.source,
        "categories": [[category.id, category.name] for category in index.categories],
        "problems": [[p.kind, p.count, p.example, p.action] for p in index.problems],
        "paths": [str(image.path) for image in images],
    }
    stream = io.BytesIO()
    np.savez(
        stream,
        described=np.frombuffer(json.dumps(described).encode(), dtype=np.uint8),
        numbers=np.array([(i.image_id, i.width, i.height, i.orientation, len(i.boxes)) for i in images], dtype=np.int64).reshape(-1, 5),
        boxes=np.concatenate([image.boxes for image in images]),
        classes=np.concatenate([image.classes for image in images]),
        crowd=np.concatenate([image.crowd for image in images]),
        areas=np.concatenate([image.areas for image in images]),
    )
    return stream.getvalue()


def unpack(data: bytes) -> Index:
    """The reverse of `pack`; raises one of `DAMAGE` for other bytes."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        parts = {name: archive[name] for name in archive.files}
    described: dict[str, Any] = json.loads(parts["described"].tobytes())
    if described["format"] != FORMAT:
        raise ValueError("another format")
    ends = np.cumsum(parts["numbers"][:, 4])[:-1]
    arrays = [np.split(parts[name], ends) for name in ("boxes", "classes", "crowd", "areas")]
    rows = zip(parts["numbers"].tolist(), described["paths"], *arrays, strict=True)
    return Index(
        source=described["source"],
        categories=tuple(Category(number, name) for number, name in described["categories"]),
        images=tuple(
            ImageRecord(image_id, Path(path), width, height, boxes, classes, crowd, areas, orientation)
            for (image_id, width, height, orientation, _), path, boxes, classes, crowd, areas in cast(Any, rows)
        ),
        problems=tuple(Problem(*problem) for problem in described["problems"]),
    )


def _files(folder: str, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path, f"{prefix}{entry.name}/")
            else:
                with contextlib.suppress(FileNotFoundError):  # a link to nowhere
                    status = entry.stat()
                    yield f"{prefix}{entry.name}", status.st_size, status.st_mtime_ns


def _file(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns
