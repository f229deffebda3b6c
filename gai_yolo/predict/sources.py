"""What is to be looked at: images, videos and cameras out of the words of a command line."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gai_yolo.errors import Refusal
from gai_yolo.inference.pictures import PICTURE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".mts", ".m2ts", ".ogv"),
        *(".mjpg", ".mjpeg"),
    )
)
PREDICTION_FILE = "prediction.json"
"""A folder that holds it was written by this command, and what is in it is not looked at."""
STDIN = "-"
MOST_LISTED = 2**28
"""Bytes of a list of files."""
LONGEST_FILE_NAME = 120
"""Letters of an output's name, without its suffix: what is added to it must fit, too."""


@dataclass(frozen=True)
class Item:
    """One image, video or camera."""

    path: Path
    """Of a camera its number."""
    output: str
    """Relative name, without suffix, of what is written about it; no other item of a command has it, whatever the case of its letters."""
    is_camera: bool = False

    @property
    def is_video(self) -> bool:
        """Whether it is a file of many frames."""
        return not self.is_camera and self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass
class Sources:
    """What the words of a command line have led to."""

    items: list[Item] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One for each word, or folder, that leads to nothing."""


def find_sources(words: Sequence[str], stdin: BinaryIO | None = None) -> Sources:
    """Find what is to be looked at, each file once, in the order of the words; within a folder in that of the names.

    Args:
        words: files; folders, which are searched to the bottom for files with the suffixes of images and videos, but for hidden ones and
            results of this command; patterns (`*`, `?`, `[`, `**`) where no file has that name; the number of a camera; or `-`.
        stdin: where `-` reads a list of files and folders, one a line, or, if there is a zero byte in it, each ended by one. Lines are
            names and no patterns.

    Raises:
        Refusal: `-` has got an image in place of a list.
    """
    sources = Sources()
    names, seen = _Names(), set[Path]()

    def add(path: Path, below: Path | None) -> None:
        identity = path.parent.resolve() / path.name  # a linked folder is the folder itself, a linked file one of its own name
        if identity not in seen:
            seen.add(identity)
            sources.items.append(Item(path, names.free(path, below)))

    def add_file_or_folder(path: Path) -> None:
        if not path.is_dir():
            add(path, None)
            return
        found = list(_files_below(path, sources.problems))
        for one in found:
            add(one, path)
        if not found:
            sources.problems.append(f"{path}: holds no file with the suffix of an image or a video.")

    for word in words:
        if word == STDIN:
            for path in _listed(sys.stdin.buffer if stdin is None else stdin):
                add_file_or_folder(path)
        elif os.path.lexists(word):
            add_file_or_folder(Path(word))
        elif word.isascii() and word.isdecimal():
            sources.items.append(Item(Path(word), names.free(Path(f"camera_{word}"), None), is_camera=True))
        elif glob.has_magic(word):
            matches = sorted(glob.glob(os.path.expanduser(word), recursive=True))  # noqa: PTH111, PTH207  # of any depth and root
            for match in matches:
                add_file_or_folder(Path(match))
            if not matches:
                sources.problems.append(f"{word}: no file has such a name.")
        else:
            sources.problems.append(f"{word}: there is no such file, folder or camera.")
    return sources


def _files_below(folder: Path, problems: list[str]) -> Iterator[Path]:
    """Images and videos in a folder and those below it, linked ones included, each folder once."""
    seen: set[tuple[int, int]] = set()

    def tell(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be read ({error.strerror}).")

    for parent, folders, files in os.walk(folder, onerror=tell, followlinks=True):
        about = os.stat(parent)  # noqa: PTH116
        if (about.st_dev, about.st_ino) in seen or PREDICTION_FILE in files:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES:
                yield Path(parent, name)


def _listed(stream: BinaryIO) -> list[Path]:
    data = stream.read(MOST_LISTED + 1)
    if len(data) > MOST_LISTED:
        raise Refusal(f"-: the list of files has more than {MOST_LISTED} bytes; give several lists one after the other.")
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")) and b"\0" in data[:64]:
        raise Refusal("-: standard input holds an image; give a list of files, one a line, or the image's name.")
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    return [Path(os.fsdecode(line)) for line in lines if line]


class _Names:
    """Names for outputs, no two of them the same on a disk that does not tell `A` from `a`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, path: Path, below: Path | None) -> str:
        """A name like that of a file, with the folders that lie between it and `below`."""
        folders = path.parent.relative_to(below).parts if below is not None else ()
        # Without dots: what is written about a file `x.png` may be `x.jpg`, and a folder `x.jpg` may be there as well.
        between = Path(*(name.replace(".", "_") for name in folders))
        stem = path.stem if len(os.fsencode(path.stem)) <= LONGEST_FILE_NAME else os.fsdecode(os.fsencode(path.stem)[:LONGEST_FILE_NAME])
        suffix = path.suffix[1:12]
        tries = [stem, f"{stem}_{suffix}"] if suffix else [stem]
        number = 1
        while True:
            for name in tries:
                whole = str(between / name)
                if whole.casefold() not in self._taken:
                    self._taken.add(whole.casefold())
                    return whole
            number += 1
            tries = [f"{stem}_{number}"]
