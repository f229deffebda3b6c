"""The index of a big data set from one file, instead of a look at every image: what a start after a crash has no time for.

The key is made of the configuration, of the names of all files in the data set's folders, and of size and modification time of those that
are no images. Of the images the cache itself holds both, and whoever looks at them (`content.look`) compares. So a changed, new or
missing file is seen. A cache that cannot be read or written is as good as none, and nobody is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from gai_yolo.data.columns import map_columns, write_columns
from gai_yolo.data.content import look, sample_positions
from gai_yolo.data.formats.check import Split
from gai_yolo.data.formats.folders import IMAGE_SUFFIXES, Folders
from gai_yolo.data.formats.reading import Doubt, expand
from gai_yolo.data.formats.yolo_txt import find_yaml, leads_to
from gai_yolo.data.header import UNOPENED
from gai_yolo.data.index import Category, Index, Problem, Recorded, Records
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig
from gai_yolo.store.atomic import is_temporary, publish

CACHE_FORMAT = 4
"""Raised whenever a reader finds something else in the same files."""
LEAST_IMAGES = 2000
"""A smaller data set is read as fast as its cache would be looked up."""
MOST_KEPT = 8
"""Caches in one folder."""
CACHE_SUFFIX, LOCK_SUFFIX = ".index", ".lock"
ABANDONED = 86400.0
"""Seconds after which nobody writes a file any more, or holds a lock."""
ANOTHER_READS = 600.0
"""Seconds for which a process waits for another one of its machine that reads the same data set."""
DAMAGE = (OSError, ValueError, LookupError, TypeError)
"""What a damaged or foreign file raises."""


class IndexCache:
    """The caches of a data set.

    Args:
        config: what the data set is, and where the caches are.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        try:
            self._roots = folders_of(config)
            self._folder = expand(config.cache_folder) / "index"
            self._listed = listing_digest(self._roots)
        except (OSError, DataError):
            self._roots = []  # whoever reads says what is wrong with the data set's folder; without one for caches each start reads anew

    def get(self, split: Split, read: Callable[[], Index], folders: Folders) -> Index:
        """The index that `read` returns, from the cache if it was read before and none of the files has changed since that it was read
        from; images may have, see `Index.recorded`.

        Args:
            folders: with which `read` reads.

        Raises:
            Whatever `read` does.
        """
        if not self._roots:
            return read()
        path = self._path(split)
        with contextlib.suppress(*DAMAGE):
            return load(path)
        with _alone(path) as has_waited:
            with contextlib.suppress(*DAMAGE):
                return load(path)  # another process has read it meanwhile
            if not has_waited:
                return self._read(path, read, folders)
        # That one could not keep what it has read, and none of those that have waited could: one after the other would take them long.
        return self._read(path, read, folders)

    def _read(self, path: Path, read: Callable[[], Index], folders: Folders) -> Index:
        started = time.time_ns()
        index = read()
        if len(index) >= LEAST_IMAGES and is_whole(index, folders, self._roots):
            with contextlib.suppress(*DAMAGE):
                index = keep(index, path, started)
        return index

    def forget(self, split: Split) -> None:
        """Have a split read anew."""
        if self._roots:
            with contextlib.suppress(OSError):
                self._path(split).unlink(missing_ok=True)

    def _path(self, split: Split) -> Path:
        relevant = self._config.model_dump(mode="json", include={"path", "format", "train", "val", "max_bad_fraction"})
        key = json.dumps([CACHE_FORMAT, split, relevant, [str(root.absolute()) for root in self._roots], self._listed])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{CACHE_SUFFIX}"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """One process of a machine reads at a time; the others find what it has read. Where that cannot be had, each reads. Gives whether
    another one had to be waited for."""
    lock = FileLock(path.with_suffix(LOCK_SUFFIX), timeout=ANOTHER_READS)
    has_waited = False
    with contextlib.suppress(OSError, Timeout, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            has_waited = True
            lock.acquire()
    try:
        yield has_waited
    finally:
        if lock.is_locked:
            lock.release()
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)


def keep(index: Index, path: Path, started: int) -> Index:
    """Write a cache, unless one of the images may have changed while it was read; returns what is mapped from it, or the index as it is.

    Args:
        started: `time.time_ns()` when reading began.

    Raises:
        OSError: the disk refuses.
    """
    stamps = look(index.images)
    if stamps[:, 1].max(initial=0) >= started:
        return index
    recorded = Recorded(index.digest(), sample_positions(index.images), stamps)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, lambda file: save(replace(index, recorded=recorded), file))
    forget_all_but_newest(path.parent)
    return load(path)


def save(index: Index, file: BinaryIO) -> None:
    """Write an index with what is recorded of it.

    Raises:
        OSError: the disk refuses.
    """
    assert index.recorded is not None
    described = {
        "format": CACHE_FORMAT,
        "source": index.source,
        "categories": [[category.id, category.name] for category in index.categories],
        "problems": [[problem.kind, problem.count, problem.example, problem.action] for problem in index.problems],
        "folders": index.images.folders,
        "digest": index.recorded.digest,
        "content": index.content,
    }
    columns = {**index.images.columns, "sample": index.recorded.sample, "stamps": index.recorded.stamps}
    if index.recorded.parts is not None:
        columns["parts"] = index.recorded.parts
    write_columns(file, described, columns)


def load(path: Path) -> Index:
    """The reverse of `save`, mapped; raises one of `DAMAGE` for other files."""
    described, columns = map_columns(path)
    if described["format"] != CACHE_FORMAT:
        raise ValueError("another format")
    return Index(
        source=described["source"],
        categories=tuple(Category(number, name) for number, name in described["categories"]),
        images=Records(columns, described["folders"]),
        problems=tuple(Problem(*problem) for problem in described["problems"]),
        content=described["content"],
        recorded=Recorded(described["digest"], columns["sample"], columns["stamps"], columns.get("parts")),
    )


def is_whole(index: Index, folders: Folders, roots: Sequence[Path]) -> bool:
    """Whether the key would see any change of what an index follows from: not of images, labels or lists elsewhere, to which a description
    may lead, nor when a file can be opened that could not be."""
    places = {*map(Path, index.images.folders), *folders.looked_into()}
    within = all(any(_is_below(place, root) for root in roots) for place in places)
    return within and not any(problem.kind == UNOPENED for problem in index.problems)


def _is_below(path: Path, root: Path) -> bool:
    return path.is_relative_to(root) and ".." not in path.relative_to(root).parts


def forget_all_but_newest(folder: Path) -> None:
    """Remove old caches: a data set that changes, by what is written into its own folder for instance, leaves one each time.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(folder.glob(f"*{CACHE_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)[:-MOST_KEPT]:
        path.unlink(missing_ok=True)
    for path in folder.glob("*.npz"):  # of versions before format 4
        path.unlink(missing_ok=True)
    for path in folder.iterdir():  # of processes that were killed
        if (is_temporary(path.name) or path.suffix == LOCK_SUFFIX) and path.stat().st_mtime < time.time() - ABANDONED:
            path.unlink(missing_ok=True)


def folders_of(config: DataConfig) -> list[Path]:
    """Everything that the configuration leads to, but for the built-in data set, which is small."""
    path = expand(config.path)
    if config.path == Path("shapes") or not path.exists():
        return []
    root = path.parent if path.is_file() else path
    named = [place for split in (config.train, config.val) for place in (split.annotations, split.images) if place is not None]
    roots = [root]
    for place in [*(root / expand(place) for place in named), *_described_by_yaml(path, config)]:
        if not any(_is_below(place, other) for other in roots):
            roots.append(place)
    return roots


def _described_by_yaml(path: Path, config: DataConfig) -> list[Path]:
    """Where a YOLO data.yaml leads, if the data set may have one; whoever reads it says what is wrong with it."""
    doubt = Doubt()
    with contextlib.suppress(DataError):
        source = path if path.is_file() else find_yaml(path, Folders(doubt)) if config.format in ("auto", "yolo") else None
        return [] if source is None else leads_to(source, doubt)
    return []


def listing_digest(roots: Sequence[Path]) -> str:
    """A digest that changes with the name of any file, and with size and time of any that is no image.

    Raises:
        OSError: a folder cannot be read.
    """
    hasher = hashlib.sha256()
    for root in roots:
        if root.is_dir():
            _add_folder(hasher, str(root), set())
        else:
            hasher.update(_stamped(root.name, root.stat()))
    return hasher.hexdigest()


def _add_folder(hasher: hashlib._Hash, folder: str, above: set[tuple[int, int]]) -> None:
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in above:  # a link that leads back
        return
    folders, pictures, others = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            elif f".{entry.name.rpartition('.')[2]}".lower() in IMAGE_SUFFIXES:
                pictures.append(entry.name)
            else:
                with contextlib.suppress(FileNotFoundError):  # a link to nowhere
                    others.append(_stamped(entry.name, entry.stat()))
    names = "\0".join([folder, *sorted(pictures), "", *sorted(folders)])
    hasher.update(names.encode(errors="surrogateescape") + b"\0\0" + b"".join(sorted(others)))
    for name in sorted(folders):
        _add_folder(hasher, f"{folder}/{name}", above | {(status.st_dev, status.st_ino)})


def _stamped(name: str, status: os.stat_result) -> bytes:
    return f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
