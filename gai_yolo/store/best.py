"""`best.pt`: a copy of the best epoch's data, for people. Nothing is ever continued from it.

A file of its own, because people write into it, and a second name for a checkpoint would let them destroy that. Beside it lies a
record of what it is, so that it is not copied again while the best stays the best, and so that what a person has put in its place
is told from what this program wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from gai_yolo.store.atomic import COPY_PIECE, copy_temp_file
from gai_yolo.store.catalogue import NAMES, Catalogue
from gai_yolo.store.filesystem import Identity
from gai_yolo.store.manifest import FOLDERS, Manifest
from gai_yolo.store.retention import best_of
from gai_yolo.store.store import Store

NAME = "best.pt"
RECORD = ".best"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Record:
    """What this program has put there."""

    stem: str
    sha256: Digest
    before: Digest | None
    """Of what it took the place of: a crash may leave the new record and the old file."""
    inode: int
    size: int
    modified_ns: int
    since: Annotated[int, Field(ge=-1)] = -1
    """As in `Policy.best_since`."""

    def names(self, best: Manifest) -> bool:
        """Whether it was copied from that checkpoint."""
        return (self.stem, self.sha256) == (best.stem, best.sha256)

    def is_of(self, identity: Identity | None) -> bool:
        """Whether it tells of that file. Not compared is its device, whose number may change with each mount."""
        return identity is not None and (self.inode, self.size, self.modified_ns) == identity[1:]


_PARSER = TypeAdapter(Record)


def read_record(catalogue: Catalogue) -> Record | None:
    """What was put into a run's `best.pt`; None if that is not known."""
    try:
        return _PARSER.validate_python(json.loads(catalogue.fs.content(catalogue.run / FOLDERS["epoch"] / RECORD)))
    except (OSError, ValueError, RecursionError):
        return None


class BestCopy:
    """Keeps `best.pt` true; `since` is as in `Policy.best_since`."""

    def __init__(self, store: Store, since: int = -1) -> None:
        self.store, self.fs, self.since = store, store.fs, since
        folder = store.run / FOLDERS["epoch"]
        self.path, self._record_path = folder / NAME, folder / RECORD

    def renew(self, between: Callable[[], object] = lambda: None) -> list[str]:
        """Let `best.pt` hold the data of the best epoch checkpoint. Reads no data if it does already.

        Args:
            between: is called after each piece that was read or written; what it raises ends the work, and nothing has changed.

        Returns:
            Notes for people: of a file of their own that lies there.

        Raises:
            OSError: the disk refuses; `best.pt` is what it was.
            CheckpointError, RunFolderBusy: as `Store.listing` and `publish`.
        """
        present = self.store.listing().present
        candidates, record = list(present), read_record(self.store)
        while (best := best_of(candidates, self.since)) is not None:
            if record is not None and record.names(best) and record.is_of(self.fs.seen(self.path)):
                return []
            if self.store.defect_of(best) is None:
                return self._replace(best, record, present, between)
            candidates.remove(best)
        return []

    def _replace(self, best: Manifest, record: Record | None, present: Sequence[Manifest], between: Callable[[], object]) -> list[str]:
        shares, seen = self._shares_a_checkpoint(), self.fs.seen(self.path)
        there = None if shares else self._digest(between)
        known = {one.sha256 for one in present} | ({record.sha256, record.before} if record else set())
        is_ours = shares or there is None or there in known
        if there == best.sha256:
            self._write_record(best, self.path, None)
            return []
        if not is_ours and record is not None and record.names(best):
            return [f"{self.path} is not what this program wrote there; it stays until another epoch is better, and is kept then too"]
        notes = []
        with copy_temp_file(self.store.data_path(best), best.sha256, self.path, between, self.store.fence.owner, self.fs) as temp:
            is_ours = is_ours and self.fs.seen(self.path) == seen  # somebody may have written there while this was copied
            if not is_ours and (aside := self.store.keep_aside(self.path)) is not None:
                self.fs.sync_folder(self.path.parent)  # otherwise a crash could keep the next rename and lose the second name
                notes = [f"{self.path} was not what this program wrote there; it is now {aside.name}"]
            self._write_record(best, temp.path, there if is_ours else None)
            self.store.replace(temp, self.path)
        return notes

    def _shares_a_checkpoint(self) -> bool:
        """Whether it is a second name of a checkpoint, as older versions of this program made it."""
        names = self.fs.names(self.path.parent)
        return any(self.store.is_same_file(self.path, self.path.with_name(name)) for name in names if NAMES["epoch"].fullmatch(name))

    def _digest(self, between: Callable[[], object]) -> str | None:
        digest = hashlib.sha256()
        try:
            with self.fs.open(self.path) as file:
                while piece := file.read(COPY_PIECE):
                    digest.update(piece)
                    between()
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    def _write_record(self, best: Manifest, path: Path, before: str | None) -> None:
        """Say that what lies at a path is the best one's data."""
        record = Record(best.stem, best.sha256, before, *self.fs.identity(path)[1:], self.since)
        self.store.publish_text(self._record_path, json.dumps(asdict(record)) + "\n", is_synced=False)
