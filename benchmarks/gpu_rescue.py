"""Which part of a rescue is blocked by a stuck stream, in a real step: `python -m benchmarks.gpu_rescue WAY ...`.

The step hangs at its sums, as one whose peer is gone does; another thread then does what `save_now` does, part by part. `as-it-was`
(until d0178fd, as far as what was mended lets it): the state's tensors go to `torch.save` straight from the GPU, on a stream made then.
`buffer`: on a stream made before, into a pinned buffer made before, and are saved from there. `host`: so, and BatchNorm's counters are made
in the host's memory. What takes long is told with the stacks, once with native frames where py-spy is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import Check, build_run, make_batches, take_step, take_steps
from benchmarks.gpu_kernels import FEW_BOXES, SMALL, stuck_for
from gai_yolo.checkpointing.capture import StateBuffer, open_state
from gai_yolo.training.loop import TrainingParts

STUCK_SECONDS = 4.0


class Rescuer:
    """Does the parts, and says what each has taken."""

    def __init__(self, run: TrainingParts, on_gpu: bool) -> None:
        self.run, self.on_gpu = run, on_gpu
        self.stream: Any = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
        self.buffer = StateBuffer(run.state.expected_bytes(), pinned=on_gpu)
        self.started = 0.0
        self.way = ""
        self.content: dict[str, Any] = {}

    def part(self, name: str, action: Callable[[], object]) -> None:
        """One of them."""
        began = time.monotonic()
        faulthandler.dump_traceback_later(1.0, file=sys.stderr)
        failure = ""
        try:
            action()
        except Exception as error:
            failure = f"; {type(error).__name__}: {str(error)[:300]}"
        faulthandler.cancel_dump_traceback_later()
        ended = time.monotonic()
        late = ", BLOCKED until the stream was free" if ended - self.started > STUCK_SECONDS - 0.1 else ""
        print(f"{self.way}: {name}: {1e3 * (ended - began):.1f} ms{late}{failure}", flush=True)

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """The own one."""
        return torch.cuda.stream(self.stream) if self.on_gpu else contextlib.nullcontext()

    def rescue(self) -> None:
        """All parts."""
        time.sleep(0.5)
        state = self.run.state
        if self.on_gpu:
            self.part("set_device", lambda: torch.cuda.set_device(0))
        self.part("the state's lock", lambda: state.changing.acquire(timeout=2.0))
        if self.way == "as-it-was" and self.on_gpu:
            self.part("a stream", self.make_stream)
        with self.on_stream():
            self.part("capture", self.capture)
            self.part("before_step", self.before_step)
            if self.way == "as-it-was":
                self.part("the first storage", lambda: next(iter(self.content["model_state_dict"].values())).untyped_storage().cpu())
                self.part("torch.save", lambda: torch.save(self.content, io.BytesIO()))
            else:
                self.part("copies queued", lambda: self.buffer.fill(self.content))
                self.part("copies done", self.wait)
                self.part("torch.save from the buffer", self.save)
        self.part("release", state.changing.release)
        self.part("save_now", lambda: print(self.run.saver.save_now()))

    def make_stream(self) -> None:
        """As the rescue did until d0178fd."""
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self) -> None:
        """The live tensors."""
        self.content = self.run.state.capture()

    def before_step(self) -> None:
        """As `TrainingStep.boundary`."""
        statistics, step, weights = self.run.step.statistics, self.run.state.step, self.content["model_state_dict"]
        if self.way == "host":
            counters = {name: torch.tensor(step) for name in statistics._counters}
            start = dict(zip(statistics._names, statistics._start, strict=True))
            self.content["model_state_dict"] = {**weights, **start, **counters}
        else:
            self.content["model_state_dict"] = statistics.before_step(weights, step)

    def wait(self) -> None:
        """For the copies."""
        while not self.buffer.ready():
            time.sleep(0.001)

    def save(self) -> None:
        """From the host's memory."""
        file = io.BytesIO()
        torch.save(open_state(self.buffer.descriptor, self.buffer.content), file)
        print(f"{self.way}: {len(file.getvalue()) / 1e6:.1f} MB")


def look_from_outside(way: str) -> None:
    """Native stacks of this process, after 2 s."""
    if spy := shutil.which("py-spy"):
        command = f"sleep 2.2; echo '===== py-spy, {way}'; {spy} dump --native --pid {os.getpid()}"
        subprocess.Popen(["sh", "-c", command], stdout=sys.stderr, stderr=sys.stderr)


def main() -> None:
    """A run, a few steps, and for each way one that hangs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", choices=("as-it-was", "buffer", "host"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    check = Check("traced-rescue", given.work, given.device, True)
    given.work.mkdir(parents=True, exist_ok=True)
    run = build_run(check, "run", (*SMALL, "training.amp=bf16", "snapshots.interval_seconds=null"))
    batches = make_batches(run, FEW_BOXES, pinned=check.on_gpu)
    rescuer = Rescuer(run, check.on_gpu)
    stuck, summed = stuck_for(check, STUCK_SECONDS), run.step.world.sum
    take_steps(run, batches, 3)

    def sum_and_hang(tensor: Tensor) -> Tensor:
        stuck()
        return summed(tensor)

    for way in given.ways:
        rescuer.way = way
        vars(run.step.world)["sum"] = sum_and_hang
        thread = threading.Thread(target=rescuer.rescue)
        look_from_outside(way)
        rescuer.started = time.monotonic()
        thread.start()
        take_step(run, batches)
        print(f"{way}: the step took {time.monotonic() - rescuer.started:.2f} s", flush=True)
        thread.join()
        vars(run.step.world)["sum"] = summed
        take_steps(run, batches, 1)
    run.context.folder.release()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
