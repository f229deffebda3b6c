"""The small JSON file beside a checkpoint that makes it one: whoever has a manifest with the right digest is complete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

MANIFEST_FORMAT = 1
"""Version of the manifest's layout."""

Kind = Literal["epoch", "step"]
FOLDERS: dict[Kind, str] = {"epoch": "checkpoints", "step": "snapshots"}
"""Where in the run folder each kind lies."""


Count = Annotated[int, Field(ge=0)]


class ManifestError(Exception):
    """Not a manifest, or a damaged one; the message says in what way."""


class ForeignManifest(ManifestError):
    """A whole manifest in the format of another version of this program."""


@dataclass(frozen=True, order=True)
class Position:
    """How far training was; the larger, the newer. Clocks and file times play no part."""

    step: Count
    """Completed optimizer steps."""
    epoch: Count
    """Completed epochs: after its last step and before its evaluation an epoch is not complete."""
    samples: Count
    """Samples trained on."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without opening it."""

    kind: Kind
    position: Position
    size: Count
    """Bytes of the data file."""
    sha256: str
    """Of the data file, hexadecimal."""
    fence: Count
    """Number of the start that wrote it."""
    config_fingerprint: str
    torch_version: str
    time: str
    """When it was written, ISO 8601 in UTC; for people only."""
    metric: float | None = None
    """mAP50-95 of this epoch's evaluation; None if it was not evaluated."""
    due: bool = True
    """Whether the interval asked for it; otherwise it was written because it was the best so far."""
    origin: str | None = None
    """The file that the run began with, and the licence that its publisher claims; None if it began with nothing."""

    @property
    def stem(self) -> str:
        """Name of the data file without `.pt`, and of the manifest without `.json`."""
        return stem_of(self.kind, self.position)


def stem_of(kind: Kind, position: Position) -> str:
    """`epoch_007` or `step_00001234`."""
    return f"epoch_{position.epoch:03d}" if kind == "epoch" else f"step_{position.step:08d}"


_PARSER = TypeAdapter(Manifest)


def encode(manifest: Manifest) -> bytes:
    """Canonical JSON with a checksum of the rest in its last field: one manifest has one encoding."""
    values = asdict(manifest)
    if manifest.origin is None:  # as it was before there was one
        del values["origin"]
    return _with_checksum({"format": MANIFEST_FORMAT, "file": f"{manifest.stem}.pt", **values})


def decode(data: bytes) -> Manifest:
    """The manifest in the content of a file.

    Raises:
        ForeignManifest: whole, but in another format than this program's.
        ManifestError: any other bytes than `encode` makes, a single flipped bit included.
    """
    try:
        values: dict[str, Any] = json.loads(data)
        checksum_fits = _with_checksum({key: value for key, value in values.items() if key != "checksum"}) == data
    except (ValueError, AttributeError, RecursionError):
        raise ManifestError("is not a manifest, or was cut off") from None
    if not checksum_fits:
        raise ManifestError("was changed: its checksum does not fit")
    if values.get("format") != MANIFEST_FORMAT:
        raise ForeignManifest(f"has manifest format {values.get('format')!r}, this program reads {MANIFEST_FORMAT}")
    try:
        manifest = _PARSER.validate_python({key: value for key, value in values.items() if key not in ("format", "file", "checksum")})
    except ValueError:
        raise ManifestError("is not the manifest of a checkpoint") from None
    if encode(manifest) != data:
        raise ManifestError("holds more than this program wrote")
    return manifest


def _with_checksum(values: dict[str, Any]) -> bytes:
    return _canonical({**values, "checksum": hashlib.sha256(_canonical(values)).hexdigest()})


def _canonical(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
