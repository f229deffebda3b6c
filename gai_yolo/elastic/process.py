"""This process among the others: torchrun's environment, the process group, the device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gai_yolo.elastic.interfaces import interface_for_peers
from gai_yolo.errors import ConfigError, Refusal
from gai_yolo.machine import available_cores

T = TypeVar("T")


def environment_rank() -> int:
    """Rank from torchrun's environment; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def environment_local_rank() -> int:
    """Rank on this node from torchrun's environment; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launch_id() -> str | None:
    """torchrun's id of the job, the same after every restart and resize; None without torchrun or where it has none.

    The restart count would not do: torchrun does not count changes of membership.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job == "none" else job


def was_restarted() -> bool:
    """Whether torchrun has started this process anew after a failure. It does not count changes of membership."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


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

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: of this process, or `auto`: the machine's cores over its processes.
        timeout: seconds that processes wait for each other in a collective before it fails.

    Raises:
        ConfigError: `cuda` is asked for and there is no GPU for this process.
    """

    def __init__(
        self, device: Literal["auto", "cpu", "cuda"] = "auto", threads: int | Literal["auto"] = "auto", timeout: float = 300.0
    ) -> None:
        self.rank = environment_rank()
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = environment_local_rank()
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        """Number of this machine among the job's."""
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.device = _choose_device(device, self.local_rank, local_world_size)
        self.local_world_size = local_world_size
        self.threads = max(1, available_cores() // local_world_size) if threads == "auto" else threads
        torch.set_num_threads(self.threads)
        self._owns_group = False
        if self.world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            if self.world_size > local_world_size and (interface := interface_for_peers(os.environ["MASTER_ADDR"])):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store = self._store(timedelta(seconds=timeout))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=timeout))
            self._owns_group = True

    def _store(self, timeout: timedelta) -> Store:
        """Where the processes of this start find each other.

        On one machine torchrun keeps one store for all starts, and gloo would find the addresses of dead processes in it. With
        several, `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` gives each start its own; the agents' counts of restarts differ there.
        """
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        if self.world_size > self.local_world_size:
            return store
        return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
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

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum of a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, item: T) -> list[T]:
        """The items of all ranks in rank order, on every rank. Items are pickled; for small things."""
        if self.world_size == 1:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items  # type: ignore[return-value]

    def broadcast_bytes(self, data: bytes, source: int) -> bytes:
        """The bytes that rank `source` gives, on every rank."""
        if self.world_size == 1:
            return data
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, source)
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        buffer = (mine if self.rank == source else torch.empty(int(size), dtype=torch.uint8)).to(self.device)
        dist.broadcast(buffer, source)
        return data if self.rank == source else buffer.cpu().numpy().tobytes()

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result, or raise its refusal, on every rank."""
        outcome: list[T | Refusal | None] = [None]
        if self.is_first:
            outcome = [_attempt(make)]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        return _result(outcome[0])

    def from_first_in_time(self, make: Callable[[Callable[[], None]], T]) -> T:
        """The same for what may take longer than ranks wait for each other: `make` is given a function to call every second or so,
        which lets the others know, and raises where one of them is gone."""

        def first_waits(yes: bool = False) -> bool:
            return bool(self.sum(torch.tensor([float(yes)], device=self.device)) > 0)

        def say_so() -> None:
            first_waits(True)

        outcome: T | Refusal | None = None
        if self.is_first:
            outcome = _attempt(lambda: make(say_so))
            first_waits(False)
        else:
            while first_waits():
                pass
        return self.from_first(lambda: _result(outcome))

    def together(self, make: Callable[[], T]) -> T:
        """Call `make` on every rank; if any refuses, all raise the refusal of the lowest such rank, so none waits for it."""
        outcome = _attempt(make)
        for refusal in self.gather(outcome if isinstance(outcome, Refusal) else None):
            if refusal is not None:
                raise refusal
        return _result(outcome)

    def wait_for_all(self) -> bool:
        """Wait until every rank has come here, or one has died, or takes too long; returns whether all have."""
        with contextlib.suppress(RuntimeError):
            self.sum(torch.zeros(1, device=self.device))
            return True
        return False

    def close(self) -> None:
        """Leave the process group in order; not to be called when peers may be dead."""
        if self._owns_group:
            dist.destroy_process_group()


LOST = ("gloo/transport", "gloo::", "Gloo ", "NCCL", "timed out", "Timed out", "DataLoader worker (pid")
"""In messages about processes that are gone. An error within a loader has "DataLoader worker process"."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process, a loader's too, cannot be reached, or did not answer in time. gloo and PyTorch's
    loaders have no class for it."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)


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
