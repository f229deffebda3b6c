"""Batches on their way from loader processes, in memory that the processes share because they have inherited it.

Sharing needs no file descriptor, no file in /dev/shm and no socket under TMPDIR, so none of their limits is in the way; and a process
that is killed leaves nothing behind. The images of a batch lie in one of a fixed number of slots; the rest, which is small, goes through
the loader's pipe.
"""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gai_yolo.data.dataset import Batch, Item, collate
from gai_yolo.data.order import Key

Request = tuple[int, list[Key]]
"""A slot, and the samples of the batch to put there."""


class Slots:
    """Memory for the images of some batches; to be made before the loader processes.

    Args:
        number: of batches that are on their way at a time.
        num_bytes: of the images of one.
    """

    by_name: ClassVar[weakref.WeakValueDictionary[int, Slots]] = weakref.WeakValueDictionary()
    """Those of this process."""
    _names: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, number: int, num_bytes: int) -> None:
        self._number = number
        memory = mmap.mmap(-1, max(1, number * num_bytes))
        self._memory: NDArray[np.uint8] = np.frombuffer(memory, np.uint8, number * num_bytes).reshape(number, num_bytes)
        self.name = next(self._names)
        self.by_name[self.name] = self
        self.clear()

    def clear(self) -> None:
        """All are free; what is still on its way is not going to be looked at."""
        self.free = deque(range(self._number))

    def images(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The content of a slot, (B, S, S, 3)."""
        return self._memory[slot, : int(np.prod(shape))].reshape(shape)


@dataclass(frozen=True)
class Parcel:
    """A batch on its way."""

    slots: int
    """Their name."""
    slot: int
    shape: tuple[int, ...]
    rest: dict[str, NDArray[np.generic]]
    """The other fields of `Batch`."""

    def unpacked(self, pinned: bool = False) -> Batch:
        """The batch, in memory of its own; the slot is free again."""
        slots = Slots.by_name[self.slots]
        images = torch.empty(self.shape, dtype=torch.uint8, pin_memory=pinned)
        np.copyto(images.numpy(), slots.images(self.slot, self.shape))
        slots.free.append(self.slot)
        rest = {name: torch.from_numpy(values) for name, values in self.rest.items()}
        batch = Batch(images=images.permute(0, 3, 1, 2), **rest)
        return batch.pin_memory() if pinned else batch

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's thread when it pins memory."""
        return self.unpacked(pinned=True)


class ParcelSet(Dataset[Item]):
    """A data set that puts whole batches into slots, in the loader process."""

    def __init__(self, dataset: Dataset[Item], slots: Slots) -> None:
        self._dataset, self._slots = dataset, slots

    def __getitems__(self, request: Request) -> Parcel:
        slot, keys = request
        items = [self._dataset[key] for key in keys]
        shape = (len(items), *items[0].sample.image.shape)
        batch = collate(items, self._slots.images(slot, shape))
        rest = {field.name: getattr(batch, field.name).numpy() for field in fields(batch) if field.name != "images"}
        return Parcel(self._slots.name, slot, shape, rest)


def as_it_is(parcel: Any) -> Any:
    """In place of what makes a batch of samples."""
    return parcel
