"""torchrun's way of starting workers, replaced by forks of a fork server."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from gai_yolo.launching.forking import ForkServer
from gai_yolo.launching.processes import reap_orphans


def fork_workers(server: ForkServer) -> None:
    """Let torchrun's agent in this process take its workers from a fork server, and start by itself those that it does not give."""
    vars(api)["get_subprocess_handler"] = partial(Handler, server, [])  # a function of that module alone, looked up at each call


class Handler(SubprocessHandler):
    """torchrun's handle of a worker.

    Args:
        server: to be asked first.
        workers: all processes so far, shared by all handles.
    """

    def __init__(self, server: ForkServer, workers: list[Any], **of_torchrun: Any) -> None:
        self._server, self._workers = server, workers
        super().__init__(**of_torchrun)

    def _popen(self, args: tuple[Any, ...], env: dict[str, str]) -> Any:
        # What dead workers leave behind comes to this process, because it has asked for orphans.
        self._workers[:] = [worker for worker in self._workers if worker.poll() is None]
        reap_orphans([self._server.pid, *(worker.pid for worker in self._workers)])
        worker: Any = None
        if self._stdout is None and self._stderr is None:
            worker = self._server.fork(args, env)
        if worker is None:
            worker = super()._popen(args, env)
        self._workers.append(worker)
        return worker
