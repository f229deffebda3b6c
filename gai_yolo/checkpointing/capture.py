"""Copies of a training state in memory that another process can read.

A buffer is a piece of anonymous memory with a file descriptor (`memfd`), so that it needs no room in /dev/shm and goes when
its users are gone. Tensors are copied into it one behind the other; everything else, and where each tensor lies, is pickled
behind them. Such pickles go from the training process to its own writer only.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TENSOR_ALIGNMENT = 64
"""Bytes; of every tensor's begin in a buffer."""


class TensorPlace(NamedTuple):
    """Where in a buffer a tensor lies."""

    offset: int
    """In bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""

    def view(self, memory: mmap.mmap) -> Tensor:
        """The tensor in a mapped buffer, with a storage of its own, as `torch.save` wants it."""
        count = math.prod(self.shape)
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Content:
    """What a buffer holds."""

    tensors: int
    """Bytes of tensors."""
    skeleton: int
    """Bytes behind them: a pickle of the state, with calls of `_tensor_at` for its tensors."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.tensors + self.skeleton


class StateBuffer:
    """Room for one captured state; is reused for the next one when that is written.

    Args:
        capacity: bytes; it grows if a state needs more.
        pinned: lock the memory where that is allowed, so that a GPU copies into it at full speed while the host goes on.
    """

    def __init__(self, capacity: int, pinned: bool) -> None:
        self._pin_wanted, self.pinned = pinned, False
        self.content = Content(0, 0)
        self.ready: Callable[[], bool] = lambda: True
        """Whether the copies that were begun are done."""
        self._places: list[TensorPlace] = []
        self._views: list[Tensor] = []
        """Of the last state, whose tensors lay in these places. Most states have theirs in the same ones."""
        self.descriptor = -1
        self._allocate(capacity)

    def fill(self, state: dict[str, Any]) -> None:
        """Copy a state; it may change as soon as this returns (on a GPU: for work that is queued after)."""
        pickler = _Pickler()
        pickler.dump(state)
        skeleton = pickler.stream.getvalue()
        self.content = Content(pickler.used, len(skeleton))
        if self.content.size > len(self._map):
            self._allocate(self.content.size)
        if pickler.places != self._places:
            self._places, self._views = pickler.places, [place.view(self._map) for place in pickler.places]
        if self._views:
            with torch.no_grad():
                torch._foreach_copy_(self._views, pickler.tensors, non_blocking=self.pinned)
        self.ready = _recorded_event() if self.pinned else lambda: True
        self._map[self.content.tensors : self.content.size] = skeleton

    def close(self) -> None:
        """Give the descriptor back; the memory goes when nobody looks at it any more."""
        if self.pinned:
            _unregister(self._map)
            self.pinned = False
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _allocate(self, capacity: int) -> None:
        self._places, self._views = [], []
        self.close()
        size = max(capacity, mmap.PAGESIZE)
        self.descriptor = _anonymous_file(size)
        # Populated at once: the first capture is not to wait for a page fault every 4 KiB.
        self._map = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.pinned = self._pin_wanted and _register(self._map)


def open_state(descriptor: int, content: Content) -> dict[str, Any]:
    """The state in a buffer of another process, without copying its tensors; the descriptor may be closed after."""
    memory = mmap.mmap(descriptor, content.size)
    state: dict[str, Any] = _Unpickler(io.BytesIO(memory[content.tensors : content.size]), memory).load()
    return state


class _Pickler(pickle.Pickler):
    """Takes tensors out of what is pickled and gives each a place; one that is there twice has one, as `torch.save` has it."""

    def __init__(self) -> None:
        self.stream = io.BytesIO()
        super().__init__(self.stream, pickle.HIGHEST_PROTOCOL)
        self.places: list[TensorPlace] = []
        self.tensors: list[Tensor] = []
        self.used = 0

    def reducer_override(self, item: Any) -> Any:
        # Asked for what is not of Python's plain types; `persistent_id` would be for each number, and a state has twenty a tensor.
        if not isinstance(item, Tensor):
            return NotImplemented
        stride = item.stride()
        if not item.is_contiguous():
            # The same order in memory (channels_last) wherever the tensor is one run of bytes, so that the copy is one too.
            stride = torch.empty_like(item, device="meta").stride()
        place = TensorPlace(self.used, item.dtype, tuple(item.shape), stride)
        self.places.append(place)
        self.tensors.append(item)
        self.used += -(-item.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        return _tensor_at, tuple(place)


def _tensor_at(*place: Any) -> Tensor:
    """Stands for the tensor in a pickle."""
    raise NotImplementedError  # `_Unpickler` has its own


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(stream)
        self._memory = memory

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_tensor_at.__module__, _tensor_at.__name__):
            return lambda *place: TensorPlace(*place).view(self._memory)
        return super().find_class(module, name)


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("gai-yolo-state", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _recorded_event() -> Callable[[], bool]:
    """Tells whether the GPU has done all that was queued until now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.query


def _register(memory: mmap.mmap) -> bool:
    """Lock memory for a GPU's copies; returns whether it can be. Memory that torch allocates as pinned has no descriptor."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)) == 0  # type: ignore[no-untyped-call]


def _unregister(memory: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(memory, dtype=torch.uint8).data_ptr())  # type: ignore[no-untyped-call]
