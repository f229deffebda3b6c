"""Checks of `benchmarks/gpu.py` that measure, each alone on the machine: `python -m benchmarks.gpu_speed NAME --work FOLDER`."""

from __future__ import annotations

import gc
import mmap
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_check import (
    Check,
    be_one_of,
    build_run,
    make_batches,
    synchronise,
    take_steps,
)
from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.checkpointing.digest import part_digests, quick_digest
from gai_yolo.checkpointing.recovery import newest
from gai_yolo.checkpointing.tier import DiskTier
from gai_yolo.distributed.world import fix_arithmetic
from gai_yolo.training.loop import TrainingParts

BOXES = 8
KINDS = ("exact", "plain", "plain, tuned")
"""With deterministic kernels and exact sums; without both; and with cuDNN's choice by stop-watch."""


def set_arithmetic(kind: str) -> None:
    """Which kernels PyTorch may take."""
    if kind == "exact":
        fix_arithmetic()
        return
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = kind == "plain, tuned"


def throughput(check: Check) -> None:
    """Images a second of steps over batches in memory, exact and plain in turn."""
    rows = (
        ("n", 64, 64, "bf16", True),
        ("n", 64, 16, "bf16", True),
        ("n", 64, 64, "none", True),
        ("n", 64, 64, "bf16", False),
        ("x", 16, 16, "bf16", True),
    )
    for size, batch, micro, amp, channels_last in rows[: 1 if check.quick else None]:
        side, batch, micro = (64, 4, 4) if check.quick else (640, batch, micro)
        label = f"{size} {side} px, {amp}, batch {batch} in {micro}, {'channels_last' if channels_last else 'contiguous'}"
        check.say(label, compare(check, size, side, batch, micro, amp, channels_last))


def compare(check: Check, size: str, side: int, batch: int, micro: int, amp: str, channels_last: bool) -> dict[str, Any]:
    """Images a second by kind, medians of interleaved windows of two steps; and the ratio of exact to the faster plain one."""
    common = (
        *(f"model.size={size}", f"data.image_size={side}", f"training.batch_size={batch}", f"training.micro_batch_size={micro}"),
        *(f"training.amp={amp}", f"training.channels_last={channels_last}"),
    )
    name = "-".join((size, str(micro), amp, str(channels_last)))
    runs = {kind: build_run(check, f"{name}-{kind[:5]}", (*common, f"training.exact={kind == 'exact'}")) for kind in KINDS[:2]}
    batches = make_batches(runs["exact"], BOXES, pinned=check.on_gpu)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(-1, 4):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            set_arithmetic(kind)
            taken = take_steps(runs["exact" if kind == "exact" else "plain"], batches, 2) / 2
            if number >= 0:  # before, kernels and memory settle
                seconds[kind].append(taken)
    set_arithmetic("exact")
    for run in runs.values():
        run.context.folder.release()
    found: dict[str, Any] = {kind: round(batch / statistics.median(values), 1) for kind, values in seconds.items()}
    found["spread of exact"] = [round(batch / value, 1) for value in (max(seconds["exact"]), min(seconds["exact"]))]
    found["exact / plain"] = round(found["exact"] / found["plain"], 3)
    if check.on_gpu:
        found["peak GiB of both"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        del runs, batches
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def busy(check: Check) -> None:
    """The share of a step's time in which the GPU computes, and on what."""
    from torch.profiler import ProfilerActivity, profile

    for micro in (64, 16) if not check.quick else (4,):
        side, batch = (64, 4) if check.quick else (640, 64)
        settings = (f"data.image_size={side}", f"training.batch_size={batch}", f"training.micro_batch_size={micro}", "training.amp=bf16")
        run = build_run(check, f"micro-{micro}", settings)
        batches = make_batches(run, BOXES, pinned=check.on_gpu)
        take_steps(run, batches, 3)
        unwatched = min(take_steps(run, batches, 1) for _ in range(3))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_gpu else [])]
        with profile(activities=activities) as profiler:
            take_steps(run, batches, 1)
        kernels = [
            event for event in profiler.events() or [] if event.device_type.name == "CUDA" and "#" not in event.name
        ]  # no annotations
        computed = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        by_name: Counter[str] = Counter()
        for event in kernels:
            by_name[event.name[:100]] += event.time_range.elapsed_us()
        label = f"micro-batches of {micro}"
        check.say(f"{label}: step", unwatched)
        check.say(f"{label}: kernels", len(kernels))
        check.say(f"{label}: seconds of kernels", computed)
        check.say(f"{label}: share of the step", computed / unwatched)
        check.say(f"{label}: most of it, in ms", {name: round(us / 1e3, 2) for name, us in by_name.most_common(12)})
        host = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)[:12]
        check.say(f"{label}: host, in ms and calls", {one.key: [round(one.self_cpu_time_total / 1e3, 2), one.count] for one in host})
        run.context.folder.release()


def stall(check: Check, size: str) -> None:
    """How long training stands still for a snapshot, from pinned memory and from pageable, and whether it holds what it should."""
    settings = ("data.image_size=320", "training.batch_size=8", "training.micro_batch_size=8", "training.amp=bf16", f"model.size={size}")
    run = build_run(check, "run", settings if not check.quick else (*settings, "data.image_size=64"))
    batches = make_batches(run, BOXES, pinned=check.on_gpu)
    take_steps(run, batches, 3)
    check.say("a step", take_steps(run, batches, 3) / 3)
    check.say("MB of a state", run.state.expected_bytes() / 1e6)
    for pinned in (True, False) if check.on_gpu else (False,):
        fill_buffer(check, run, pinned)
    actions: dict[str, Callable[[], object]] = {
        "capture": run.state.capture,
        "digest of the ranks' comparison": lambda: quick_digest(run.state),
        "EMA": lambda: run.state.ema.update(run.state.model),
    }
    for name, action in actions.items():
        action()
        check.say(f"{name}: seconds of the host, of all", timed(run, action))
    snapshots = run.saver.tiers[0]
    assert isinstance(snapshots, DiskTier)
    digest = part_digests(run.state.capture())
    started = time.perf_counter()
    run.saver.is_due(run.state.step, at_once=True)
    run.saver.after_step(agreed=True)
    check.say("a snapshot in training: the host stands still for", time.perf_counter() - started)
    take_steps(run, batches, 3)
    check.say("three steps with it", time.perf_counter() - started)
    check.expect(snapshots.writer.drain(60.0), "the snapshot was not complete within a minute")
    check.say("complete after", snapshots.write_seconds)
    found, passed_over = newest(run.context.folder.store)
    check.expect(not passed_over, "; ".join(passed_over))
    same = found is not None and part_digests(found.content) == digest
    check.expect(same, "the snapshot does not hold the state at which it was taken")
    check.say("holds the state at which it was taken", same)
    run.saver.close(10.0)
    if check.on_gpu:
        refuse_to_pin(check)


def fill_buffer(check: Check, run: TrainingParts, pinned: bool) -> None:
    """Time making a buffer, and copying a state into it."""
    label = "pinned" if pinned else "pageable"
    started = time.perf_counter()
    buffer = StateBuffer(run.state.expected_bytes(), pinned)
    check.say(f"{label} buffer: making it", time.perf_counter() - started)
    check.expect(buffer.pinned == pinned, "the buffer could not be pinned")

    def fill() -> None:
        buffer.fill(run.state.capture())

    fill()
    check.say(f"{label} buffer: seconds of the host, of all", timed(run, fill))
    buffer.close()


def timed(run: TrainingParts, action: Callable[[], object]) -> list[float]:
    """Medians over five times: seconds until it returns, and until the GPU has done it."""
    rows = []
    for _ in range(5):
        synchronise(run)
        started = time.perf_counter()
        action()
        returned = time.perf_counter() - started
        synchronise(run)
        rows.append((returned, time.perf_counter() - started))
    return [round(statistics.median(column), 5) for column in zip(*rows, strict=True)]


def refuse_to_pin(check: Check) -> None:
    """Whether memory that cannot be pinned breaks what the GPU does next."""
    memory = mmap.mmap(-1, 1 << 20)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    codes = [int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)) for _ in range(2)]  # type: ignore[no-untyped-call]
    check.say("codes of pinning the same memory twice", codes)
    try:
        total = float((torch.ones(1000, device="cuda") * 2).sum())
        check.expect(total == 2000, "after a refused pinning the GPU adds up wrongly")
        check.say("the next kernel after a refused pinning", "runs")
    except RuntimeError as error:
        check.expect(False, f"after a refused pinning the next kernel raises: {str(error).splitlines()[0]}")


def loader(check: Check) -> None:
    """Images a second that loader processes bring, with mosaic, at 640 px."""
    rows = [(2, "none"), (0, "none"), (4, "none"), (8, "none"), (12, "none"), (8, "ram")]
    for workers, cache in rows[: 1 if check.quick else None]:
        settings = (f"data.workers={workers}", f"data.cache={cache}", "training.batch_size=16", "training.micro_batch_size=16")
        run = build_run(check, f"{workers}-{cache}", (*settings, f"data.image_size={64 if check.quick else 640}"))
        started = time.perf_counter()
        first, images, began = 0.0, 0, 0.0
        for epoch in range(1, 100):
            for batches in run.loader.epoch(epoch):
                now = time.perf_counter()
                if not first:
                    first, began = now - started, now
                else:
                    images += sum(len(batch.images) for batch in batches)
                if now - began > 4.0:
                    break
            else:
                continue
            break
        seconds = time.perf_counter() - began
        check.say(f"{workers} workers, cache {cache}: images/s, seconds to the first batch", [round(images / seconds, 1), round(first, 2)])
        run.context.folder.release()


CHECKS = {"throughput": throughput, "busy": busy, "stall": stall, "loader": loader}


if __name__ == "__main__":
    be_one_of(CHECKS, __doc__)
