"""torchrun's rendezvous on a key-value store of ours."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    dynamic_rendezvous,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

from gai_yolo.launcher.arguments import parse_rendezvous
from gai_yolo.launcher.command import BACKEND
from gai_yolo.launcher.rendezvous.file_store import FileKeyValueStore
from gai_yolo.launcher.rendezvous.key_values import KeyValueStore
from gai_yolo.launcher.rendezvous.run_name import close_run
from gai_yolo.launcher.rendezvous.secret import given_secret, secret_for
from gai_yolo.launcher.rendezvous.state import StateBackend
from gai_yolo.launcher.rendezvous.tcp_store import TcpKeyValueStore
from gai_yolo.launcher.verdict import RestartCounter

STORE_ANSWERS_WITHIN = 5.0
"""Seconds; a store that takes longer is lost."""
VALUE_TICK = 0.1
"""Seconds between two looks for a value that another node has yet to write."""
BARRIER = timedelta(seconds=300)
"""torchrun waits so long at the end for other nodes' workers. It sets this on a wrapper of the store, which does not pass it on."""
LEAVE_WITHIN = 2.0
"""Seconds."""


def name_methods_at_once() -> None:
    """torchrun's rendezvous notes its methods' names for a log. `inspect.stack` goes through all modules for each name, for 50 ms, several
    times while workers wait."""
    vars(dynamic_rendezvous)["get_method_name"] = lambda depth=2: sys._getframe(depth).f_code.co_name


class StoreLost(RuntimeError):
    """The key-value store cannot be reached, or another node has not written what it had to."""


class StopStarting(Exception):
    """Workers must not be started again; its argument is the code with which the agent is to end."""


class TorchStore(dist.Store):  # type: ignore[name-defined, misc]
    """A key-value store as one of torch.distributed, which calls it through its C++ wrappers.

    Raises:
        StoreLost: from every call.

    Args:
        patience: seconds to wait for what other nodes write.
    """

    def __init__(self, store: KeyValueStore, patience: float) -> None:
        super().__init__()
        self._store, self._patience = store, timedelta(seconds=patience)

    def set(self, key: str, value: str | bytes) -> None:
        self.multi_set([key], [value])

    def get(self, key: str) -> bytes:
        (value,) = self.multi_get([key])
        return value

    def add(self, key: str, amount: int) -> int:
        with _lost():
            return self._store.add(key, amount)

    def compare_set(self, key: str, expected: str | bytes, value: str | bytes) -> bytes:
        """Set a value if another stands there; returns what stands there then."""
        with _lost():
            return self._store.swap(key, _bytes(expected), _bytes(value))

    def check(self, keys: Sequence[str]) -> bool:
        with _lost():
            return None not in self._store.read(keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait(keys, BARRIER if timeout is None else timeout)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._wait(keys, self._patience)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        with _lost():
            self._store.write({key: _bytes(value) for key, value in zip(keys, values, strict=True)})

    def has_extended_api(self) -> bool:
        """There are `multi_get` and `multi_set`."""
        return True

    def _wait(self, keys: Sequence[str], patience: timedelta) -> list[bytes]:
        deadline = time.monotonic() + patience.total_seconds()
        while True:
            with _lost():
                found = self._store.read(keys)
            values = [value for value in found if value is not None]
            if len(values) == len(found):
                return values
            if time.monotonic() > deadline:
                raise StoreLost(f"no node has written {keys[found.index(None)]} for {patience.total_seconds():.0f} s")
            time.sleep(VALUE_TICK)


class StoreRendezvous(RendezvousHandler):
    """torchrun's own rendezvous with another end: it is closed when the workers have succeeded, and only then. torchrun closes it, for
    all nodes, whenever an agent fails.

    Raises:
        StoreLost: there is nobody at its endpoint.
    """

    def __init__(self, parameters: RendezvousParameters, job: str, restarts: RestartCounter) -> None:
        self._job, self._restarts = job, restarts
        self._run = parameters.run_id
        with _lost():
            where = parse_rendezvous(parameters.endpoint)
            secret = secret_for(where, given_secret(None, os.environ))
            self._store: KeyValueStore = (
                FileKeyValueStore(where, secret) if isinstance(where, Path) else TcpKeyValueStore(where[0], secret, STORE_ANSWERS_WITHIN)
            )
            # Kept: where C++ alone holds a store of Python's, its methods are gone.
            self._torch_store = TorchStore(self._store, parameters.get_as_int("read_timeout") or 20)
            self._handler: DynamicRendezvousHandler = create_handler(self._torch_store, StateBackend(self._store, self._run), parameters)
        self._resized = False

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return self._handler.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes, before workers are started.

        Raises:
            StopStarting: they must not be.
        """
        code = self._restarts.before(self._resized)
        if code is not None:
            raise StopStarting(code)
        try:
            info = self._handler.next_rendezvous()
        except RendezvousGracefulExitError as error:
            raise RendezvousClosedError(str(error)) from None
        self._restarts.begun()
        return info

    def num_nodes_waiting(self) -> int:
        """See the base class. Where it is more than 0, torchrun ends its workers and calls `next_rendezvous`."""
        number = self._handler.num_nodes_waiting()
        self._resized = number > 0
        return number

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """The run has succeeded: those who wait, and those who come later, need not begin."""
        close_run(self._store, self._job, self._run)
        self._handler.set_closed()

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        """torchrun's agent ends, which is not the end of the job."""
        return True

    def leave(self) -> None:
        """Strike this node off, so that the others need not wait until it is taken for dead."""
        # torchrun does this within next_rendezvous and has no public way to it. If a later version has changed it, they wait.
        with contextlib.suppress(ImportError, AttributeError, TypeError, RendezvousError, StoreLost):
            from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousExitOp

            self._handler._stop_heartbeats()
            self._handler._op_executor.run(_RendezvousExitOp(), time.monotonic() + LEAVE_WITHIN)


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # the last two: what answers is no store of ours
        raise StoreLost(str(error)) from error


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
