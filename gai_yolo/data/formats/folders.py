"""Which files a data set's folders hold, and under which names; names come from other people's systems."""

from __future__ import annotations

import fnmatch
import os
import unicodedata
from pathlib import Path

from gai_yolo.data.formats.reading import Doubt, patiently
from gai_yolo.errors import DataError, refused_by

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm"}
)
OTHER_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".gif", ".jp2", ".jxl", ".dng", ".raw", ".cr2", ".nef", ".exr", ".hdr", ".psd", ".svg"}
)
"""Of pictures that OpenCV does not decode, not everywhere or not as one picture."""

NOT_READ = "file that may be an image, of a kind that is not read"


class Folders:
    """Which files are there: one listing for each folder, because network file systems answer single questions slowly.

    Args:
        doubt: that of the index that is being read; for everything else that is read for it, too.
    """

    def __init__(self, doubt: Doubt) -> None:
        self.doubt = doubt
        self._names: dict[Path, frozenset[str]] = {}
        self._resolved: dict[Path, Path] = {}
        self._plain: dict[Path, dict[str, str]] = {}
        self._under: dict[Path, list[Path]] = {}
        self._others: set[Path] = set()

    def looked_into(self) -> set[Path]:
        """All folders of which anything was asked."""
        return {*self._names, *self._under, *self._others}

    def look_into(self, folder: Path) -> None:
        """Let it be known that a file of a folder is read of which nothing is asked."""
        self._others.add(folder)

    def names(self, folder: Path) -> frozenset[str]:
        """Names in a folder; none if there is no such folder.

        Raises:
            DataError: the folder is there but may not be read.
        """
        if folder not in self._names:
            try:
                self._names[folder] = patiently(lambda: frozenset(path.name for path in folder.iterdir()), folder, self.doubt)
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
            except OSError as error:
                raise refused_by(error, DataError(f"{folder}: cannot list the folder ({error.strerror}); check its permissions.")) from None
        return self._names[folder]

    def matching(self, folder: Path, *patterns: str) -> list[Path]:
        """Files whose names match one of some patterns, sorted; no hidden ones. (`Path.glob` finds nothing where it may not read.)

        Raises:
            DataError: as `names`.
        """
        return sorted(
            folder / name
            for name in self.names(folder)
            if not is_hidden(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        )

    def files_under(self, folder: Path) -> list[Path]:
        """All files in a folder and below, linked folders too, sorted by path; hidden ones are passed over.

        Raises:
            DataError: a folder cannot be read.
        """
        if folder not in self._under:
            try:
                self._under[folder] = patiently(lambda: _walked(folder), folder, self.doubt)
            except OSError as error:
                refusal = DataError(f"{error.filename}: cannot list the folder ({error.strerror}); check the path and its permissions.")
                raise refused_by(error, refusal) from None
        return self._under[folder]

    def holds(self, path: Path) -> bool:
        """Whether the file is in its folder's listing."""
        return path.name in self.names(path.parent)

    def spelled(self, path: Path) -> Path:
        """A path as its folders spell its names: macOS takes letters with accents apart, so that a text file and a folder may hold the same
        name in two forms. The path itself if there is no such file."""
        if self.holds(path):
            return path
        if not str(path.parent).isascii() and not self.names(path.parent):
            path = self.spelled(path.parent) / path.name
        if path.parent not in self._plain:
            self._plain[path.parent] = {plain_name(name): name for name in self.names(path.parent)}
        return path.with_name(self._plain[path.parent].get(plain_name(path.name), path.name))

    def path_inside(self, root: Path, file_name: str, record: str) -> Path:
        """`root / file_name`, where the name comes from a file that someone else may have written, on another system: a backslash in it
        parts folders unless there is a file of that name.

        Folders are resolved, so that a linked folder cannot lead outside; a file that is itself a link is followed,
        because link farms (git-annex, DVC) are a usual way of keeping images.

        Raises:
            DataError: the name leads out of `root`.
        """
        parts = file_name.replace("\\", "/").split("/")
        plain = ".." not in parts and "\0" not in file_name and not parts[0].endswith(":") and parts[0] != ""
        path = root / file_name if plain else root
        if plain and "\\" in file_name and not self.holds(path):
            path = root.joinpath(*parts)
        path = self.spelled(path) if plain and path.name else path
        if not plain or not self._resolve(path.parent).is_relative_to(self._resolve(root)):
            raise DataError(f"{record}: the file name {file_name!r} leads out of {root}; write names relative to that folder.")
        return path

    def real(self, path: Path) -> Path:
        """The same file by the one name of its folder. Files that are links are not followed: stores that know files by their content (DVC)
        link equal ones to one, and their annotations may differ."""
        try:
            return self._resolve(path.parent) / path.name
        except DataError:
            return path

    def _resolve(self, folder: Path) -> Path:
        if folder not in self._resolved:
            try:
                self._resolved[folder] = folder.resolve()
            except (OSError, ValueError, RuntimeError):  # link loops, names that the file system cannot hold
                raise DataError(f"{str(folder)!r}: not a folder that can be opened; correct the file names in it.") from None
        return self._resolved[folder]


def plain_name(name: str) -> str:
    """A name in one form of Unicode (NFC), whatever system wrote it."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Whether a name is none of a person's: what systems and tools leave behind (`._1.jpg`, `.ipynb_checkpoints`, `__MACOSX`)."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture(name: str) -> bool:
    """Whether a file may be an image, of a kind that is read or not."""
    return not is_hidden(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES | OTHER_SUFFIXES


def _walked(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(parent).stat()
        here, around = (status.st_dev, status.st_ino), above.pop(parent, frozenset())
        if here in around:  # a link to a folder that it lies in
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_hidden(name)]
        above.update((os.path.join(parent, name), around | {here}) for name in folders)  # noqa: PTH118  # as os.walk names them
        found += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted(found)
