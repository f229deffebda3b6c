"""Several ranks as threads of one process, for tests of what ranks agree on."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from gai_yolo.elastic.process import World
from gai_yolo.errors import Refusal

T = TypeVar("T")
PATIENCE = 20.0
"""Seconds after which a rank that waits for the others in vain raises."""


class Meeting:
    """Where the ranks meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.items: list[bytes] = [b""] * size


class ThreadWorld(World):
    """One rank of several; every item goes through pickle, as between processes."""

    def __init__(self, rank: int, size: int, per_node: int, meeting: Meeting) -> None:
        self.rank, self.world_size, self.local_world_size = rank, size, per_node
        self.local_rank, self.node = rank % per_node, rank // per_node
        self.device = torch.device("cpu")
        self._meeting = meeting

    def gather(self, item: T) -> list[T]:
        self._meeting.items[self.rank] = pickle.dumps(item)
        self._meeting.barrier.wait()
        items = [pickle.loads(data) for data in self._meeting.items]
        self._meeting.barrier.wait()
        return items

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(0))

    def broadcast_bytes(self, data: bytes, source: int) -> bytes:
        return self.gather(data)[source]

    def from_first(self, make: Callable[[], T]) -> T:
        outcome: T | Refusal | None = None
        if self.is_first:
            try:
                outcome = make()
            except Refusal as refusal:
                outcome = refusal
        result = self.gather(outcome)[0]
        if isinstance(result, Refusal):
            raise result
        return result  # type: ignore[return-value]


def on_ranks(size: int, action: Callable[[World], T], per_node: int = 1) -> list[T | Exception]:
    """What `action` returns, or raises, on each rank."""
    meeting = Meeting(size)
    results: list[T | Exception] = [AssertionError("no result")] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadWorld(rank, size, per_node, meeting))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def good(results: list[T | Exception]) -> list[T]:
    """The results, where no rank may have raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]
