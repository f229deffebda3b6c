"""What a pickle of `torch.save` may ask for, and what it is given: tensors, containers, and stand-ins for objects of programs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gai_yolo.errors import printable

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
MOST_DIMENSIONS = 8
"""Of a tensor; those of a network have 4."""
LARGEST_KEY = 1 << 31
"""Of the numbers by which a dict may be asked. Larger ones can be chosen so that all have one hash."""


class NotOurs(pickle.UnpicklingError):
    """The pickle asks for something that weights have no use for; the text says what, as the end of a sentence about the file."""

    @classmethod
    def named(cls, what: str) -> NotOurs:
        """Of a name that could be that of any code."""
        return cls(
            f"names {printable(what)}, for which weights have no use, and is not opened because it could run code; "
            "export its state dict with the program that wrote it and give that file."
        )

    @classmethod
    def of_make(cls, what: str) -> NotOurs:
        """Of a tensor that is not dense, or of numbers that no network here has."""
        return cls(
            f"holds a tensor made by {printable(what)}, but weights are dense tensors of floats, integers or bools; "
            "convert it with the program that wrote it and save the file anew."
        )


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A function or class that the pickle names."""

    name: str
    """With its module."""


@dataclass(slots=True, eq=False)
class StandIn:
    """What stands for an object of a class that is not here: its attributes, if it has any."""

    attributes: dict[str, Any] = field(default_factory=dict)


def is_plain(key: Any) -> bool:
    """Whether it may be the key of a dict: its hash costs nothing, and few others have the same."""
    return key is None or type(key) in (str, bool, float, bytes) or (type(key) is int and abs(key) < LARGEST_KEY)


def is_size(number: Any) -> bool:
    """Whether it may be a length, in numbers, that PyTorch can work with."""
    return type(number) is int and 0 <= number < 1 << 63


def made(function: str, arguments: tuple[Any, ...]) -> Any:
    """What a call would give that a pickle asks for, if tensors and containers are made by it.

    Raises:
        NotOurs: by another one.
        pickle.UnpicklingError, TypeError: of arguments that make no sense.
    """
    if function in CALLS:
        return CALLS[function](*arguments)
    raise NotOurs.of_make(function) if function.startswith("torch._utils._rebuild") else NotOurs.named(f"a call of {function}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    """A view of a storage, and of no more than that. The third of `more`, if there is one, says that its numbers are others."""
    if type(storage) is not Tensor or type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise pickle.UnpicklingError("not a tensor")
    if len(size) > MOST_DIMENSIONS or not all(map(is_size, (offset, *size, *stride))):
        raise pickle.UnpicklingError("not a tensor")
    if len(more) > 2 and more[2]:
        raise NotOurs.of_make("a view of complex numbers")
    if 0 in size:
        return torch.empty(size, dtype=storage.dtype)
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if last >= storage.numel() or math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if type(data) is not Tensor:
        raise pickle.UnpicklingError("not a parameter")
    return data


def _from_type(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """A tensor that has attributes, without them."""
    if type(function) is not Named or type(arguments) is not tuple or not function.name.startswith("torch._utils._rebuild"):
        raise pickle.UnpicklingError("not a tensor")
    return made(function.name, arguments)


def _items(container: Any = ()) -> list[Any]:
    """Of what the pickle holds already: a number would be a size, of any memory."""
    if type(container) not in (list, tuple, set, dict):
        raise pickle.UnpicklingError("not a container")
    return list(container)


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    items = _items(pairs)
    if not all(type(item) in (list, tuple) and len(item) == 2 for item in items):
        raise pickle.UnpicklingError("not a dict")
    return {key: value for key, value in items if is_plain(key)}


def _set(items: Any = ()) -> set[Any]:
    return set(filter(is_plain, _items(items)))


def _size(items: Any = ()) -> tuple[Any, ...]:
    return tuple(_items(items))


def _nothing(*_: Any) -> StandIn:
    return StandIn()


_NOT_KEPT = (
    *("torch.device", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{package}.multiarray.{name}" for package in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("collections.Counter", "collections.defaultdict", "_codecs.encode", "builtins.complex", "builtins.object"),
)
"""What may also be called: it gives an object of which nothing is kept."""
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _mapping,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    **dict.fromkeys(_NOT_KEPT, _nothing),
}
"""What stands for the functions and classes that a pickle may call."""
