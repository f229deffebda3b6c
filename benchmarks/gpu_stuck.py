"""What another thread can still do while a GPU's stream is stuck: `python -m benchmarks.gpu_stuck WAY ... [--out FILE]`.

Each way is how the main thread meets the stuck stream, tried in a process of its own. The stream is kept busy for a moment, another thread
does one thing after the other on a stream of its own, and for each it is noted whether it was done while the GPU was still busy. What was
not is told with the stacks. `leaving` measures how long a process with a stuck stream takes to be gone.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kernels import cycles_of
from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.detector import YOLO12
from gai_yolo.detector.ema import EMA

STUCK_SECONDS = 1.6
NOT_BEGUN_AFTER = 0.9
"""Seconds of a stuck stream after which nothing new is tried on it: what is not done by its end was blocked."""
LIMIT = 22.0
"""Seconds that a process may take."""
UNUSED = ("lgamma", "digamma", "erfinv", "sinc", "i0", "cosh", "sinh", "tan", "asinh", "atanh", "acosh", "erfc", "expm1", "log1p")
"""Operations of which nothing was loaded yet."""


class Bench:
    """Tensors like those of a training, and what to do with them.

    Args:
        names: of what is done; all if there are none.
    """

    def __init__(self, names: list[str]) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        model = YOLO12("n", 4).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        ema = EMA(model, 0.999, 10.0)
        self.state: dict[str, Any] = {"model": model.state_dict(), "ema": ema.model.state_dict()}
        self.tensors: list[Tensor] = [*self.state["model"].values(), *self.state["ema"].values()]
        self.small, self.counter = torch.ones(64, device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        self.work, self.work_out = torch.ones(1024, device=self.device), torch.ones(1024, device=self.device)
        self.strided = torch.ones(256, 256, device=self.device)[:, ::2]
        self.buffer = StateBuffer(64 << 20, pinned=True)
        self.pinned = torch.empty(256, 128, pin_memory=True)
        self.pageable = [torch.empty_like(tensor, device="cpu") for tensor in self.tensors]
        self.flat = torch.empty(sum(tensor.numel() for tensor in self.tensors), device=self.device)
        parts = torch.split(self.flat, [tensor.numel() for tensor in self.tensors])
        self.targets = [part.view(tensor.shape) for part, tensor in zip(parts, self.tensors, strict=True)]
        self.stream: Any = None
        self.unused = list(UNUSED)
        self.loose: list[Any] = []
        for tensor in (self.work, self.small):
            tensor.add_(0.0)  # its kernel is loaded
        self.counter.fill_(1)
        torch.full_like(self.counter, 3)
        torch._foreach_copy_(self.pageable[:1], self.tensors[:1])
        actions = self.actions()
        self.names = names or list(actions)
        self.wanted = [(name, actions[name]) for name in self.names]

    def actions(self) -> dict[str, Callable[[], object]]:
        """What is done, by name, what is likely to work first."""
        return {
            "make a stream": self.make_stream,
            "an event on it": self.wait_for_event,
            "pinned before: StateBuffer.fill": lambda: self.fill(self.buffer),
            "pinned before: copy_ one strided tensor": self.waited(lambda: self.pinned.copy_(self.strided, non_blocking=True)),
            "a kernel that has run": self.waited(lambda: self.work_out.add_(1.0)),
            "gather on the GPU": self.waited(lambda: torch._foreach_copy_(self.targets, self.tensors)),
            "full_like (memory of the new stream)": self.waited(lambda: self.loose.append(torch.full_like(self.counter, 3))),
            "pageable: one tensor": lambda: self.pageable[0].copy_(self.tensors[0]),
            "pageable: all": lambda: [one.copy_(other) for one, other in zip(self.pageable, self.tensors, strict=True)],
            "storage.cpu()": lambda: self.tensors[0].untyped_storage().cpu(),  # type: ignore[no-untyped-call]
            "torch.save": lambda: torch.save(self.state, io.BytesIO()),
            "64 MB more of GPU memory": lambda: self.loose.append(torch.empty(64 << 20, dtype=torch.uint8, device=self.device)),
            "pinned then: StateBuffer": lambda: self.loose.append(StateBuffer(32 << 20, pinned=True)),
            "pinned then: StateBuffer.fill": lambda: self.fill(self.loose[-1]),
            "pinned then: pin_memory=True": lambda: self.loose.append(torch.empty(40 << 20, dtype=torch.uint8, pin_memory=True)),
            "a kernel never loaded": self.waited(lambda: getattr(torch, self.unused.pop(0))(self.work, out=self.work_out)),
            "unpin": self.unpin,
        }

    def waited(self, action: Callable[[], object]) -> Callable[[], None]:
        """Something that is queued, and then waited for."""

        def both() -> None:
            action()
            self.wait_for_event()

        return both

    def unpin(self) -> None:
        """What was pinned then."""
        for one in self.loose:
            if isinstance(one, StateBuffer):
                one.close()

    def make_stream(self) -> None:
        """As the rescue did until d0178fd."""
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def fill(self, buffer: StateBuffer) -> None:
        """Copy the state, and wait for that."""
        buffer.fill(self.state)
        while not buffer.ready():
            time.sleep(0.001)

    def wait_for_event(self) -> None:
        """Until the own stream has done what was queued."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        while not event.query():  # type: ignore[no-untyped-call]
            time.sleep(0.001)


def meet(way: str, bench: Bench, marker: Any) -> None:
    """What the main thread does behind what is stuck."""
    work = bench.work
    if way == "synchronize":
        torch.cuda.synchronize()
    elif way == "item":
        work[0].item()
    elif way == "tolist":
        work[:3].tolist()
    elif way == "from_list":
        torch.tensor([1.0, 2.0], device=bench.device)
    elif way == "queue":
        for _ in range(6000):
            work.add_(1.0)
    elif way == "unloaded":
        getattr(torch, bench.unused.pop())(work)
    elif way == "allocate":
        bench.loose.append(torch.empty(300 << 20, dtype=torch.uint8, device=bench.device))
    while not marker.query():
        time.sleep(0.002)


def one_period(way: str, bench: Bench, cycles: int, turn: str, say: Callable[[dict[str, Any]], None]) -> None:
    """Keep the stream busy once, and try what there is time for."""
    marker = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    started = time.monotonic()
    beats = Beats()

    def others() -> None:
        torch.cuda.set_device(bench.device)
        time.sleep(0.15)  # the main thread has met it by then
        while bench.wanted and time.monotonic() - started < NOT_BEGUN_AFTER:
            name, action = bench.wanted.pop(0)
            with torch.cuda.stream(bench.stream) if bench.stream is not None else contextlib.nullcontext():
                beats.longest = 0.0
                faulthandler.dump_traceback_later(0.6, file=sys.stderr)
                began, failure = time.monotonic(), ""
                try:
                    action()
                except Exception as error:
                    failure = f"{type(error).__name__}: {str(error)[:200]}"
                ended = time.monotonic()
                faulthandler.cancel_dump_traceback_later()
            found = {"way": way, "turn": turn, "what": name, "ms": round(1e3 * (ended - began), 1), "failure": failure}
            say({**found, "done while stuck": ended - started < STUCK_SECONDS - 0.1, "longest pause": round(beats.longest, 2)})

    thread = threading.Thread(target=others)
    thread.start()
    spin: Any = torch.cuda._sleep
    spin(cycles)
    marker.record()
    meet(way, bench, marker)
    taken = time.monotonic() - started
    thread.join()
    beats.stopped = True
    if not STUCK_SECONDS - 0.1 < taken < STUCK_SECONDS + 0.3:
        say({"way": way, "turn": turn, "stuck for": round(taken, 2)})


class Beats:
    """A thread that only beats, and notes how long it did not get to: while somebody holds the interpreter's lock."""

    def __init__(self) -> None:
        self.longest, self.stopped = 0.0, False
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        before = time.monotonic()
        while not self.stopped:
            time.sleep(0.01)
            now = time.monotonic()
            self.longest, before = max(self.longest, now - before), now


def try_way(way: str, turns: tuple[str, ...], names: list[str], say: Callable[[dict[str, Any]], None]) -> None:
    """All actions, in so many turns; in a process of its own."""
    began = time.monotonic()
    bench = Bench(names)
    cycles = cycles_of(STUCK_SECONDS)
    say({"way": way, "ready after": round(time.monotonic() - began, 2)})
    for turn in turns:
        actions = bench.actions()
        bench.wanted = [(name, actions[name]) for name in bench.names]
        while bench.wanted:
            one_period(way, bench, cycles, turn, say)


def leave_stuck(how: str, write: int) -> None:
    """Be stuck for 6 s, and say when it begins; then leave, or be killed."""
    torch.cuda.set_device(0)
    spin: Any = torch.cuda._sleep
    work = torch.ones(10, device="cuda")
    cycles = cycles_of(6.0)
    spin(cycles)
    if how.endswith("in tolist"):
        threading.Thread(target=work.tolist, daemon=True).start()
    time.sleep(0.3)
    os.write(write, b".")
    if how.startswith("_exit"):
        os._exit(0)
    time.sleep(30)


def leaving(say: Callable[[dict[str, Any]], None]) -> None:
    """Seconds until a process with 6 s of stuck stream is gone."""
    for how in ("_exit", "_exit in tolist", "SIGKILL"):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            leave_stuck(how, write)
        os.read(read, 1)
        started = time.monotonic()
        if how == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        say({"way": "leaving", "how": how, "gone after": round(time.monotonic() - started, 2), "the stream was stuck for": 5.7})


FEW = ["make a stream", "an event on it", "pinned before: StateBuffer.fill", "a kernel that has run", "pageable: all", "torch.save"]
WAYS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "poll": (("first", "again"), []),
    "poll-eager": (("first",), []),
    "tolist": (("first", "again"), FEW),
    "synchronize": (("first",), FEW),
    "item": (("first",), FEW),
    "from_list": (("first",), FEW),
    "queue": (("first",), FEW),
    "unloaded": (("first",), FEW),
    "allocate": (("first",), FEW),
}


def main() -> None:
    """Try the ways that were named, each in a fork of this process, which has imported everything and never touches the GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", choices=[*WAYS, "leaving"])
    parser.add_argument("--out", type=Path, default=Path("/dev/stdout"))
    parser.add_argument("--here", action="store_true", help="one way, in this process")
    given = parser.parse_args()

    def say(found: dict[str, Any]) -> None:
        with given.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)

    for way in given.ways:
        if way == "leaving":
            leaving(say)
            continue
        pid = 0 if given.here else os.fork()
        if pid == 0:
            if way == "poll-eager":
                os.environ["CUDA_MODULE_LOADING"] = "EAGER"
            signal.alarm(int(LIMIT))
            if torch.cuda._is_in_bad_fork():
                os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_stuck", way, "--here", "--out", str(given.out)])
            try:
                try_way(way, *WAYS[way], say)
            except Exception as error:
                say({"way": way, "failure": f"{type(error).__name__}: {error}"})
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            say({"way": way, "ended with": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
