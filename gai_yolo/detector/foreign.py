"""Weights out of a file of `torch.save` that holds objects of the program that wrote it: read without that program, and without running it.

Such a file is a pickle, and a pickle is a list of calls. Here they call nothing but what makes tensors and containers. Objects of the
classes that a detector is pickled with become stand-ins, which keep their attributes and can do nothing; whatever else is named refuses
the whole file. Nothing is imported.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from gai_yolo.errors import CheckpointError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""PyTorch's names for the types of its storages."""
STAND_IN_PACKAGES = ("ultralytics", "torch", "numpy", "pathlib", "collections")
"""Whose classes may be named: those of released detectors, and what else their files hold. Nothing of them is imported."""
NOT_KEPT = (
    *("torch.device", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{package}.multiarray.{name}" for package in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
"""What may also be called: it gives an object of which nothing is kept."""
MOST_MODULES = 10_000
"""Of a network, x has some 1,000; one that holds itself never ends."""
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Of modules, as PyTorch's pickles have them."""


class NotOurs(Exception):
    """The pickle names something that a weight file has no use for."""


class _Kind(type):
    """Of stand-ins: an object is made without a call; a call is for functions."""

    def __call__(cls, *_arguments: Any, **_more: Any) -> Any:
        raise NotOurs(f"a call of {cls.__module__}.{cls.__qualname__}")


class StandIn(metaclass=_Kind):
    """What stands for an object of a class that is not here: its attributes, if it has any."""

    def __new__(cls, *_arguments: Any, **_more: Any) -> StandIn:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Of a dict of another make."""

    def append(self, _item: Any) -> None:
        """Of a list of another make."""

    extend = append


def read_foreign(path: Path, file: BinaryIO) -> dict[str, Any]:
    """What the file of another program holds, with stand-ins for its objects.

    Raises:
        CheckpointError: it names what could be code, or is no file of `torch.save` in its present form.
        zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, LookupError, ...: damaged.
        OSError: the disk refuses.
    """
    with zipfile.ZipFile(file) as archive:
        (pickled,) = [info for info in archive.infolist() if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")]
        folder = pickled.filename.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise CheckpointError(f"{path}: was written on a machine with another byte order; write it anew on one like this.")
        data = archive.read(_stored(pickled))
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name.endswith("PUT") and argument is not None and argument > len(data):
                raise pickle.UnpicklingError("a place in a table of any size")
        try:
            content = _Unpickler(io.BytesIO(data), archive, folder).load()
        except NotOurs as error:
            raise CheckpointError(
                f"{path}: names {error}, for which weights have no use, and is not opened because it could run code; "
                "export its state dict with the program that wrote it and give that file."
            ) from None
    return content if isinstance(content, dict) else {"model": content}


def state_dict_of(network: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a pickled network, by the names that PyTorch gives them; empty if it is none."""
    found: dict[str, Tensor] = {}
    waiting = [("", network)]
    for _ in range(MOST_MODULES):
        if not waiting:
            return found
        prefix, module = waiting.pop()
        parts = vars(module) if isinstance(module, StandIn) else {}
        transient = parts.get("_non_persistent_buffers_set") or ()
        tensors = [*_items(parts.get("_parameters")), *_items(parts.get("_buffers"))]
        found.update((f"{prefix}{name}", tensor) for name, tensor in tensors if isinstance(tensor, Tensor) and name not in transient)
        waiting += [(f"{prefix}{name}.", child) for name, child in _items(parts.get("_modules"))]
    return {}


def attribute(item: Any, name: str) -> Any:
    """Of a stand-in; None if it has none of that name."""
    return vars(item).get(name) if isinstance(item, StandIn) else None


def _items(found: Any) -> list[tuple[str, Any]]:
    return [(str(name), value) for name, value in found.items()] if isinstance(found, dict) else []


def _stored(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """PyTorch compresses nothing: a small file that becomes a large one is of another make."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("compressed")
    return info


class _Unpickler(pickle.Unpickler):
    """Makes tensors, containers and stand-ins."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self._archive, self._folder = archive, folder
        self._storages: dict[tuple[str, str], Tensor] = {}

    MAKERS: ClassVar[dict[str, Callable[..., Any]]] = {}
    """What is called in place of what a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{OLD_NAMES.get(module, module)}.{name}"
        if full in self.MAKERS:
            return self.MAKERS[full]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Storage(name)
        if module.partition(".")[0] not in STAND_IN_PACKAGES:
            raise NotOurs(full)
        return _Kind(name, (StandIn,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Tensor:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("not a storage")
        place = (storage.name, key)
        if place not in self._storages:
            dtype, info = STORAGES[storage.name], _stored(self._archive.getinfo(f"{self._folder}data/{key}"))
            if info.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError("not as large as it says")
            data = bytearray(self._archive.read(info))
            self._storages[place] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[place]


class _Unchanging:
    """What a pickle is given by a name: nothing can be set on it."""

    __slots__ = ()

    def __setattr__(self, _name: str, _value: Any) -> None:
        raise pickle.UnpicklingError("what is named is not changed")


class _Storage(_Unchanging):
    """A type of storages, as PyTorch calls it."""

    __slots__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)


class _Maker(_Unchanging):
    """A function."""

    __slots__ = ("function",)
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage, and of no more than that."""
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("not a tensor")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= storage.numel() or math.prod(size) > storage.numel()):
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return torch.empty(size, dtype=storage.dtype) if 0 in size else storage.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(function, _Maker):
        raise NotOurs("a tensor of another make")
    return function(*arguments)


def _reconstructed(kind: Any, *_: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, StandIn)):
        raise NotOurs(f"an object of {getattr(kind, '__name__', kind)}")
    return kind.__new__(kind)


def _nothing(*_: Any) -> StandIn:
    return StandIn.__new__(StandIn)


def _container(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Of what the pickle holds already: a number would be a size, of any memory."""

    def make(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple | set | frozenset | dict):
            raise pickle.UnpicklingError("not a container")
        return kind(items)

    return make


def _encoded(text: Any, coding: Any) -> bytes:
    if not isinstance(text, str) or coding != "latin1":
        raise pickle.UnpicklingError("not bytes")
    return text.encode("latin1")


_Unpickler.MAKERS.update(
    {
        "torch._utils._rebuild_tensor_v2": _Maker(_tensor),
        "torch._utils._rebuild_parameter": _Maker(_parameter),
        "torch._utils._rebuild_parameter_with_state": _Maker(_parameter),
        "torch._tensor._rebuild_from_type_v2": _Maker(_from_type),
        "torch.Size": _Maker(_container(tuple)),
        "collections.OrderedDict": _Maker(_container(OrderedDict)),
        "builtins.set": _Maker(_container(set)),
        "builtins.frozenset": _Maker(_container(frozenset)),
        "builtins.object": _Maker(_reconstructed),
        "copyreg._reconstructor": _Maker(_reconstructed),
        "_codecs.encode": _Maker(_encoded),
        **dict.fromkeys(NOT_KEPT, _Maker(_nothing)),
    }
)
