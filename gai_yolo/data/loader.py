"""Loaders: they are told which samples to bring, prefetch them in worker processes, and hold no state worth saving."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from gai_yolo.data.batch import Batch
from gai_yolo.data.dataset import EvaluationSet, Item, Key, collate
from gai_yolo.data.order import Plan, split_evenly

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


class _Requests:
    """The batches that the DataLoader is to bring next; it asks for them one by one, as far ahead as it prefetches."""

    def __init__(self, batches: Iterable[list[Key]] = ()) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class TrainingLoader:
    """Brings the micro-batches of one rank, step by step.

    Args:
        plan: which sample comes when.
        workers: loader processes; they live as long as this object.
        pin_memory: for asynchronous copies to a GPU.
    """

    def __init__(self, dataset: Dataset[Item], plan: Plan, rank: int, world_size: int, workers: int, pin_memory: bool) -> None:
        self.plan = plan
        self.rank, self.world_size = rank, world_size
        self._requests = _Requests()
        self._loader = _make_loader(dataset, self._requests, workers, pin_memory)
        self._started: tuple[int, int, Iterator[Batch]] | None = None

    def start(self, epoch: int, first_step: int) -> None:
        """Let the workers begin with what `epoch` is going to be asked for, while other things are made ready."""
        self._started = (epoch, first_step, self._begin(epoch, first_step))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step of an epoch (1-based), from `first_step` (0-based); an idle rank gets empty lists."""
        started, self._started = self._started, None
        batches = started[2] if started is not None and started[:2] == (epoch, first_step) else self._begin(epoch, first_step)
        for step in range(first_step, self.plan.steps_per_epoch):
            num_micro_batches = len(split_evenly(range(self.plan.step_size(step)[0]), self.world_size)[self.rank])
            yield [next(batches) for _ in range(num_micro_batches)]

    def _begin(self, epoch: int, first_step: int) -> Iterator[Batch]:
        order, steps = self.plan.order(epoch), range(first_step, self.plan.steps_per_epoch)
        spans = (self.plan.rank_micro_batches(order, step, self.rank, self.world_size) for step in steps)
        self._requests.batches = ([Key(epoch, position) for position in micro] for span in spans for micro in span)
        return iter(self._loader)


class EvaluationLoader:
    """Brings whole batches of the evaluation set to one rank: every image once over all ranks, none twice.

    The content of a batch does not depend on the world size, so neither do the bits of the predictions.
    """

    def __init__(self, dataset: EvaluationSet, batch_size: int, rank: int, world_size: int, workers: int, pin_memory: bool) -> None:
        positions = range(len(dataset))
        batches = [[Key(0, p) for p in positions[i : i + batch_size]] for i in range(0, len(dataset), batch_size)]
        self.numbers = list(range(len(batches)))[rank::world_size]
        """Which batches of the whole set this rank computes."""
        requests = _Requests([batches[number] for number in self.numbers])
        self._loader = _make_loader(dataset, requests, workers, pin_memory, persistent=False)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def _make_loader(dataset: Dataset[Item], requests: _Requests, workers: int, pin_memory: bool, persistent: bool = True) -> DataLoader[Any]:
    options: dict[str, Any] = {}
    if workers:
        # Forked workers share images cached in memory; they use NumPy and OpenCV only, never the GPU.
        start = partial(_start_worker, os.getpid())
        options = {"multiprocessing_context": "fork", "persistent_workers": persistent, "worker_init_fn": start}
    return DataLoader(dataset, batch_sampler=requests, collate_fn=collate, num_workers=workers, pin_memory=pin_memory, **options)


def _start_worker(parent: int, _worker: int) -> None:
    cv2.setNumThreads(0)
    end_with(parent)
    # These reach the whole process group; the training process, which may have to end a step first, ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _say_unless_parent_is_gone


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent dies (Linux); otherwise PyTorch notices within seconds."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _say_unless_parent_is_gone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # A batch on its way to a training process that has just been stopped: its connection breaks, and that is no news.
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
