"""Who may write to a run: one lock, and a number that grows with every start.

The lock keeps honest jobs apart. It does not suffice: a writer whose training process has died, or a machine that was cut off
from a network file system, may wake up after the lock went to somebody else. So every start raises the fence: a number and a
random word, in one small file. A writer looks at the fence after its drafts are whole and before it gives them their names;
its drafts carry its own fence in their names, and a start removes all drafts of other fences after it has raised its own. A
rename of a removed draft fails, so after a start has swept, nothing can be published under an older fence, whatever was under
way (docs/storage.md has the argument in full).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter

from gai_yolo.errors import Refusal, RunFolderBusy, refused_by
from gai_yolo.log import OF_NODE
from gai_yolo.store.atomic import publish_text
from gai_yolo.store.filesystem import REAL, FileSystem
from gai_yolo.store.lease_file import RENEWED_EVERY, STALE, LeaseFile, has_flock

logger = logging.getLogger(__name__)

FENCE_BYTES = 512
"""The fence's file is padded to so many, so that writing over it never makes it longer. It is one sector: a power cut tears none."""


@dataclass(frozen=True)
class Holder:
    """Content of the fence's file: who was the last to start."""

    number: Annotated[int, Field(strict=True, ge=1, lt=2**62)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    host: str
    pid: int
    since: str
    """ISO 8601 in UTC, for people."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


_PARSER = TypeAdapter(Holder)


@dataclass(frozen=True)
class Fence:
    """The right to publish, as long as nobody has started after."""

    path: Path
    number: int
    """1 for the first start, larger for every later one."""
    nonce: str
    """Tells this start from any other with the same number, should the file have been deleted in between."""

    @property
    def owner(self) -> str:
        """Goes into the names of drafts."""
        return f"{self.number}-{self.nonce}"

    def check(self, fs: FileSystem = REAL) -> None:
        """To be called right before anything is published or removed.

        Raises:
            RunFolderBusy: another job has started on the run since.
            OSError: the file is gone or cannot be read; that does not tell whether another job has started.
        """
        holder = read_holder(self.path, fs)
        if (holder.number, holder.nonce) != (self.number, self.nonce):
            raise RunFolderBusy(f"{self.path.parent}: this run was taken over by another job ({holder}); this one stops.")


class Lease:
    """The lock of a run and its fence, beside the run folder, which need not exist: `--fresh` moves it while they are held."""

    def __init__(self, folder: Path, fs: FileSystem = REAL) -> None:
        self.folder, self._fs = folder, fs
        self._lock = FileLock(folder.parent / f".{folder.name}.lock")
        self._path = folder.parent / f".{folder.name}.fence"
        self._file: LeaseFile | None = None

    def acquire(self, patience: float) -> Fence:
        """Take the lock, waiting so many seconds for a job that is just ending, and raise the fence.

        Raises:
            RunFolderBusy: another job holds it; names it.
            Refusal: the folder cannot be written to.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._acquire(patience)
            for temp in self._path.parent.glob(f".{self._path.name}~*.tmp"):
                temp.unlink()  # of a start that was killed in the middle of the next line
            return raise_fence(self._path, self._fs)
        except Timeout:
            holder = _holder_or_none(self._path, self._fs)
            who = "" if holder is None else f" ({holder})"
            raise RunFolderBusy(
                f"{self.folder}: another job{who} is writing to this run folder; wait for it, stop it, or set another experiment.name."
            ) from None
        except OSError as error:
            self.release()
            reason = error.strerror or error
            refusal = Refusal(f"{self.folder.parent}: cannot write there ({reason}); make room, or set experiment.folder to another place.")
            raise refused_by(error, refusal) from None

    def _acquire(self, patience: float) -> None:
        # filelock would fall back to a file that stays for ever when its owner's machine is gone.
        if has_flock(Path(self._lock.lock_file)):
            self._lock.acquire(timeout=patience)
            return
        told = (
            f"has no flock; jobs are kept apart by a file that is renewed every {RENEWED_EVERY:g} s, and after a crash the next one waits"
        )
        logger.warning(f"{self.folder.parent}: {told} up to {STALE:g} s", extra=OF_NODE)
        lease = LeaseFile(self._path.with_suffix(".lease"))
        if not lease.acquire(patience):
            raise Timeout(str(lease.path))
        self._file = lease

    def release(self) -> None:
        """Let another job in. The fence stays as it is."""
        self._lock.release()
        if self._file is not None:
            self._file.release()
            self._file = None


def raise_fence(path: Path, fs: FileSystem = REAL) -> Fence:
    """Shut out everybody who has started before. Only to be called under the lock. Raises `OSError`."""
    before = _holder_or_none(path, fs)
    number = 1 if before is None else before.number + 1
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    holder = Holder(number, os.urandom(6).hex(), socket.gethostname(), os.getpid(), now)
    text = f"{json.dumps(asdict(holder))}\n".ljust(FENCE_BYTES)
    try:
        publish_text(path, text, fs)
    except OSError as error:
        if before is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A full disk has no room for a draft, but the old file's own block takes the new words: the job goes on from a state in
        # memory. Whoever reads a mixture of both takes it for damaged, and publishes nothing.
        fs.overwrite(path, text.encode())
    return Fence(path, number, holder.nonce)


def read_holder(path: Path, fs: FileSystem = REAL) -> Holder:
    """What the fence's file says. Raises `OSError` if it is not there, cannot be read, or makes no sense."""
    data = fs.content(path)
    try:
        return _PARSER.validate_python(json.loads(data))
    except (ValueError, RecursionError):
        raise OSError(errno.EIO, "the file that says who may write is damaged", str(path)) from None


def _holder_or_none(path: Path, fs: FileSystem) -> Holder | None:
    try:
        return read_holder(path, fs)
    except OSError:
        return None
