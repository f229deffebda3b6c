"""A folder that appears by a rename, whole or not at all, and the images in it."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from gai_yolo.data.index import Index
from gai_yolo.errors import DataError
from gai_yolo.machine import available_cores
from gai_yolo.store.atomic import SUFFIX
from gai_yolo.store.filesystem import REAL

Images = Literal["copy", "link", "hardlink", "none"]
SUMMARY_FILE = "conversion.json"
"""What a conversion leaves beside the data; by it one is known that may be replaced."""
PAIRS_AT_ONCE = 2000
"""Images that are handed to the copying threads together."""
IN_THE_WAY = frozenset((errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR))
"""What renaming a folder says where a file, a link or a folder with something in it has the name."""

logger = logging.getLogger(__name__)


def refuse_output(output: Path, overwrite: bool) -> None:
    """See that a folder may be written, before anybody waits for what is to be written.

    Raises:
        DataError: something is there that may not be replaced, or the folder is not given by a name.
    """
    if output.name in ("", ".."):
        raise DataError(f"{output}: the folder is renamed when it is complete; give OUTPUT by its own name.")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise DataError(f"{output}: is there already; give another OUTPUT, or --overwrite.")
    if output.is_symlink() or not output.is_dir():
        raise DataError(f"{output}: is no folder, and --overwrite replaces folders only; give another OUTPUT.")
    if any(output.iterdir()) and not (output / SUMMARY_FILE).is_file():
        raise DataError(f"{output}: has not been written by this command (there is no {SUMMARY_FILE} in it); remove it yourself.")


def refuse_nested(output: Path, sources: Sequence[Path]) -> None:
    """Raises `DataError` if the output lies in one of some folders, or one of them in it."""
    here = output.resolve()
    for folder in sources:
        there = folder.resolve()
        if here == there or here.is_relative_to(there) or there.is_relative_to(here):
            raise DataError(f"{output}: lies in {folder}, or the other way round, and that is read from; give an OUTPUT elsewhere.")


def refuse_linked(output: Path, index: Index) -> None:
    """Raises `DataError` if images are links to what lies in a folder that is going to be replaced."""
    here = output.resolve()
    for path in index.images.paths():
        if os.path.islink(path) and Path(path).resolve().is_relative_to(here):  # noqa: PTH114  # of hundreds of thousands
            raise DataError(f"{path}: is a link into {output}, which would be replaced; give another OUTPUT.")


@contextlib.contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which gets its name after the block: with `overwrite` what is there under that name is replaced, and
    removed then.

    Whatever breaks the block off, nothing half lies under the name; a process that is killed leaves a hidden folder `.NAME~*.tmp` beside
    it.

    Raises:
        DataError: somebody else has taken the name meanwhile.
        OSError: the disk refuses.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    mark = os.urandom(6).hex()
    temp, old = (output.with_name(f".{output.name}~{kind}~{mark}{SUFFIX}") for kind in ("new", "old"))
    for left in sorted(output.parent.glob(f".{glob.escape(output.name)}~*~*{SUFFIX}")):
        logger.warning("%s: is left of a conversion that was killed, unless one is at work; remove it yourself", left)
    temp.mkdir()
    try:
        yield temp
        os.sync()  # once for hundreds of thousands of files, where a call for each takes minutes
        _take_name(temp, output, old, overwrite)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(output)  # a full disk names no file
        raise
    REAL.sync_folder(output.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning("%s: what was replaced cannot be removed; remove it yourself", old)


def _take_name(temp: Path, output: Path, old: Path, overwrite: bool) -> None:
    try:
        if overwrite and os.path.lexists(output):
            refuse_output(output, overwrite)  # it may be another one than at the beginning
            output.rename(old)
        temp.rename(output)
    except BaseException as error:
        if old.exists() and not os.path.lexists(output):
            old.rename(output)
        if isinstance(error, OSError) and error.errno in IN_THE_WAY:
            raise DataError(f"{output}: is there by now, written by somebody else; give another OUTPUT.") from None
        raise


def place_images(index: Index, names: Sequence[str], folder: Path, how: Images) -> None:
    """Bring a split's images into a folder, by the given names in it. Several at a time; a terminal sees a bar.

    Raises:
        OSError: a disk refuses.
    """
    if how == "none":
        return
    for parent in sorted({(folder / name).parent for name in names}):
        parent.mkdir(parents=True, exist_ok=True)
    place = {"copy": _copy, "link": _link, "hardlink": _hard_link}[how]
    console = Console(stderr=True)
    starts = range(0, len(names), PAIRS_AT_ONCE)
    shown = track(starts, f"images of {folder.name}", console=console, transient=True, disable=not console.is_terminal)
    with ThreadPoolExecutor(min(32, 2 * available_cores())) as pool:
        for start in shown:
            some = range(start, min(start + PAIRS_AT_ONCE, len(names)))
            list(pool.map(place, (index.images[one].path for one in some), (folder / names[one] for one in some)))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as given, target.open("xb") as taken:
        try:
            REAL.clone(given.fileno(), taken.fileno())
        except OSError:  # not on this disk
            shutil.copyfileobj(given, taken, 1 << 20)


def _link(source: Path, target: Path) -> None:
    target.symlink_to(source.absolute())


def _hard_link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise DataError(f"{source}: cannot be linked to from {target} ({error.strerror}); give --images copy or link.") from None
