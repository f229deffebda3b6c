"""Loaders: they are told which samples to bring, prefetch them in worker processes, and hold no state worth saving.

Whoever makes a loader closes it, on every way out: its processes ignore the signals that reach the whole group, so that a step can be
ended, and would keep the interpreter from ending.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import cv2
from torch.utils.data import DataLoader

from gai_yolo.data.dataset import Batch, EvaluationSet, SampleSet, collate
from gai_yolo.data.order import BatchPlan, Key, split_evenly
from gai_yolo.data.slots import ParcelSet, Slots, as_it_is
from gai_yolo.errors import DataError, refused_by
from gai_yolo.processes import die_with_parent

PREFETCHED = 2
"""Batches that a loader process is asked for ahead."""
LOADERS_END_WITHIN = 2.0
"""Seconds; a process that waits for a dead disk does not end when it is killed."""


class Workers(ForkContext):
    """Starts the processes of a loader, and ends them. They share images cached in memory, because they are forked; they use NumPy and
    OpenCV only, never the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[BaseProcess] = []

    def Process(self, *args: Any, **options: Any) -> BaseProcess:  # type: ignore[override]  # noqa: N802
        """As of every context; remembers it."""
        self._made = [one for one in self._made if one.is_alive()]
        self._made.append(ForkProcess(*args, **options))
        return self._made[-1]

    def try_room(self, count: int) -> None:
        """Make, and throw away, as many queues as so many processes need: where PyTorch's loader can make only some of them it leaves
        tracebacks behind. They are semaphores, which lie in /dev/shm, and pipes.

        Raises:
            OSError: there is no room for them.
        """
        if not self._made:  # otherwise they are there
            made: list[Any] = [self.Event()]
            made += [self.Queue() for _ in range(count + 1)]

    def end(self) -> None:
        """Kill them, whatever they are doing: they hold nothing. Takes at most `LOADERS_END_WITHIN` seconds, should one wait for a disk."""
        with _children_may_die():
            for one in self._made:
                if one.pid is not None:
                    one.kill()
            deadline = time.monotonic() + LOADERS_END_WITHIN
            for one in self._made:
                if one.pid is not None:
                    one.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _children_may_die() -> Iterator[None]:
    """PyTorch raises an error in the main thread when a loader process is killed, which here is what is wanted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class _Requests:
    """What PyTorch is to ask its processes for next; it takes them one by one, as far ahead as it prefetches."""

    def __init__(self) -> None:
        self.batches: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Loader:
    """PyTorch's loader, told what to bring, with processes that can be ended and batches in shared memory.

    Args:
        batch_size: the largest.
        persistent: keeps its processes from one round to the next.
    """

    def __init__(self, dataset: SampleSet, batch_size: int, workers: int, pin_memory: bool, persistent: bool) -> None:
        self._requests = _Requests()
        self._workers: Workers | None = None
        self._slots: Slots | None = None
        options: dict[str, Any] = {"batch_sampler": self._requests, "pin_memory": pin_memory, "num_workers": workers}
        if not workers:
            self._loader: DataLoader[Any] | None = DataLoader(dataset, collate_fn=collate, **options)
            return
        self._workers = Workers()
        # As many as are asked for ahead, and the one that has come while the next is asked for.
        self._slots = Slots(PREFETCHED * workers + 1, batch_size * dataset.images.image_size**2 * 3)
        options |= {"multiprocessing_context": self._workers, "persistent_workers": persistent, "prefetch_factor": PREFETCHED}
        start = partial(_start_worker, os.getpid())
        self._loader = DataLoader(ParcelSet(dataset, self._slots), collate_fn=as_it_is, worker_init_fn=start, **options)

    def bring(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """These batches, in order, from now on; not those that were asked for before.

        Raises:
            DataError: the system has no room for its processes.
        """
        assert self._loader is not None, "it was closed"
        if self._slots is None or self._workers is None:
            self._requests.batches = batches
            return iter(self._loader)
        slots = self._slots
        slots.clear()
        # There always is a free one: no more batches are asked for at a time.
        self._requests.batches = ((slots.free.popleft(), keys) for keys in batches)
        count = self._loader.num_workers
        try:
            self._workers.try_room(count)
            brought = iter(self._loader)
        except OSError as error:
            refusal = DataError(
                f"data.workers: {count} loader processes cannot be started ({error.strerror or error}); make room for what they need "
                "(/dev/shm, which is --shm-size in containers; ulimit -n and -u; memory), or set data.workers: 0."
            )
            raise refused_by(error, refusal) from None
        return (one if isinstance(one, Batch) else one.unpacked() for one in brought)

    def close(self) -> None:
        """End its processes, whatever they are doing. To be called in the main thread."""
        if self._workers is not None:
            self._workers.end()
        self._loader = None


class TrainingLoader(_Loader):
    """Brings the micro-batches of one rank, step by step.

    Args:
        plan: which sample comes when.
        workers: loader processes; they live until it is closed.
        pin_memory: for asynchronous copies to a GPU.
    """

    def __init__(self, dataset: SampleSet, plan: BatchPlan, rank: int, world_size: int, workers: int, pin_memory: bool) -> None:
        super().__init__(dataset, plan.micro_batch_size, workers, pin_memory, persistent=True)
        self.dataset, self.plan = dataset, plan
        self.rank, self.world_size = rank, world_size
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
        return self.bring(micro for span in spans for micro in span)


class EvaluationLoader(_Loader):
    """Brings whole batches of the evaluation set to one rank: every image once over all ranks, none twice.

    The content of a batch does not depend on the world size, so neither do the bits of the predictions.
    """

    def __init__(self, dataset: EvaluationSet, batch_size: int, rank: int, world_size: int, workers: int, pin_memory: bool) -> None:
        super().__init__(dataset, batch_size, workers, pin_memory, persistent=False)
        positions = range(len(dataset))
        batches = [[Key(0, p) for p in positions[i : i + batch_size]] for i in range(0, len(dataset), batch_size)]
        self.numbers = list(range(len(batches)))[rank::world_size]
        """Which batches of the whole set this rank computes."""
        self._batches = [batches[number] for number in self.numbers]

    def __iter__(self) -> Iterator[Batch]:
        return self.bring(self._batches)


def _start_worker(parent: int, _worker: int) -> None:
    cv2.setNumThreads(0)
    die_with_parent(parent, signal.SIGKILL)
    # These reach the whole process group; the training process, which may have to end a step first, ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _say_unless_parent_is_gone


def _say_unless_parent_is_gone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # A batch on its way to a training process that has just been stopped: its connection breaks, and that is no news.
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
