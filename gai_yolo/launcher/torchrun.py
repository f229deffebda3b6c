"""torchrun within the agent: its ends as exit codes and lines, its rendezvous replaced by ours."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousParameters, rendezvous_handler_registry

from gai_yolo.errors import LAST_WORDS, Ending
from gai_yolo.launcher.command import BACKEND, JOB_VARIABLE, threads_each
from gai_yolo.launcher.fork_server import ForkServer, fork_workers
from gai_yolo.launcher.rendezvous.handler import StopStarting, StoreLost, StoreRendezvous, name_methods_at_once
from gai_yolo.launcher.rendezvous.state import KNOWN_TORCH, unknown_torch
from gai_yolo.launcher.verdict import CLOSED, DONE, FAILED, KILLED_AT_ONCE, RENDEZVOUS_LOST, TERMINATED, RestartCounter, have_failed
from gai_yolo.machine import available_cores
from gai_yolo.supervision.outcome import VARIABLE as OUTCOME_VARIABLE
from gai_yolo.supervision.outcome import Outcome, clear_outcome, read_outcome, write_outcome

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str], server: ForkServer | None = None) -> int:
    """Be torchrun's agent, whose workers the server gives where it can; returns an exit code of `verdict.py`."""
    outcome = Path(os.environ[OUTCOME_VARIABLE])
    rendezvous: list[StoreRendezvous] = []
    try:
        exit_codes, unknown = fork_workers(server), unknown_torch()
    except (ImportError, AttributeError) as error:
        unknown = f"PyTorch {torch.__version__} starts workers in a way that is not known here ({error}); {KNOWN_TORCH}"
    if unknown:
        write_outcome(outcome, Outcome(Ending.REFUSED, unknown))
        return FAILED

    def make(parameters: RendezvousParameters) -> StoreRendezvous:
        rendezvous.append(StoreRendezvous(parameters, os.environ[JOB_VARIABLE], RestartCounter(outcome, time.monotonic, exit_codes)))
        return rendezvous[0]

    rendezvous_handler_registry.register(BACKEND, make)
    given = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    processes = count_processes(given.nproc_per_node)
    if processes == 0:
        write_outcome(outcome, Outcome(Ending.REFUSED, "--processes-per-node gpu: this machine has no GPU that PyTorch can use."))
        return FAILED
    given.nproc_per_node = str(processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(available_cores(), processes)))
    _quieten_tracebacks()
    name_methods_at_once()
    interruption = SignalToException(outcome)
    code = _run(given, server)
    interruption.is_over()
    for one in rendezvous:
        _say_good_bye(one, succeeded=code == DONE)
    return code


def count_processes(setting: str) -> int:
    """Processes for this machine: a number, `auto`, `gpu` or `cpu`; 0: `gpu`, and there is none."""
    if setting.isdigit():
        return int(setting)
    if setting == "cpu":
        return available_cores()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return gpus if setting == "gpu" else max(1, gpus)


class SignalToException:
    """Turns the first signal into torchrun's exception, which ends the workers with SIGTERM and waits for them. It ignores those that
    follow: torchrun would leave its wait, and its workers. What stands in the file `outcome` at the signal outlives what other workers say
    because they are ended.
    """

    def __init__(self, outcome: Path) -> None:
        self._outcome = outcome
        self._said: Outcome | None = None
        self._seen = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._note)

    def is_over(self) -> None:
        """Take no more signals, and put the outcome back if it was one that must not be lost."""
        self._seen = True
        if self._said is not None and self._said.ending in LAST_WORDS:
            clear_outcome(self._outcome)
            write_outcome(self._outcome, self._said)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._seen:
            self._seen = True
            self._said = read_outcome(self._outcome)
            raise SignalException(f"signal {number}", signal.SIGTERM)


def _run(given: argparse.Namespace, server: ForkServer | None) -> int:
    """Run it, and say how it ended."""
    try:
        if server is not None:
            server.wait()  # before the rendezvous: the other nodes compute until this one has joined them
        torchrun.run(given)  # type: ignore[no-untyped-call]
    except SignalException:
        return TERMINATED
    except StopStarting as stop:
        return int(stop.args[0])
    except RendezvousClosedError:
        return CLOSED
    except (RendezvousError, StoreLost) as error:
        logger.warning(f"the rendezvous was lost: {error.__cause__ or error}")
        return RENDEZVOUS_LOST
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        end = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with code {failure.exitcode}"
        logger.warning(f"rank {rank} {end}, and there are no restarts left")
        return FAILED if have_failed([failure.exitcode for failure in error.failures.values()]) else KILLED_AT_ONCE
    return DONE


def _say_good_bye(rendezvous: StoreRendezvous, succeeded: bool) -> None:
    if succeeded:
        try:
            rendezvous.set_closed()
        except (RendezvousError, StoreLost, OSError) as error:
            logger.warning(f"other nodes were not told of the end: {error}")
    else:
        rendezvous.leave()


def _quieten_tracebacks() -> None:
    """torchrun logs tracebacks of errors that it goes on from, or that are told here."""
    make = logging.getLogRecordFactory()

    def without_traceback(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = make(*arguments, **more)
        if record.name.startswith("torch.distributed"):
            record.exc_info = None
        return record

    logging.setLogRecordFactory(without_traceback)
