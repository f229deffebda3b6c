"""Whether, where and how a run goes on."""

from __future__ import annotations

from typing import Any

from gai_yolo.config import Config, changed_keys, value_at
from gai_yolo.data.index import Index
from gai_yolo.errors import CheckpointError
from gai_yolo.training.snapshots import Found
from gai_yolo.training.state import TrainingState


def settle(config: Config, found: Found | None, world_size: int) -> Config:
    """Fix what the first start decides for the whole life of a run: the micro-batch size."""
    if config.training.micro_batch_size != "auto":
        return config
    recorded = value_at(found.content.get("config", {}), "training.micro_batch_size") if found else None
    size = recorded or -(-config.training.batch_size // world_size)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": size})})


def identity_of(config: Config, index: Index) -> dict[str, Any]:
    """What a checkpoint says about its run, beside the state: settled configuration, classes and digest of the training set."""
    return {"config": config.dump(), "class_names": index.class_names, "data_digest": index.digest()}


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
        reasons.append(f"data.path {value_at(new, 'data.path')} holds other training images or boxes than before")
    if reasons:
        raise CheckpointError(
            f"{found.path}: cannot go on from it: {'; '.join(reasons)}. Set this back, choose another experiment.name, "
            "or start over with --fresh (the old run is kept)."
        )
    notes = [f"going on from {found.path} (epoch {found.content['epoch']}, step {found.content['step']})"]
    return notes + [f"changed since: {key} is {value_at(new, key)!r}, was {value_at(old, key)!r}" for key in harmless]


def finished_line(state: TrainingState, epochs: int) -> str:
    """What a finished run says."""
    best = "" if state.best_metric is None else f", best mAP50-95 {state.best_metric:.4f}"
    return f"finished: {state.epoch} of {epochs} epochs{best}; raise training.epochs to go on, --fresh starts over"
