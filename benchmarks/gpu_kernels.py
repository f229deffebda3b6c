"""Checks of `benchmarks/gpu.py` within one process: determinism, synchronisations, NCCL, a stuck GPU.

`python -m benchmarks.gpu_kernels NAME --work FOLDER`; what each does is in its docstring.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from benchmarks.gpu_check import (
    STALL_SECONDS,
    Check,
    be_one_of,
    build_run,
    digest_of,
    make_batches,
    synchronise,
    take_step,
    take_steps,
)
from gai_yolo.checkpointing.digest import part_digests
from gai_yolo.data.shapes import NUM_IMAGES, ensure_shapes
from gai_yolo.distributed.world import World
from gai_yolo.errors import Ending
from gai_yolo.goodput.record import Phase
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.loop import TrainingParts
from gai_yolo.training.optimizer import set_rates
from gai_yolo.training.step import TrainingStep

SMALL = ("data.image_size=256", "training.batch_size=8", "training.micro_batch_size=4")
NO_BOXES, FEW_BOXES, MANY_BOXES = 0, 6, 100


def environment(check: Check) -> None:
    """Note the machine; draw the data set for the others; one step at all."""
    check.say("python", platform.python_version())
    check.say("torch", torch.__version__)
    check.say("torchvision", torchvision.__version__)
    if check.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        check.say(
            "gpu", f"{properties.name}, {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
        check.say("cuda, cudnn, nccl", [torch.version.cuda, torch.backends.cudnn.version(), list(torch.cuda.nccl.version())])  # type: ignore[no-untyped-call]
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        check.say("driver", driver.stdout.strip())
    check.say("cores", len(os.sched_getaffinity(0)))
    ensure_shapes(check.cache)
    run = build_run(check, "run", SMALL)
    take_steps(run, make_batches(run, FEW_BOXES), 1)
    check.say("digest of one step", digest_of(run))


def operations(check: Check, turn: str) -> None:
    """Digests after three steps under deterministic mode, in every number and memory format, with no and with many boxes; and of an
    evaluation. `turn` only tells the processes apart whose digests are compared."""
    check.say("turn", turn)
    for amp in ("none", "bf16", "fp16") if check.on_gpu else ("none", "bf16"):
        for channels_last in (True, False):
            settings = (*SMALL, f"training.amp={amp}", f"training.channels_last={channels_last}")
            for boxes in (NO_BOXES, MANY_BOXES):
                label = f"n {amp} {'channels_last' if channels_last else 'contiguous'} {boxes} boxes"
                one_kind(check, label, settings, boxes, evaluate=boxes == MANY_BOXES)
            if check.quick:
                break
    if not check.quick:
        one_kind(check, "x bf16 channels_last 100 boxes", (*SMALL, "training.amp=bf16", "model.size=x"), MANY_BOXES, evaluate=False)
        one_kind(check, "n bf16 sgd, cosine", (*SMALL, "training.amp=bf16", "training.optimizer=sgd"), FEW_BOXES, evaluate=False)


def one_kind(check: Check, label: str, settings: tuple[str, ...], boxes: int, evaluate: bool) -> None:
    """Three steps, and an evaluation; an operation without a deterministic kernel is named."""
    run = build_run(check, label.replace(" ", "_").replace(",", ""), settings)
    batches = make_batches(run, boxes)
    try:
        first = take_steps(run, batches, 1)
        seconds = take_steps(run, batches, 2) / 2
        found = [digest_of(run)]
        if evaluate:
            evaluation = run.evaluate(run.state.ema.model)
            found.append(hashlib.sha256(json.dumps([evaluation.losses, evaluation.metrics.stats]).encode()).hexdigest()[:16])
        check.say(label, {"digests": found, "first step": round(first, 3), "step": round(seconds, 4)})
    except RuntimeError as error:
        check.expect(False, f"{label}: {str(error).strip().splitlines()[0]}")
        check.say(f"{label}: without deterministic kernel", without_deterministic_kernel(run, batches, evaluate))
    finally:
        run.context.folder.release()


def without_deterministic_kernel(run: TrainingParts, batches: list[Any], evaluate: bool) -> list[str]:
    """All operations of a step that have none, as PyTorch says."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        with contextlib.suppress(RuntimeError):
            take_steps(run, batches, 1)
            if evaluate:
                run.evaluate(run.state.ema.model)
        torch.use_deterministic_algorithms(True)
    return sorted({str(one.message).split(".")[0] for one in told if "determin" in str(one.message)})


def synchronisations(check: Check) -> None:
    """How often the host waits for the GPU in one step, and where."""
    for label, settings in {
        "exact, 1 micro-batch": ("training.batch_size=4", "training.micro_batch_size=4"),
        "exact, 3 micro-batches": ("training.batch_size=12", "training.micro_batch_size=4"),
        "plain, 1 micro-batch": ("training.batch_size=4", "training.micro_batch_size=4", "training.exact=false"),
        "exact fp16, 1 micro-batch": ("training.batch_size=4", "training.micro_batch_size=4", "training.amp=fp16"),
    }.items():
        if "fp16" in label and not check.on_gpu:
            continue
        run = build_run(check, label.replace(" ", "_").replace(",", ""), ("data.image_size=256", "training.amp=bf16", *settings))
        batches = make_batches(run, FEW_BOXES, pinned=check.on_gpu)
        take_steps(run, batches, 3)
        places = waits_of(lambda run=run, batches=batches: take_step(run, batches), check.on_gpu)
        check.say(f"{label}: synchronisations", sum(places.values()))
        check.say(f"{label}: places", dict(places.most_common()))
        if label == "exact, 1 micro-batch":
            places = waits_of(lambda run=run: run.evaluate(run.state.ema.model), check.on_gpu)
            check.say("evaluation: synchronisations an image", sum(places.values()) / NUM_IMAGES["val"])
        run.context.folder.release()


def waits_of(action: Any, on_gpu: bool) -> Counter[str]:
    """Places in the program at which PyTorch says that it waits for the GPU, and how often."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        action()
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in told if "synchroniz" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in waits)


def hook(check: Check) -> None:
    """Under torchrun with one process: steps through DDP's hook and NCCL give the bits of steps without; what waits for NCCL, waits."""
    world = World("cuda" if check.on_gpu else "cpu", 1)
    settings = (*SMALL, "training.amp=bf16")
    for label, more in {"2 micro-batches": (), "1 micro-batch": ("training.micro_batch_size=8",)}.items():
        digests = {}
        for kind in ("alone", "through the hook"):
            world.world_size = 1
            run = build_run(check, f"{kind} {label}".replace(" ", "_"), (*settings, *more), world)
            step = run.step
            if kind != "alone":
                world.world_size = 2  # there is one; but so everything goes the way of many
                step = TrainingStep(run.state, run.step.loss, run.step.schedule, world, run.step.config)
            batches = make_batches(run, FEW_BOXES)
            synchronise(run)
            started = time.perf_counter()
            for _ in range(4):
                step(batches, len(batches), 8, run.input_size.image_size)
            synchronise(run)
            check.say(f"{label}, {kind}: seconds of 4 steps", time.perf_counter() - started)
            digests[kind] = digest_of(run)
            world.world_size = 1
            run.context.folder.release()
        check.say(f"{label}: digests", digests)
        check.expect(len(set(digests.values())) == 1, f"{label}: through the hook the state is another one: {digests}")
    world.world_size = 2
    check.expect(world.broadcast_bytes(b"some bytes", 0) == b"some bytes", "bytes are broadcast wrongly")
    if check.on_gpu:
        stuck = stuck_for(check, 2.0)
        started = time.perf_counter()
        stuck()
        check.expect(world.wait_for_all(), "wait_for_all says that somebody is lost")
        waited = time.perf_counter() - started
        check.say("wait_for_all behind 2 s of work: seconds", waited)
        check.expect(waited > 1.0, "wait_for_all waits for nothing: it returned before the GPU had done what was queued")
        torch.cuda.synchronize()
    world.world_size = 1
    world.close()


def stuck_for(check: Check, seconds: float) -> Any:
    """What keeps the GPU's current stream busy for so long, as a collective does whose peer is gone; on a CPU it keeps the caller."""
    if not check.on_gpu:
        return lambda: time.sleep(seconds)
    spin: Any = torch.cuda._sleep
    cycles = cycles_of(seconds)
    return lambda: spin(cycles)


def cycles_of(seconds: float) -> int:
    """For how many of its cycles the GPU has to spin."""
    spin: Any = torch.cuda._sleep
    cycles, taken = 200_000_000, 1.0
    for _ in range(2):  # the first one loads the kernel
        torch.cuda.synchronize()
        started = time.perf_counter()
        spin(cycles)
        torch.cuda.synchronize()
        taken = time.perf_counter() - started
    return int(cycles / taken * seconds)


def rescue(check: Check, where: str) -> None:
    """A step hangs because the GPU's stream is stuck: the watchdog saves the last whole step's state and ends the process.

    Args:
        where: `within` the step, at its sums; `before` it, when nothing of it was executed; or `behind`: within, and the rescue's copies
            are queued behind what is stuck, as on a wrong stream.
    """
    run = build_run(check, "run", (*SMALL, "training.amp=bf16", "snapshots.interval_seconds=null"))
    batches = make_batches(run, FEW_BOXES, pinned=check.on_gpu)
    stuck = stuck_for(check, STALL_SECONDS)
    started = 0.0

    def farewell(ending: Ending, reason: str, _: bool) -> None:
        check.say("farewell", [ending.exit_code, reason])
        check.say("seconds from the stall to the farewell", time.monotonic() - started)

    watchdog = Watchdog(run.context.notices, Limits(step=2.0), farewell)
    watchdog.rescue = run.saver.save_now
    watchdog.enter(Phase.STEP)
    for _ in range(4):
        take_steps(run, batches, 1)
        watchdog.step_done()
    set_rates(run.state.optimizer, run.step.schedule, run.state.step)  # as the step does first, so that only what matters can differ
    check.say("expected", part_digests(run.state.capture()))
    synchronise(run)
    if where == "behind":
        vars(run.saver)["_stream"] = None
    if where != "before":
        world, summed = run.step.world, run.step.world.sum

        def sum_and_hang(tensor: Tensor) -> Tensor:
            stuck()
            return summed(tensor)

        vars(world)["sum"] = sum_and_hang
    started = time.monotonic()
    watchdog.step_done()
    watchdog.start()
    beats = threading.Thread(target=beat, args=(check, started), daemon=True)
    beats.start()
    if where == "before":
        stuck()
    take_step(run, batches)
    check.say("the step ended after", time.monotonic() - started)


def beat(check: Check, started: float) -> None:
    """Note how long other threads of this process did not get to run: while somebody holds the interpreter's lock."""
    longest, before = 0.0, time.monotonic()
    while True:
        time.sleep(0.02)
        now = time.monotonic()
        if now - before > longest + 0.1:
            longest = now - before
            check.say("longest pause of other threads", [round(longest, 2), f"at {now - started:.1f} s"])
        before = now


CHECKS = {"environment": environment, "operations": operations, "synchronisations": synchronisations, "hook": hook, "rescue": rescue}


if __name__ == "__main__":
    be_one_of(CHECKS, __doc__)
