"""What the first start decides for the whole life of a run, and what is slower than it need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.config import Config
from gai_yolo.data.order import BatchPlan
from gai_yolo.distributed.world import World
from gai_yolo.machine import available_cores
from gai_yolo.sections import TrainingConfig
from gai_yolo.store.run_record import Settled
from gai_yolo.training.optimizer import choose_optimizer


@dataclass(frozen=True)
class Settlement:
    """What the first start decides for the whole life of a run."""

    config: Config
    """Without `auto` in what is settled."""
    values: dict[str, Settled]
    """By field of `training`: what was `auto`, for the run record."""
    notes: list[str]
    """What is settled anew, and why; for people."""


def settle(
    config: Config, found: LoadedCheckpoint | None, world: World, num_samples: int, known: Mapping[str, Settled] | None = None
) -> Settlement:
    """Fix the micro-batch size, the threads of a process and the kind of optimizer, if the configuration leaves them open.

    Later starts take what the checkpoint says, so that neither another machine nor more epochs change them; and before there is one, what
    the run record says (`known`), as long as nobody has changed the settings that it follows from.
    """
    training, known = config.training, known or {}
    recorded = found.content.get("config", {}).get("training", {}) if found else {}
    steps = math.ceil(num_samples / training.batch_size)
    steps = training.epochs * min(steps, training.max_batches_per_epoch or steps)
    most = max(world.world_size, config.elastic.max_world_size or 1)
    open_values: dict[str, tuple[Callable[[], int | str], dict[str, Any]]] = {
        "micro_batch_size": (
            lambda: math.ceil(training.batch_size / most),
            {"training.batch_size": training.batch_size, "elastic.max_world_size": config.elastic.max_world_size},
        ),
        "threads": (lambda: world.threads, {}),
        "optimizer": (lambda: choose_optimizer(training, steps), {"the number of steps": steps}),
    }
    settled, notes = {}, []
    for name, (decide, basis) in open_values.items():
        if getattr(training, name) != "auto":
            continue
        before = known.get(name)
        if recorded.get(name):
            value = recorded[name]
        elif before is not None and before.basis == basis:
            value = before.value
        else:
            value = decide()
            if before is not None and before.value != value:
                changed = ", ".join(key for key in basis if basis[key] != before.basis.get(key))
                notes.append(f"training.{name} is settled anew, {value} in place of {before.value}: {changed} has changed since")
        settled[name] = Settled(value, basis)
    values = {name: one.value for name, one in settled.items()}
    return Settlement(config.model_copy(update={"training": training.model_copy(update=values)}), settled, notes)


def advice(training: TrainingConfig, plan: BatchPlan, world: World) -> list[str]:
    """What is slower than it need be under a settled configuration; one sentence each."""
    assert training.threads != "auto"
    lines = []
    num_micro_batches, samples = plan.step_size(0)
    idle = world.world_size - num_micro_batches
    if idle > 0:
        line = (
            f"{idle} of {world.world_size} processes have nothing to do: a batch of {samples} is cut into {num_micro_batches} micro-batches"
        )
        if samples > num_micro_batches:
            line += (
                f" of {plan.micro_batch_size}, and stays so for the life of the run; start a run that is to grow with "
                f"training.micro_batch_size={max(1, samples // world.world_size)}, or auto and elastic.max_world_size={world.world_size}"
            )
        lines.append(line)
    elif num_micro_batches % world.world_size:
        lines.append(
            f"{num_micro_batches} micro-batches do not share out evenly among {world.world_size} processes; a divisor of "
            f"{num_micro_batches} would leave none waiting"
        )
    wanted, cores = world.local_world_size * training.threads, available_cores()
    if world.device.type == "cpu" and wanted > cores and training.threads > 1:
        lines.append(
            f"{world.local_world_size} processes of {training.threads} threads share {cores} cores, which is slow; the run's threads stay "
            "(their number shows in the bits): start a run that is to grow with training.threads=1"
        )
    return lines


def launcher_advice(world: World, environment: Mapping[str, str]) -> list[str]:
    """What plain torchrun was not told, and a job that is to survive needs; one sentence each."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return []
    lines = []
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        lines.append("torchrun will not start this job again after a fault: give it --max-restarts=100, or use gai-yolo launch")
    if world.world_size > world.local_world_size and environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        lines.append(
            "with several nodes, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for every torchrun (gai-yolo launch does): otherwise no node can "
            "join later, and the loss of the first one ends the job"
        )
    return lines
