"""Files of `torch.save` from strangers: what they hold, read without the program that wrote them, and without running anything.

Objects of the classes that a detector is pickled with become stand-ins (`pickled.py`); of a pickled network's the tensors are found here
by the names that PyTorch would give them.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gai_yolo.detector.archive import BEGIN, DamagedFile, damaged, opened
from gai_yolo.detector.pickled import NotOurs, StandIn
from gai_yolo.detector.unpickler import Unpickler
from gai_yolo.errors import CheckpointError

BEFORE_ARCHIVES = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""How files of PyTorch before 1.6 begin: a pickle of the number 0x1950a86a20f9469cfc6c."""
MOST_PARTS = 50_000
"""Tensors and modules of a network; x has some 2,500. One that holds itself never ends."""
LONGEST_NAME = 500
"""Characters of a tensor's name."""


def read_foreign(path: Path, file: BinaryIO) -> tuple[dict[str, Any], bool]:
    """What a file of `torch.save` holds, with stand-ins for objects, and whether there were any of a program.

    Raises:
        CheckpointError: it names what could be code, or is no file of `torch.save` in its present form.
        zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, LookupError, ...: damaged (`archive.PARSER_ERRORS`).
        OSError: the disk refuses.
    """
    file.seek(0)
    begin = file.read(len(BEFORE_ARCHIVES))
    if begin == BEFORE_ARCHIVES:
        raise CheckpointError(
            f"{path}: is in the form that PyTorch had before 1.6, which is not read here; load and save it anew with a current PyTorch."
        )
    if not begin.startswith(BEGIN):
        raise damaged(path)
    with opened(file) as archive:
        (pickled,) = [info for info in archive.infolist() if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")]
        folder = pickled.filename.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise CheckpointError(f"{path}: was written on a machine with another byte order; write it anew on one like this.")
        storages: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in storages:
                info = archive.getinfo(f"{folder}data/{key}")
                if info.file_size != count * dtype.itemsize:
                    raise pickle.UnpicklingError("a storage that is not as large as it says")
                data = bytearray(archive.read(info))
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if (storages[key].dtype, storages[key].numel()) != (dtype, count):
                raise pickle.UnpicklingError("a storage of two types")
            return storages[key]

        unpickler = Unpickler(archive.read(pickled), storage)
        try:
            content = unpickler.load()
        except NotOurs as error:
            raise CheckpointError(f"{path}: {error}") from None
    if type(content) not in (dict, StandIn):
        kind = type(content).__name__ if isinstance(content, (Tensor, list, tuple, str, int, float)) else "value of another kind"
        raise DamagedFile(f"{path}: holds a {kind}, not a checkpoint or a state dict.")
    return content if isinstance(content, dict) else {"model": content}, unpickler.objects > 0


def state_dict_of(network: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a pickled network, by the names that PyTorch gives them; empty if it is none, holds itself, or
    has more parts than any network here."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", network)], 0
    while waiting:
        prefix, module = waiting.pop()
        parts = module.attributes if type(module) is StandIn else {}
        groups = [parts.get(name) for name in ("_parameters", "_buffers", "_modules")]
        seen += 1 + sum(len(group) for group in groups if type(group) is dict)
        if seen > MOST_PARTS or len(prefix) > LONGEST_NAME:
            return {}
        parameters, buffers, modules = ([*group.items()] if type(group) is dict else [] for group in groups)
        transient = parts.get("_non_persistent_buffers_set")
        for name, tensor in [*parameters, *buffers]:
            if _is_name(name) and type(tensor) is Tensor and not (type(transient) is set and name in transient):
                found[prefix + name] = tensor
        waiting += [(f"{prefix}{name}.", child) for name, child in modules if _is_name(name)]
    return found


def attribute(item: Any, name: str) -> Any:
    """Of a stand-in; None if it has none of that name."""
    return item.attributes.get(name) if type(item) is StandIn else None


def _is_name(name: Any) -> bool:
    return type(name) is str and len(name) <= LONGEST_NAME
