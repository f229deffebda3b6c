"""The job's secret: what launchers know and strangers do not. With it all that nodes write for each other is authenticated.

Where it comes from, the first that is given: `--secret-file`; the variable `GAI_YOLO_SECRET` (the text itself) or
`GAI_YOLO_SECRET_FILE`; for a rendezvous file a file beside it; for endpoints of this machine alone a file of this user. The last two are
made by whoever comes first. It never stands in a command line, and children are told the file and not the text.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from gai_yolo.distributed.network import Endpoint
from gai_yolo.errors import Refusal, is_transient, refused_by, transient

SECRET_VARIABLE = "GAI_YOLO_SECRET"
"""Environment variable: the secret."""
SECRET_FILE_VARIABLE = "GAI_YOLO_SECRET_FILE"
"""Environment variable: the file that holds it."""
HOW_TO_MAKE = "(umask 077; openssl rand -hex 32 > job.secret)"
LEAST_LETTERS, MOST_SECRET_BYTES = 32, 4096
"""Of a secret: 32 hexadecimal digits are 128 bits."""
WRITTEN_WITHIN = 5.0
"""Seconds that another launcher may take from making the file to having written it, where the file system knows no hard links."""
MAC_BYTES = hashlib.sha256().digest_size


class SecretError(Refusal):
    """A secret that is missing, too short, or no secret because others can read it."""


@dataclass(frozen=True, repr=False)
class Secret:
    """A key, and where it was read from."""

    text: str
    source: Path | None = None
    """Absolute; None: it came from a variable."""

    @cached_property
    def _key(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()

    @classmethod
    def parse(cls, text: str, where: str, source: Path | None = None) -> Secret:
        """From the text that a file or a variable holds; white space at its ends does not count.

        Raises:
            SecretError: it is too short to be one.
        """
        stripped = text.strip()
        if len(stripped) < LEAST_LETTERS:
            raise SecretError(f"{where}: a secret has {LEAST_LETTERS} letters or more; make one with {HOW_TO_MAKE}.")
        return cls(stripped, source)

    def keep(self, path: Path) -> Path:
        """Write it to a new file for this launcher's children; returns the path, raises `OSError`."""
        _write_new(path, self.text.encode())
        return path

    def mac(self, purpose: str, *parts: bytes) -> bytes:
        """HMAC-SHA256 of some parts, 32 bytes. A MAC for one purpose is none for another, nor where the same bytes are cut otherwise."""
        made = hmac.new(self._key, purpose.encode() + b"\0", hashlib.sha256)
        for part in parts:
            made.update(len(part).to_bytes(8, "big") + part)
        return made.digest()

    def verifies(self, given: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether a MAC is right; takes as long if it is not."""
        return hmac.compare_digest(given, self.mac(purpose, *parts))


def given_secret(file: Path | None, environment: Mapping[str, str]) -> Secret | None:
    """The secret that a person has provided, or None.

    Raises:
        SecretError: it cannot be used.
    """
    if file is not None:
        return read_secret(file)
    if text := environment.get(SECRET_VARIABLE):
        return Secret.parse(text, SECRET_VARIABLE)
    path = environment.get(SECRET_FILE_VARIABLE)
    return read_secret(Path(path)) if path else None


def secret_for(rendezvous: Path | Sequence[Endpoint], given: Secret | None) -> Secret:
    """The secret of a job that meets there.

    Raises:
        SecretError: there is none, or it cannot be used.
        OSError: a new one cannot be written.
    """
    if given is not None:
        return given
    if isinstance(rendezvous, Path):
        return shared_secret(rendezvous.with_name(f"{rendezvous.name}.secret"))
    if not all(endpoint.is_loopback for endpoint in rendezvous):
        raise SecretError(
            "--rendezvous: between hosts the launchers need a secret that they share, or whoever reaches the port is one of them; make one "
            f"with {HOW_TO_MAKE}, copy it to every host, and give --secret-file job.secret (or the variable {SECRET_VARIABLE})."
        )
    try:
        path = Path("~/.cache/gai-yolo/loopback.secret").expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        return shared_secret(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if isinstance(error, OSError) and is_transient(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise SecretError(f"~/.cache/gai-yolo: cannot keep a secret for this user's jobs ({reason}); give --secret-file.") from None


def shared_secret(path: Path) -> Secret:
    """The secret in a file that several launchers share; the first one makes it.

    Raises:
        SecretError: it is no secret.
        OSError: it cannot be written.
    """
    if not os.path.lexists(path):
        _publish(path, f"{secrets.token_hex(32)}\n".encode())
    deadline = time.monotonic() + WRITTEN_WITHIN
    while True:
        try:
            return read_secret(path)
        except _EmptySecret:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def read_secret(path: Path) -> Secret:
    """The secret in a file that nobody but this user (or root) owns and reads.

    Raises:
        SecretError: it cannot be read, others can read it, or it is too short.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not be waited for
    except OSError as error:
        refusal = SecretError(f"{path}: the secret cannot be read ({error.strerror}); make one with {HOW_TO_MAKE}.")
        raise refused_by(error, refusal) from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise SecretError(f"{path}: is no file; make one with {HOW_TO_MAKE}.")
        check_owner(path, status)
        # What root has given to a group is meant for it: Kubernetes' fsGroup.
        forbidden = 0o037 if status.st_uid == 0 != os.geteuid() else 0o077
        if status.st_mode & forbidden:
            raise SecretError(
                f"{path}: is no secret, because others can read or write it; chmod 600, or make a new one with {HOW_TO_MAKE}."
            )
        data = os.read(file, MOST_SECRET_BYTES)
    except OSError as error:
        raise transient(SecretError(f"{path}: the secret cannot be read ({error.strerror}).")) from None
    finally:
        os.close(file)
    if not data:
        raise _EmptySecret(f"{path}: is empty; make a secret with {HOW_TO_MAKE}.")
    try:
        return Secret.parse(data.decode(), str(path), path.absolute())
    except UnicodeDecodeError:
        raise SecretError(f"{path}: is no text; make a secret with {HOW_TO_MAKE}.") from None


def check_owner(path: Path, status: os.stat_result) -> None:
    """Refuse a file of another user.

    Raises:
        SecretError: it belongs neither to this user nor to root, nor to whom the share gives this user's files.
    """
    if status.st_uid not in (os.geteuid(), 0) and status.st_uid != _uid_in(path.parent.absolute()):
        raise SecretError(
            f"{path}: belongs to user {status.st_uid} and not to this one ({os.geteuid()}); all launchers of a job run as one user. "
            "Name another file, or remove it if you know where it comes from."
        )


@lru_cache
def _uid_in(folder: Path) -> int | None:
    """Whom files that this process makes in a folder belong to: not always to its user, where a share maps users (EFS's access points,
    NFS with all_squash or other names on the server). None if that cannot be found out."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".", suffix=".owner", dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid
    except OSError:
        return None


class _EmptySecret(SecretError):
    """Perhaps one that is just being written."""


def _publish(path: Path, data: bytes) -> None:
    """Write a file that nobody has written yet: all of it or nothing, for this user alone. If somebody is faster, that file stands."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write_new(temp, data)
    try:
        os.link(temp, path)
    except FileExistsError:
        pass
    except OSError:  # no hard links here
        with contextlib.suppress(FileExistsError):
            _write_new(path, data)
    finally:
        temp.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError as error:
        path.unlink(missing_ok=True)  # half a secret would be refused for ever
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(file)
