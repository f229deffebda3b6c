"""Folders that commands leave what they found in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from gai_yolo.data.index import Index
from gai_yolo.errors import Refusal


def make_ready(folder: Path) -> None:
    """Make the folder if it is not there, and see that it can be written to, before anybody waits for what is to be written.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def make_new(parent: Path, name: str) -> Path:
    """Make the first folder of `parent/name-1`, `parent/name-2` and so on that is not there, and return it. Raises `OSError`."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def cannot_write(folder: Path, error: OSError) -> Refusal:
    """What to raise when the disk refuses."""
    return Refusal(f"{error.filename or folder}: cannot be written ({error.strerror}); give --output another folder.")


def refuse_among_images(folder: Path, indexes: Iterable[Index]) -> None:
    """A training would take the pictures for images of the data set.

    Raises:
        Refusal: the folder lies in one that holds images of the data set.
    """
    here = folder.resolve()
    for parent in {Path(one) for index in indexes for one in index.images.folders}:
        if here.is_relative_to(parent.resolve()):
            raise Refusal(f"{folder}: lies among the images of the data set ({parent}); give --output a folder elsewhere.")
