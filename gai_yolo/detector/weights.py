"""Reading weight files: released state dicts by name, and this project's checkpoints."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gai_yolo.detector.network import YOLO12
from gai_yolo.errors import CheckpointError, refused_by

PARSER_ERRORS = (
    *(RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
"""A truncated or overwritten archive fails anywhere in the parser; all of it means the same to the user."""


class DamagedFile(CheckpointError):
    """Not a file that `torch.save` has written, or no longer."""


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
            raise CheckpointError(
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


def load_weights(model: YOLO12, path: Path) -> list[str]:
    """Fill `model` from a state dict or a checkpoint (its EMA weights where it has them).

    Tensors of the class branch that were made for another number of classes keep their start values.

    Returns:
        Names of the tensors left out for that reason.

    Raises:
        CheckpointError: unreadable, or a weight file of another network.
    """
    content = read_checkpoint_file(path)
    content = next((content[key] for key in ("ema_state_dict", "model_state_dict") if isinstance(content.get(key), dict)), content)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    state = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
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
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in misfits}, strict=False)
    return misfits
