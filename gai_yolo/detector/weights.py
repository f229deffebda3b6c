"""Reading weight files: state dicts, this project's checkpoints, and released ones with the network that was pickled into them."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gai_yolo.detector.foreign import attribute, read_foreign, state_dict_of
from gai_yolo.detector.network import YOLO12
from gai_yolo.errors import CheckpointError, refused_by

PARSER_ERRORS = (
    *(RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, MemoryError),
    *(struct.error, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, safetensors.SafetensorError),
)
"""A truncated or overwritten archive fails anywhere in the parser; all of it means the same to the user."""


METADATA = "gai_yolo"
"""Key of a safetensors file's metadata under which JSON says what the weights are."""
COPYLEFT = ("AGPL", "GPL", "LGPL", "CC-BY-SA", "EUPL", "MPL")
"""How the names of licences begin that ask something of who passes on what was made of a work."""
HOLDERS = ("ema_state_dict", "model_state_dict", "ema", "model", "state_dict")
"""Where a file has its weights, the ones to be used first."""


class DamagedFile(CheckpointError):
    """Not a file that `torch.save` has written, or no longer."""


class HoldsObjects(CheckpointError):
    """Holds objects other than tensors and plain data."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from."""

    file: str
    """Its name."""
    sha256: str
    licence: str | None
    """Which those who published it claim for it, in their words."""

    @property
    def note(self) -> str:
        """For people, what the publisher asks of them; empty if it is nothing that is known."""
        if self.licence is None or not self.licence.upper().startswith(COPYLEFT):
            return ""
        return f"who published {self.file} claims {self.licence} for it; what is made of it may be bound by that"

    def __str__(self) -> str:
        return self.file if self.licence is None else f"{self.file}, {self.licence}"


@dataclass(frozen=True)
class Weights:
    """What a weight file holds."""

    tensors: dict[str, Tensor]
    class_names: list[str] | None
    origin: Origin | None
    """None: not known, or of trainings that began with nothing."""
    about: dict[str, Any] = field(default_factory=dict)
    """What a file of this program says beside: `config`, `position`."""


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """Open a file written by `torch.save` on the CPU, without running any code in it.

    Raises:
        CheckpointError: missing, damaged, or holding objects other than tensors and plain data.
    """
    try:
        with path.open("rb") as file:
            _check_sums(path, file)
            return load_checkpoint(path, file)
    except OSError as error:
        raise refused_by(error, CheckpointError(f"{path}: cannot be read ({error.strerror or error}).")) from None


def load_checkpoint(path: Path, file: BinaryIO) -> dict[str, Any]:
    """As `read_checkpoint_file`, from an open file whose bytes are known to be good; `path` is for messages only.

    Raises:
        DamagedFile: damaged, or not such a file.
        CheckpointError: holding objects other than tensors and plain data.
        OSError: the disk refuses.
    """
    try:
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's words for what it does not know, and for modules that it blocks outright (os, sys).
        if any(words in str(error).lower() for words in ("unsupported global", "unsupported class", "is blocked")):
            raise HoldsObjects(
                f"{path}: holds program objects, not only tensors, and is not opened because they could run code; "
                "export its state dict with the program that wrote it and give that file."
            ) from None
        raise _damaged(path) from None
    except OSError:
        raise
    except PARSER_ERRORS:
        raise _damaged(path) from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: holds a {type(content).__name__}, not a checkpoint or a state dict.")
    return content


def _check_sums(path: Path, file: BinaryIO) -> None:
    """torch.load does not look at the archive's checksums: a flipped bit in a tensor would pass."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise _damaged(path)
    except (CheckpointError, OSError):
        raise
    except PARSER_ERRORS:
        raise _damaged(path) from None


def _damaged(path: Path) -> DamagedFile:
    return DamagedFile(f"{path}: damaged or not a checkpoint; restore it from a copy or take another one.")


def read_weights(path: Path) -> Weights:
    """The weights in a state dict (of `torch.save`, or safetensors), in a checkpoint of this program (the EMA weights), or in one of a
    released YOLO12, whose pickled network is read without the program that wrote it.

    Raises:
        CheckpointError: missing, damaged, without weights, or with what could be code.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: cannot be read (it is no file).")  # a pipe or a device might never end
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _from_safetensors(file.read())
            _check_sums(path, file)
            try:
                return weights_in(load_checkpoint(path, file))
            except HoldsObjects:
                content = read_foreign(path, file)
                origin = Origin(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), _licence(content))
                return weights_in(content, origin)
    except OSError as error:
        raise refused_by(error, CheckpointError(f"{path}: cannot be read ({error.strerror or error}).")) from None
    except PARSER_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path) from None


def as_safetensors(weights: Weights, about: dict[str, Any]) -> bytes:
    """A safetensors file of them, with class names, origin, and what else is said of them, as JSON in its metadata."""
    origin = None if weights.origin is None else asdict(weights.origin)
    text = json.dumps({**about, "class_names": weights.class_names, "origin": origin})
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    return safetensors.torch.save(tensors, {"format": "pt", METADATA: text})


def _from_safetensors(data: bytes) -> Weights:
    size = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    about = json.loads(said.get(METADATA, "{}"))
    return Weights(safetensors.torch.load(data), about.get("class_names"), origin_in(about), about)


def weights_in(content: dict[str, Any], origin: Origin | None = None) -> Weights:
    """The weights of what a file held."""
    holder = next((content[key] for key in HOLDERS if content.get(key) is not None), content)
    tensors = state_dict_of(holder)
    if isinstance(holder, dict):
        tensors = {str(name): value for name, value in holder.items() if isinstance(value, Tensor)}
    names = content.get("class_names") or attribute(holder, "names")
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names)] if all(isinstance(number, int) for number in names) else None
    names = [_printable(name) for name in names] if isinstance(names, list | tuple) else None
    position = {key: content[key] for key in ("epoch", "step", "samples") if isinstance(content.get(key), int)}
    about = {"config": content["config"], "position": position} if isinstance(content.get("config"), dict) else {}
    return Weights(tensors, names, origin_in(content) or origin, about)


def origin_in(content: dict[str, Any]) -> Origin | None:
    """Of a checkpoint of this program that began with a weight file."""
    found = content.get("origin")
    if not isinstance(found, dict) or found.keys() != {"file", "sha256", "licence"}:
        return None  # somebody else's word
    file, sha256, licence = (None if found[name] is None else _printable(found[name]) for name in ("file", "sha256", "licence"))
    return Origin(file or "", sha256 or "", licence)


def _licence(content: dict[str, Any]) -> str | None:
    said = content.get("license")
    return _printable(said.strip().splitlines()[0]) if isinstance(said, str) and said.strip() else None


def _printable(text: Any) -> str:
    """Of others, for a terminal: no control characters, and not without end."""
    return "".join(letter for letter in str(text)[:200] if letter.isprintable())


def load_weights(model: YOLO12, path: Path) -> list[str]:
    """`fill` a model from a file as `read_weights` takes it."""
    return fill(model, read_weights(path), path)


def fill(model: YOLO12, weights: Weights, path: Path) -> list[str]:
    """Give a model weights. Tensors of the class branch that were made for another number of classes keep their start values.

    Args:
        path: for messages.

    Returns:
        Names of the tensors left out for that reason.

    Raises:
        CheckpointError: of another network; the model is as it was.
    """
    state = weights.tensors
    own = model.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    misfits = [name for name in own if name in state and own[name].shape != state[name].shape]
    foreign = [name for name in misfits if not name.startswith(f"model.{len(model.model) - 1}.cv3.")]
    if missing or unexpected or foreign:
        example = sorted([*missing, *unexpected, *foreign])[0]
        raise CheckpointError(
            f"{path}: not the weights of a YOLO12-{model.size} ({len(missing)} tensors missing, {len(unexpected)} unknown, "
            f"{len(foreign)} of another shape, e.g. {example}); set model.size to the size it was made for."
        )
    fitting = {name: tensor for name, tensor in state.items() if name not in misfits}
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in fitting.items()}, strict=False
    )
    return misfits
