"""What lies in a run's folders: found, verified, opened.

Reading goes in the reverse order of writing: manifest, size, digest, and only then the parser. File times and pointers play
no part, and nothing is changed here.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from gai_yolo.errors import CheckpointError, is_transient, refused_by, transient
from gai_yolo.store.atomic import hash_file
from gai_yolo.store.filesystem import REAL, FileSystem, Identity
from gai_yolo.store.manifest import FOLDERS, ForeignManifest, Kind, Manifest, ManifestError, decode
from gai_yolo.store.retention import EVERY_EPOCH, Decision, Policy, decide

T = TypeVar("T")

NAMES: dict[Kind, re.Pattern[str]] = {"epoch": re.compile(r"(epoch_\d{3,})\.(pt|json)"), "step": re.compile(r"(step_\d{8,})\.(pt|json)")}
START_PATIENCE = 20.0
"""Seconds of patience of a start, which would go back, or begin anew, where it did not wait."""
FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0
"""Seconds between two tries; doubled each time."""
NO_MANIFEST = "has no manifest and is not trusted"
LEFT_IN_PLACE = "it is left in place and passed over"


class Damaged(Exception):
    """A checkpoint to be passed over; the message says why. Parsers raise it if verified bytes do not hold what they should."""


@dataclass(frozen=True)
class Defect:
    """A file under a checkpoint's name that is not a complete checkpoint."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Listing:
    """What lies in a run's folders, newest first; sizes are checked, digests are not."""

    present: list[Manifest]
    defects: list[Defect]


class Catalogue:
    """The checkpoints under one run folder, for reading.

    Args:
        patience: seconds that an error of the disk or the network is waited out, in a file that is there. Then it is a refusal, which time
            can mend; only EIO, the answer of a broken disk, makes a damaged checkpoint in the end. With 0, for who writes here meanwhile,
            every error makes one at once.
    """

    def __init__(self, run: Path, fs: FileSystem = REAL, patience: float = 0.0) -> None:
        self.run, self.fs, self._patience = run, fs, patience
        self._verified: dict[Path, tuple[Identity, str]] = {}

    def data_path(self, manifest: Manifest) -> Path:
        """Where the data of a checkpoint lies."""
        return self.run / FOLDERS[manifest.kind] / f"{manifest.stem}.pt"

    def manifest_path(self, manifest: Manifest) -> Path:
        """Where the manifest of a checkpoint lies."""
        return self.data_path(manifest).with_suffix(".json")

    def listing(self) -> Listing:
        """What is there.

        Raises:
            CheckpointError: a folder cannot be read, or holds manifests of another version of this program.
        """
        present: list[Manifest] = []
        defects: list[Defect] = []
        for kind in FOLDERS:
            for stem, suffixes in self.stems(kind).items():
                data = self.run / FOLDERS[kind] / f"{stem}.pt"
                found = self.look_at(kind, data) if "json" in suffixes else Defect(data, NO_MANIFEST)
                if isinstance(found, Defect):
                    defects.append(found)
                else:
                    present.append(found)
        present.sort(key=lambda manifest: manifest.position, reverse=True)
        return Listing(present, defects)

    def newest(self, parse: Callable[[Path, BinaryIO, Manifest], T]) -> tuple[tuple[Manifest, T] | None, list[str]]:
        """The newest complete checkpoint, parsed, and sentences about what is newer and bad, which is left in place and passed over.
        Raises as `listing` and `read`, to which `parse` goes."""
        listing = self.listing()
        passed_over = self.passed_over(listing)
        for manifest in listing.present:
            try:
                return (manifest, self.read(manifest, parse)), passed_over
            except Damaged as error:
                passed_over.append(f"{self.data_path(manifest)} {error}; {LEFT_IN_PLACE}.")
        return None, passed_over

    def passed_over(self, listing: Listing) -> list[str]:
        """Why files under a checkpoint's name are none, one sentence for each reason."""
        by_reason: dict[str, list[Path]] = {}
        for defect in listing.defects:
            by_reason.setdefault(defect.reason, []).append(defect.path)
        sentences = []
        for reason, (first, *others) in sorted(by_reason.items()):
            more = f", and so are {len(others)} others" if others else ""
            advice = f" (`gai-yolo snapshots adopt {self.run}` verifies and adopts it)" if reason == NO_MANIFEST else ""
            sentences.append(f"{first} {reason}{advice}; {LEFT_IN_PLACE}{more}.")
        return sentences

    def read(self, manifest: Manifest, parse: Callable[[Path, BinaryIO, Manifest], T]) -> T:
        """A listed checkpoint, verified and parsed.

        Args:
            parse: is handed the name and the verified file at its beginning. Raises `Damaged` for a checkpoint to be passed over.

        Raises:
            Damaged: it cannot be read, is not what was written, or `parse` says so.
            CheckpointError: it cannot be read just now (`patience`); or from `parse`.
        """
        path = self.data_path(manifest)

        def read() -> T:
            with self.fs.open(path) as file:
                reason = self._digest_defect(manifest, path, file)
                if reason is not None:
                    raise Damaged(reason)
                file.seek(0)
                return parse(path, file, manifest)

        try:
            return self._patiently(read, path)
        except OSError as error:
            raise Damaged(f"cannot be read ({error.strerror or error})") from None

    def _patiently(self, action: Callable[[], T], path: Path) -> T:
        """Do something with a file, again and again where that may help.

        Raises:
            OSError: it does not, or not for who has no patience.
            CheckpointError: it may help later.
        """
        deadline = time.monotonic() + self._patience
        pause = FIRST_WAIT
        while True:
            try:
                return action()
            except OSError as error:
                if not is_transient(error) or not self._patience:
                    raise
                if time.monotonic() >= deadline:
                    if error.errno == errno.EIO:
                        raise
                    raise transient(CheckpointError(f"{path}: cannot be read ({error.strerror or error}).")) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)

    def defect_of(self, manifest: Manifest) -> str | None:
        """Why a listed checkpoint is not complete, or None if its digest fits. Files that have not changed are not read again."""
        path = self.data_path(manifest)
        try:
            known = self._verified.get(path)
            if known is not None and known == (self.fs.identity(path), manifest.sha256):
                return None
            with self.fs.open(path) as file:
                return self._digest_defect(manifest, path, file)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"

    def _digest_defect(self, manifest: Manifest, path: Path, file: BinaryIO) -> str | None:
        identity = self.fs.identity(path)
        if identity.size != manifest.size:
            return f"has {identity.size} bytes, {manifest.size} were written"
        if hash_file(file) != manifest.sha256:
            return "is damaged: its SHA-256 is not the one in its manifest"
        self._verified[path] = (identity, manifest.sha256)
        return None

    def stems(self, kind: Kind) -> dict[str, set[str]]:
        """Names of a kind's files without suffix, and the suffixes that are there; raises as `listing`."""
        folder = self.run / FOLDERS[kind]
        try:
            names = self.fs.names(folder)
        except FileNotFoundError:
            return {}
        except OSError as error:
            # "Cannot look" must not be taken for "nothing there": training would start over.
            raise refused_by(error, CheckpointError(f"{folder}: cannot be read ({error.strerror or error}); make it readable.")) from None
        stems: dict[str, set[str]] = {}
        for name in names:
            if match := NAMES[kind].fullmatch(name):
                stems.setdefault(match[1], set()).add(match[2])
        return stems

    def look_at(self, kind: Kind, data: Path) -> Manifest | Defect:
        """What is under one name that has a manifest; its digest is not checked. Raises as `listing`."""
        path = data.with_suffix(".json")
        try:
            manifest = decode(self._patiently(lambda: self.fs.content(path), path))
            if (manifest.kind, manifest.stem) != (kind, data.stem):
                return Defect(path, f"is the manifest of {manifest.stem}, renamed")
            size = self._patiently(lambda: self.fs.identity(data), data).size
        except ForeignManifest as error:
            raise CheckpointError(f"{path}: {error}; go on with the version that wrote it, or start over with --fresh.") from None
        except ManifestError as error:
            return Defect(path, str(error))
        except FileNotFoundError:
            return Defect(data, "is gone; only its manifest is left")
        except OSError as error:
            return Defect(data, f"cannot be read ({error.strerror or error})")
        return manifest if size == manifest.size else Defect(data, f"has {size} bytes, {manifest.size} were written")

    def plan_pruning(self, policy: Policy) -> list[Decision]:
        """What retention says of every complete checkpoint. Those that it counts on, or lets go, are verified first; it never
        sees the others as complete."""
        candidates = self.listing().present
        while True:
            decisions = decide(candidates, policy)
            weighed = [decision.manifest for decision in decisions if decision.reason != EVERY_EPOCH]
            bad = [manifest for manifest in weighed if self.defect_of(manifest) is not None]
            if not bad:
                return decisions
            candidates = [manifest for manifest in candidates if manifest not in bad]
