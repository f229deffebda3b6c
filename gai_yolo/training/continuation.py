"""Whether, where and how a run goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gai_yolo.config import Config, changed_keys, value_at
from gai_yolo.data.index import Index
from gai_yolo.data.order import Plan
from gai_yolo.elastic.process import World
from gai_yolo.errors import CheckpointError
from gai_yolo.machine import available_cores
from gai_yolo.store.run_record import Settled
from gai_yolo.training.optim import choose_optimizer
from gai_yolo.training.snapshots import Found
from gai_yolo.training.state import TrainingState


@dataclass(frozen=True)
class Settlement:
    """What the first start decides for the whole life of a run."""

    config: Config
    """Without `auto` in what is settled."""
    values: dict[str, Settled]
    """By field of `training`: what was `auto`, for the run record."""
    notes: list[str]
    """What is settled anew, and why; for people."""


def settle(config: Config, found: Found | None, world: World, num_samples: int, known: Mapping[str, Settled] | None = None) -> Settlement:
    """Fix the micro-batch size, the threads of a process and the kind of optimizer, if the configuration leaves them open.

    Later starts take what the checkpoint says, so that neither another machine nor more epochs change them; and before there is one, what
    the run record says, as long as nobody has changed the settings that it follows from.

    Args:
        known: of the run record.
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


def identity_of(config: Config, indexes: tuple[Index, Index]) -> dict[str, Any]:
    """What a checkpoint says about its run, beside the state: settled configuration, classes, and digests of the training set, of its
    images, and of the validation set with its images."""
    train, val = indexes
    return {
        "config": config.dump(),
        "class_names": train.class_names,
        "data_digest": train.digest(),
        "data_content": train.content,
        "val_digest": hashlib.sha256(f"{val.digest()} {val.content}".encode()).hexdigest(),
    }


def judges_anew(found: Found, identity: Mapping[str, Any]) -> bool:
    """Whether the validation set is another one than that of a checkpoint: then what was best on the old one says nothing of it."""
    now: str = identity["val_digest"]
    return bool(found.content.get("val_digest", now) != now)


def check_continuation(found: Found, identity: dict[str, Any]) -> list[str]:
    """Whether a run may go on from a checkpoint under this configuration and data.

    Args:
        identity: of this start.

    Returns:
        Lines that tell where it goes on and which harmless settings have changed.

    Raises:
        CheckpointError: going on would be wrong; names the keys.
    """
    old, new = found.content.get("config", {}), identity["config"]
    wrong, harmless = changed_keys(old, new)
    reasons = [f"{key} is {value_at(new, key)!r}, was {value_at(old, key)!r}" for key in wrong]
    if found.content.get("class_names") != identity["class_names"]:
        was, now = found.content.get("class_names") or [], identity["class_names"]
        reasons.append(f"data.path has {len(now)} classes ({', '.join(now[:5])}), was {len(was)} ({', '.join(was[:5])})")
    elif found.content.get("data_digest") != identity["data_digest"]:
        reasons.append(
            f"data.path {value_at(new, 'data.path')} holds other training images or boxes than before (names, sizes in pixels, labels)"
        )
    elif found.content.get("data_content", identity["data_content"]) != identity["data_content"]:
        reasons.append(
            f"data.path {value_at(new, 'data.path')} holds other training images than before under the same names (bytes of the files)"
        )
    if reasons:
        raise CheckpointError(
            f"{found.path}: cannot go on from it: {'; '.join(reasons)}. Set this back, choose another experiment.name, "
            "or start over with --fresh (the old run is kept)."
        )
    notes = [f"going on from {found.path} (epoch {found.content['epoch']}, step {found.content['step']})"]
    if judges_anew(found, identity):
        notes.append("changed since: the validation set; the best epoch is chosen anew, among those that were evaluated on this one")
    if "val_digest" not in found.content:
        notes.append("what the images and the validation set hold was not recorded by the version that wrote it; it is from now on")
    return notes + [f"changed since: {key} is {value_at(new, key)!r}, was {value_at(old, key)!r}" for key in harmless]


def advice(config: Config, plan: Plan, world: World) -> list[str]:
    """What is slower than it need be under a settled configuration; one sentence each."""
    training = config.training
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


def finished_line(state: TrainingState, epochs: int) -> str:
    """What a finished run says."""
    best = "" if state.best_metric is None else f", best mAP50-95 {state.best_metric:.4f}"
    return f"finished: {state.epoch} of {epochs} epochs{best}; raise training.epochs to go on, --fresh starts over"
