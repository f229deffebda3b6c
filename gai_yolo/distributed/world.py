"""This process among the others: the process group, the device, what all ranks do together."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gai_yolo.distributed.environment import environment_local_rank, environment_rank, number_in
from gai_yolo.distributed.heartbeat import Heartbeat
from gai_yolo.distributed.network import interface_for_peers
from gai_yolo.errors import ConfigError, Refusal
from gai_yolo.machine import available_cores

T = TypeVar("T")
MOST_SENT_BYTES = 16 << 20
"""Bytes that are sent in one collective at most, so that each is short on a slow network too."""


def fix_arithmetic() -> None:
    """Let PyTorch take kernels whose results depend on nothing but their inputs, the same on every rank and in every run; to
    be called before the first computation. An operation that has no such kernel raises a RuntimeError that names it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.set_deterministic_debug_mode("error")  # as torch.use_deterministic_algorithms does, which also imports the compiler
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and only hides bugs
    torch.backends.cudnn.benchmark = False  # a choice by stop-watch is another one each time
    torch.backends.cudnn.deterministic = True


class World:
    """All processes of the job, as one of them sees it. Collectives must be called by every rank, in the same order.

    While steps are made, ranks come to each collective at about the same time, and one that does not within `timeout` seconds is given up.
    Between `begin_long_work` and `end_long_work` ranks may work for any time before a collective: they wait for each other for as long as
    all are alive (see `distributed.heartbeat`).

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: of this process, or `auto`: the machine's cores over its processes.
        timeout: seconds that processes wait for each other in a collective, or for a beat, before it fails.

    Raises:
        ConfigError: `cuda` is asked for and there is no GPU for this process.
    """

    _beats: dist.ProcessGroup | None = None
    _heartbeat: Heartbeat | None = None

    def __init__(
        self, device: Literal["auto", "cpu", "cuda"] = "auto", threads: int | Literal["auto"] = "auto", timeout: float = 300.0
    ) -> None:
        self.rank = environment_rank()
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = environment_local_rank()
        self.local_world_size = local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.node = number_in(os.environ, "GROUP_RANK", self.rank // local_world_size)
        """Number of this machine among the job's."""
        self.device = _choose_device(device, self.local_rank, local_world_size)
        self.set_threads(max(1, available_cores() // local_world_size) if threads == "auto" else threads)
        self._owns_group = self.world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ
        if self._owns_group:
            if self.world_size > local_world_size and (interface := interface_for_peers(os.environ["MASTER_ADDR"])):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store = self._store(timedelta(seconds=timeout))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=timeout))
            if self.world_size > 1:
                # A group of their own: beats come from another thread than the other collectives.
                self._beats = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))

    def _store(self, timeout: timedelta) -> dist.Store:  # type: ignore[name-defined]
        """Where the processes of this start find each other.

        On one machine torchrun keeps one store for all starts, and gloo would find the addresses of dead processes in it. With
        several, `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` gives each start its own; the agents' counts of restarts differ there.
        """
        store = next(rendezvous("env://", timeout=timeout))[0]
        if self.world_size > self.local_world_size:
            return store
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]

    def set_threads(self, threads: int) -> None:
        self.threads = threads
        torch.set_num_threads(threads)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """Whether this rank looks after what each node has once."""
        return self.local_rank == 0

    def begin_long_work(self) -> None:
        """From here on ranks may work for any time between two collectives. To be called by all; waits for nobody."""
        if self.world_size > 1 and self._heartbeat is None:
            self._heartbeat = Heartbeat(self.least)
            self._heartbeat.start()

    def end_long_work(self) -> None:
        """No more; waits until all have come here. May be called where nothing was begun, by all alike."""
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.end()

    def leave(self) -> None:
        """This process ends on its own account: it beats no more, and heeds nobody's."""
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.leave()

    @contextlib.contextmanager
    def leaving_on_error(self) -> Iterator[None]:
        """Around what ranks do together: an exception that comes through ends this process, or all alike."""
        try:
            yield
        except BaseException:
            self.leave()
            raise

    def meet(self) -> None:
        """Within long work, wait until all ranks have come here; to be called before what needs them all at about the same time. The
        collectives of this class do so by themselves."""
        if self._heartbeat is not None:
            self._heartbeat.meet()

    @property
    def is_waiting(self) -> bool:
        """Whether the main thread waits for the long work of other ranks, which are alive. From any thread."""
        heartbeat = self._heartbeat
        return heartbeat is not None and heartbeat.is_waiting

    @property
    def lost(self) -> str | None:
        """For people, that a rank is gone, while this one may be in the midst of long work. From any thread."""
        heartbeat = self._heartbeat
        return None if heartbeat is None or heartbeat.failure is None else lost_peer_line(heartbeat.failure)

    def least(self, number: int) -> int:
        """The least of the numbers of all ranks; not for the main thread while there is long work."""
        all_ranks = torch.tensor([number])
        dist.all_reduce(all_ranks, dist.ReduceOp.MIN, group=self._beats)
        return int(all_ranks)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        self.meet()
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum of a tensor over all ranks, in place."""
        self.meet()
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, item: T) -> list[T]:
        """The items of all ranks in rank order, on every rank. Items are pickled; all hold all of them."""
        if self.world_size == 1:
            return [item]
        self.meet()
        data = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        sizes = [int(size) for size in self._gather_alike(torch.tensor([len(data)]))]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(data)] = data
        pieces = zip(*(self._gather_alike(piece) for piece in torch.split(mine, MOST_SENT_BYTES)), strict=True)
        whole = (torch.cat(of_rank)[:size].numpy().tobytes() for of_rank, size in zip(pieces, sizes, strict=True))
        return [pickle.loads(one) for one in whole]

    def _gather_alike(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one size in the CPU's memory, of all ranks."""
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor)
        return tensors

    def broadcast_bytes(self, data: bytes, source: int) -> bytes:
        """The bytes that rank `source` gives, on every rank."""
        if self.world_size == 1:
            return data
        self.meet()
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, source)
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        buffer = mine if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
        for piece in torch.split(buffer, MOST_SENT_BYTES):
            sent = piece.to(self.device)
            dist.broadcast(sent, source)
            if self.rank != source:
                piece.copy_(sent)
        return data if self.rank == source else buffer.numpy().tobytes()

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result, or raise its refusal, on every rank."""
        outcome = _attempt(make) if self.is_first else None
        return _result(self.gather(outcome)[0])

    def together(self, make: Callable[[], T]) -> T:
        """Call `make` on every rank; if any refuses, all raise the refusal of the lowest such rank, so none waits for it."""
        outcome = _attempt(make)
        for refusal in self.gather(outcome if isinstance(outcome, Refusal) else None):
            if refusal is not None:
                raise refusal
        return _result(outcome)

    def wait_for_all(self) -> bool:
        """End long work and wait until every rank has come here, or one has died, or takes too long; returns whether all have."""
        with contextlib.suppress(RuntimeError):
            self.end_long_work()
            self.sum(torch.zeros(1, device=self.device))
            return True
        return False

    def close(self) -> None:
        """Leave the process group in order; not to be called when peers may be dead."""
        self.leave()
        if self._owns_group:
            dist.destroy_process_group()


SIGNS_OF_LOSS = ("gloo/transport", "gloo::", "Gloo ", "NCCL", "timed out", "Timed out", "DataLoader worker (pid")
"""In messages about processes that are gone. An error within a loader has "DataLoader worker process"."""


def lost_peer_line(error: BaseException) -> str:
    """For people, what `is_lost_peer` has recognised."""
    return f"peer lost: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process, a loader's too, cannot be reached, or did not answer in time. gloo and PyTorch's
    loaders have no class for it."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in SIGNS_OF_LOSS)


def _attempt(make: Callable[[], T]) -> T | Refusal:
    try:
        return make()
    except Refusal as refusal:
        return refusal


def _result(outcome: T | Refusal | None) -> T:
    if isinstance(outcome, Refusal):
        raise outcome
    return outcome  # type: ignore[return-value]


def _choose_device(setting: Literal["auto", "cpu", "cuda"], local_rank: int, local_world_size: int) -> torch.device:
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Asked by every process alike: if only those without a GPU refused, the others would wait for them.
    if local_world_size > count:
        raise ConfigError(
            f"training.device: {local_world_size} processes on this node and {count} GPUs; "
            "start at most one process for each GPU, or set training.device: cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
