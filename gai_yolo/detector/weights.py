"""Reading weight files: state dicts, this project's checkpoints, and released ones with the network that was pickled into them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gai_yolo.detector.archive import PARSER_ERRORS, damaged
from gai_yolo.detector.foreign import LONGEST_NAME, attribute, read_foreign, state_dict_of
from gai_yolo.detector.network import YOLO12
from gai_yolo.errors import CheckpointError, printable, refused_by
from gai_yolo.store.atomic import hash_file

METADATA = "gai_yolo"
"""Key of a safetensors file's metadata under which JSON says what the weights are."""
COPYLEFT = re.compile(r"\b([AL]?GPL|CC[- ]BY[- ](NC[- ])?SA|EUPL|MPL|GNU|AFFERO|COPYLEFT|SHARE-?ALIKE)", re.IGNORECASE)
"""In the names of licences that ask something of who passes on what was made of a work."""
HOLDERS = ("ema_state_dict", "model_state_dict", "ema", "model", "state_dict")
"""Where a file has its weights, the ones to be used first."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""Types of numbers that weights may have."""
MOST_CLASSES_OF_WEIGHTS = 10_000
"""Classes of a network in a weight file, and so the names of them."""
LARGEST_HEADER = 8 << 20
"""Bytes of a safetensors file's list of tensors and metadata; some 120 a tensor."""


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
        if self.licence is None or not COPYLEFT.search(self.licence):
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


def read_weights(path: Path) -> Weights:
    """The weights in a state dict (of `torch.save`, or safetensors), in a checkpoint of this program (the EMA weights), or in one of a
    released YOLO12, whose pickled network is read without the program that wrote it.

    Nothing in the file is run. What is used of memory and time is bounded by the file's size, some hundred megabytes and seconds aside.

    Raises:
        CheckpointError: missing, damaged, without weights, or with what could be code.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: cannot be read (it is no file).")  # a pipe or a device might never end
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _from_safetensors(path, file.read())
            content, is_foreign = read_foreign(path, file)
            licence = _licence(content)
            if not is_foreign and licence is None:
                return weights_in(path, content, origin_in(content))
            # Who publishes a network as objects, or with a licence, is asked, and not what the file says of another one that it came from.
            file.seek(0)
            return weights_in(path, content, Origin(printable(path.name), hash_file(file), licence))
    except OSError as error:
        raise refused_by(error, CheckpointError(f"{path}: cannot be read ({error.strerror or error}).")) from None
    except PARSER_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(path) from None


def as_safetensors(weights: Weights, about: dict[str, Any]) -> bytes:
    """A safetensors file of them, with class names, origin, and what else is said of them, as JSON in its metadata."""
    origin = None if weights.origin is None else asdict(weights.origin)
    text = json.dumps({**about, "class_names": weights.class_names, "origin": origin})
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in weights.tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if place in storages else whole  # the format has no two names for one memory
        storages.add(place)
    return safetensors.torch.save(tensors, {"format": "pt", METADATA: text})


def _from_safetensors(path: Path, data: bytes) -> Weights:
    size = int.from_bytes(data[:8], "little")
    if size > LARGEST_HEADER:
        raise damaged(path)
    said = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    about = json.loads(said.get(METADATA, "{}"))
    return Weights(safetensors.torch.load(data), _class_names(path, about.get("class_names")), origin_in(about), about)


def weights_in(path: Path, content: dict[str, Any], origin: Origin | None) -> Weights:
    """The weights of what a file held, and the names of their classes as they were written. Raises `CheckpointError` for names that are
    none.

    Args:
        path: for messages.
    """
    holder = next((content[key] for key in HOLDERS if content.get(key) is not None), content)
    tensors = state_dict_of(holder)
    if isinstance(holder, dict):
        tensors = {name: value for name, value in holder.items() if isinstance(name, str) and isinstance(value, Tensor)}
    position = {key: content[key] for key in ("epoch", "step", "samples") if isinstance(content.get(key), int)}
    about = {"config": content["config"], "position": position} if isinstance(content.get("config"), dict) else {}
    return Weights(tensors, _class_names(path, content.get("class_names") or attribute(holder, "names")), origin, about)


def _class_names(path: Path, names: Any) -> list[str] | None:
    """Of a list, or of a dict by numbers."""
    if isinstance(names, dict) and all(isinstance(number, int) for number in names):
        names = [names[number] for number in sorted(names)]
    if names is None or (isinstance(names, list | tuple) and not names):
        return None
    if not isinstance(names, list | tuple) or len(names) > MOST_CLASSES_OF_WEIGHTS:
        raise CheckpointError(
            f"{path}: its class names are no list of at most {MOST_CLASSES_OF_WEIGHTS} texts; save it anew with its state dict alone."
        )
    if not all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in names):
        raise CheckpointError(
            f"{path}: its class names are not all texts of at most {LONGEST_NAME} letters; save it anew with its state dict alone."
        )
    return [*names]


def origin_in(content: dict[str, Any]) -> Origin | None:
    """Of a checkpoint of this program that began with a weight file."""
    found = content.get("origin")
    if not isinstance(found, dict) or found.keys() != {"file", "sha256", "licence"}:
        return None  # somebody else's word
    file, sha256, licence = (found[name] for name in ("file", "sha256", "licence"))
    if not isinstance(file, str) or not isinstance(sha256, str) or not isinstance(licence, str | None):
        return None
    return Origin(printable(file), printable(sha256), None if licence is None else printable(licence))


def _licence(content: dict[str, Any]) -> str | None:
    said = content.get("license")
    lines = said[:2000].strip().splitlines() if isinstance(said, str) else []
    return "".join(letter for letter in lines[0] if letter.isprintable())[:200] if lines else None


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
        CheckpointError: of another network, or not finite; the model is as it was.
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
            f"{len(foreign)} of another shape, e.g. {printable(example)}); set model.size to the size it was made for."
        )
    fitting = {name: tensor for name, tensor in state.items() if name not in misfits}
    must_be_numbers(path, fitting, own)
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in fitting.items()}, strict=False
    )
    return misfits


def must_be_numbers(path: Path, tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises `CheckpointError` if one of them is nothing that a network can work with.

    Args:
        path: for messages.
        own: the network's, of which only the types are looked at.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{path}: {printable(name)} is not a dense tensor on the CPU; convert it and save the file anew.")
        if tensor.dtype not in (FLOATS if own[name].is_floating_point() else (*FLOATS, *INTEGERS)):
            raise CheckpointError(
                f"{path}: {printable(name)} has numbers of the type {str(tensor.dtype).removeprefix('torch.')}, where a network has "
                f"{str(own[name].dtype).removeprefix('torch.')}; convert it and save the file anew."
            )
        # In the precision that they will have: a large float64 is infinite in float32.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{path}: {printable(name)} holds numbers that are not finite; take weights from an earlier state.")
