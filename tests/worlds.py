"""Several ranks as threads of one process, for tests of what ranks agree on."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from gai_yolo.distributed.world import World
from gai_yolo.log import showing

T = TypeVar("T")
NAME_OF_RANK = "rank {}"
"""Of its thread."""
PATIENCE = 20.0
"""Seconds after which a rank that waits for the others in vain raises."""


class RendezvousClient:
    """Where the ranks meet.

    Args:
        patience: seconds that they wait there for each other.
    """

    def __init__(self, size: int, patience: float = PATIENCE) -> None:
        self.barrier = threading.Barrier(size, timeout=patience)
        self.items: list[bytes] = [b""] * size

    def exchange(self, rank: int, item: T) -> list[T]:
        """The items of all ranks, on each."""
        self.items[rank] = pickle.dumps(item)
        self.barrier.wait()
        items = [pickle.loads(data) for data in self.items]
        self.barrier.wait()
        return items


class ThreadWorld(World):
    """One rank of several; every item goes through pickle, as between processes."""

    def __init__(self, rank: int, size: int, per_node: int, meeting: RendezvousClient, beats_meeting: RendezvousClient) -> None:
        self.rank, self.world_size, self.local_world_size = rank, size, per_node
        self.local_rank, self.node = rank % per_node, rank // per_node
        self.device = torch.device("cpu")
        self._meeting, self._beats_meeting = meeting, beats_meeting

    def gather(self, item: T) -> list[T]:
        self.meet()
        return self._meeting.exchange(self.rank, item)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(0))

    def broadcast_bytes(self, data: bytes, source: int) -> bytes:
        return self.gather(data)[source]

    def least(self, number: int) -> int:
        return min(self._beats_meeting.exchange(self.rank, number))


def on_ranks(size: int, action: Callable[[World], T], per_node: int = 1, patience: float = PATIENCE) -> list[T | Exception]:
    """What `action` returns, or raises, on each rank. Ranks wait for each other for so many seconds of `patience`."""
    meeting, beats_meeting = RendezvousClient(size, patience), RendezvousClient(size, patience)
    results: list[T | Exception] = [AssertionError("no result")] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadWorld(rank, size, per_node, meeting, beats_meeting))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), name=NAME_OF_RANK.format(rank)) for rank in range(size)]
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


@contextlib.contextmanager
def told_on_first() -> Iterator[list[str]]:
    """What is said meanwhile on the first of the ranks of `on_ranks`."""
    lines: list[str] = []

    def note(record: logging.LogRecord) -> None:
        if record.threadName == NAME_OF_RANK.format(0):
            lines.append(record.getMessage())

    with showing(note):
        yield lines
