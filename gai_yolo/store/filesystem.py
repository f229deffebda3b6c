"""The one thin layer of operating-system calls under the store.

Everything that must survive a crash goes through it, one method for each call, so that tests can record the calls, break
them one by one, and build every state that a power cut may leave behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

FICLONE = 0x40049409
"""Of ioctl_ficlone(2)."""


class Identity(NamedTuple):
    """What tells whether a file is still the one that was looked at."""

    device: int
    inode: int
    size: int
    modified_ns: int


class FileSystem:
    """The real one. Every method raises `OSError` where the operating system refuses."""

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file; its rights follow the umask. Fails if the name is taken."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of the data, at least one byte; returns how many."""
        return os.write(descriptor, data)

    def overwrite(self, path: Path, data: bytes) -> None:
        """Write over the content of a file that is there, in place and up to the disk. It takes no room unless the file gets longer."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.pwrite(descriptor, data, 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def fsync(self, descriptor: int) -> None:
        """Wait until the file's content is on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Give the descriptor back."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move within a folder, over what is there. Fails if `source` is gone.

        NFS sends a call again whose answer was lost, and the second one finds nothing to do: so where `source` is gone, and `target` is
        what it was, it is done.
        """
        before = self.identity(source)
        try:
            os.rename(source, target)
        except FileNotFoundError:
            if not self._is(before, target):
                raise

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file. Fails if the name is taken, or where the file system has no hard links."""
        try:
            os.link(source, target)
        except FileExistsError:
            if not self._is(self.identity(source), target):  # as for a rename
                raise

    def clone(self, source: int, target: int) -> None:
        """Let an empty file share the content of another until one of them changes (Linux; btrfs, xfs, bcachefs). All or nothing."""
        fcntl.ioctl(target, FICLONE, source)

    def unlink(self, path: Path) -> None:
        """Take a name away."""
        os.unlink(path)

    @contextlib.contextmanager
    def held(self, folder: Path) -> Iterator[int]:
        """A descriptor that stays with the folder, whatever is moved to its name meanwhile."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def unlink_from(self, folder: int, name: str) -> None:
        """Take a name in a held folder away."""
        os.unlink(name, dir_fd=folder)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the disk; file systems that cannot do that and say so are believed."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(descriptor)

    def mkdir(self, folder: Path) -> None:
        """Create a folder in one that is there. Fails if the name is taken by something else."""
        folder.mkdir(exist_ok=True)

    def make_folder(self, folder: Path) -> None:
        """Create a folder, with those above it that are missing. Durable on return: a file is on the disk only if the names of all
        the folders on the way to it are."""
        try:
            self.mkdir(folder)
        except FileNotFoundError:
            self.make_folder(folder.parent)
            self.mkdir(folder)
        with contextlib.suppress(PermissionError):  # who may not read a folder cannot sync it, but may well use it
            self.sync_folder(folder.parent)

    def names(self, folder: Path) -> list[str]:
        """Names in a folder, sorted."""
        return sorted(os.listdir(folder))

    def identity(self, path: Path) -> Identity:
        """Of the file that a name leads to."""
        status = os.stat(path)
        return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def seen(self, path: Path) -> Identity | None:
        """The same; None if there is nothing."""
        with contextlib.suppress(FileNotFoundError):
            return self.identity(path)
        return None

    def _is(self, identity: Identity, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return self.identity(path) == identity
        return False

    def open(self, path: Path) -> BinaryIO:
        """A file for reading."""
        return open(path, "rb")

    def content(self, path: Path) -> bytes:
        """The content of a small file."""
        with self.open(path) as file:
            return file.read()

    def free_bytes(self, folder: Path) -> int:
        """Bytes that may still be written there by this user."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize


REAL = FileSystem()
