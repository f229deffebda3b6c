"""Whether a run may go on from a checkpoint, under another configuration or with other data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.config import Config, changed_keys, trajectory_settings, value_at
from gai_yolo.data.index import Index
from gai_yolo.errors import CheckpointError


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


def settings_of(identity: dict[str, Any]) -> dict[str, Any]:
    """What the weights follow from, of the identity in a checkpoint: settled configuration, classes, digest of the data."""
    return {**trajectory_settings(identity["config"]), "classes": identity.get("class_names"), "data": identity.get("data_digest")}


def judges_anew(found: LoadedCheckpoint, identity: Mapping[str, Any]) -> bool:
    """Whether the validation set is another one than that of a checkpoint: then what was best on the old one says nothing of it."""
    now: str = identity["val_digest"]
    return bool(found.content.get("val_digest", now) != now)


def check_continuation(found: LoadedCheckpoint, identity: dict[str, Any]) -> list[str]:
    """Whether a run may go on from a checkpoint under the configuration and data of this start. Returns lines that tell where it goes on
    and which harmless settings have changed.

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
