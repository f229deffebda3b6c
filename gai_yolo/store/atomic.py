"""Publishing a file so that its name holds all of it or what was there before."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from gai_yolo.store.filesystem import REAL, FileSystem

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER = 8 << 20
"""Small writes are gathered into pieces of so many bytes."""
COPY_PIECE = 4 << 20
"""Files are copied in pieces of so many bytes."""
SUFFIX = ".tmp"
NO_OWNER = "0-none"


@dataclass(frozen=True)
class TempFile:
    """A whole file, on the disk, that has no name yet but a temporary one. Used as a context manager it is gone if the block, which is to
    give it its name, fails."""

    path: Path
    size: int
    sha256: str
    fs: FileSystem

    def __enter__(self) -> TempFile:
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if error is not None:
            discard(self.path, self.fs)


def is_temporary(name: str) -> bool:
    """Whether a name is one that `write_temp_file` gives."""
    return name.startswith(".") and name.endswith(SUFFIX)


def owner_of(name: str) -> str:
    """The owner in a temporary name; empty for names of other makes."""
    parts = name.split("~")
    return parts[1] if len(parts) == 3 else ""


def write_temp_file(target: Path, write: Callable[[BinaryIO], object], owner: str = NO_OWNER, fs: FileSystem = REAL) -> TempFile:
    """Write and fsync a file under a temporary name, unique to this call, in the folder of `target`; hashes while writing.

    Args:
        write: is handed the open binary file; it cannot seek.
        owner: goes into the name, so that a later start can tell whose it is. Without `~` and `/`.

    Raises:
        OSError: the disk refuses, also where `write` wraps that into an exception of its own. The draft is gone if it can be.
    """
    with _new_temp_file(target, owner, fs) as (path, raw):
        file = io.BufferedWriter(raw, BUFFER)
        try:
            write(file)
            file.flush()
        except Exception as error:
            # torch's archive writer answers a failed write with a RuntimeError of its own.
            raise raw.failure or error from None
        file.detach()
    return TempFile(path, raw.size, raw.digest.hexdigest(), fs)


def copy_temp_file(
    source: Path, sha256: str, target: Path, between: Callable[[], object], owner: str = NO_OWNER, fs: FileSystem = REAL
) -> TempFile:
    """The same with the content of another file: shared where the disk can do that, which takes no time and no room, else copied.

    Args:
        sha256: of the source. A copy is compared with it.
        between: is called after each piece of a copy; what it raises ends the copying.

    Raises:
        OSError: the disk refuses, or what was read has another digest.
    """
    with _new_temp_file(target, owner, fs) as (path, raw), fs.open(source) as file:
        try:
            fs.clone(file.fileno(), raw.descriptor)
        except OSError:  # not on this disk; if it is something worse, the copy fails too
            while piece := file.read(COPY_PIECE):
                raw.write(piece)
                between()
            if raw.digest.hexdigest() != sha256:
                raise OSError(errno.EIO, "what was read is not what was written", str(source)) from None
    return TempFile(path, fs.identity(path).size, sha256, fs)


@contextlib.contextmanager
def _new_temp_file(target: Path, owner: str, fs: FileSystem) -> Iterator[tuple[Path, _HashingFile]]:
    """A new file under a temporary name: synced after the block, gone if it fails."""
    path = target.with_name(f".{target.name}~{owner}~{os.urandom(6).hex()}{SUFFIX}")
    raw = _HashingFile(fs, fs.create(path))
    try:
        with contextlib.closing(raw):
            yield path, raw
            fs.fsync(raw.descriptor)
    except BaseException:
        discard(path, fs)
        raise


def discard(path: Path, fs: FileSystem = REAL) -> None:
    """Remove a draft as far as the disk allows; what is left is swept at the next start."""
    with contextlib.suppress(OSError):
        fs.unlink(path)


def publish(path: Path, write: Callable[[BinaryIO], object], fs: FileSystem = REAL) -> None:
    """Write a file through a draft: write, fsync, rename, fsync the folder.

    After return the content survives a crash of the machine. If anything fails, or the process is killed at any moment,
    `path` holds its old content or is absent as before; a killed writer may leave a hidden `*.tmp` file behind.

    Raises:
        OSError: the disk refuses; `path` holds the old content, or the new one if only the last fsync has failed.
    """
    with write_temp_file(path, write, fs=fs) as temp:
        fs.rename(temp.path, path)
    fs.sync_folder(path.parent)


def publish_text(path: Path, text: str, fs: FileSystem = REAL) -> None:
    """`publish` for UTF-8 text."""
    publish(path, lambda file: file.write(text.encode()), fs)


class _HashingFile(io.RawIOBase):
    """The raw end of a draft: every byte is counted, hashed and written, however short the single writes are."""

    def __init__(self, fs: FileSystem, descriptor: int) -> None:
        self._fs, self.descriptor = fs, descriptor
        self.size = 0
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        whole = memoryview(data).cast("B")
        rest = whole
        try:
            while rest:
                rest = rest[self._fs.write(self.descriptor, rest) :]
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(whole)
        self.size += len(whole)
        return len(whole)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._fs.close(self.descriptor)


def hash_file(file: BinaryIO) -> str:
    """SHA-256 of a file from where it stands, in hexadecimal."""
    return hashlib.file_digest(cast(io.BytesIO, file), "sha256").hexdigest()
