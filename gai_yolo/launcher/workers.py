"""torchrun's way of starting workers, replaced by forks of a fork server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from gai_yolo.launcher.forking import ForkServer
from gai_yolo.launcher.processes import reap_orphans


def fork_workers(server: ForkServer | None) -> Callable[[], list[int]]:
    """Let torchrun's agent in this process take its workers from a fork server, and start by itself those that it does not give.

    Returns:
        What gives the exit codes of the last start's workers that have ended, minus a signal's number.
    """
    workers: dict[int, Any] = {}
    vars(api)["get_subprocess_handler"] = partial(Handler, server, workers)  # a function of that module alone, looked up at each call
    return lambda: [code for worker in workers.values() if (code := worker.poll()) is not None]


class Handler(SubprocessHandler):
    """torchrun's handle of a worker.

    Args:
        server: to be asked first, if there is one.
        workers: of the last start, by local rank; shared by all handles.
    """

    def __init__(self, server: ForkServer | None, workers: dict[int, Any], **of_torchrun: Any) -> None:
        self._server, self._workers = server, workers
        super().__init__(**of_torchrun)

    def _popen(self, args: tuple[Any, ...], env: dict[str, str]) -> Any:
        worker: Any = None
        if self._server is not None:
            # What dead workers leave behind comes to this process, because it has asked for orphans.
            reap_orphans([self._server.pid, *(worker.pid for worker in self._workers.values() if worker.poll() is None)])
            if self._stdout is None and self._stderr is None:
                worker = self._server.fork(args, env)
        if worker is None:
            worker = super()._popen(args, env)
        self._workers[self.local_rank_id] = worker
        return worker
