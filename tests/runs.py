"""Reading what a run has left behind."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of training_metrics.json."""
    rows: list[dict[str, Any]] = json.loads((run_folder / "checkpoints" / "training_metrics.json").read_text())
    return rows


def account(run_folder: Path) -> dict[str, Any]:
    """Of where the time went: goodput.json."""
    found: dict[str, Any] = json.loads((run_folder / "goodput.json").read_text())
    return found


def state_digest(checkpoint: Path) -> str:
    """SHA-256 over weights, EMA and optimizer state of a checkpoint."""
    content = torch.load(checkpoint, weights_only=True)
    hasher = hashlib.sha256()
    for part in ("model_state_dict", "ema_state_dict"):
        for name, tensor in sorted(content[part].items()):
            hasher.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for number, values in sorted(content["optimizer_state_dict"]["state"].items()):
        for name, value in sorted(values.items()):
            hasher.update(f"{number} {name}".encode() + torch.as_tensor(value).contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _events(run_folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(run_folder: Path, tag: str) -> list[float]:
    """Values of a scalar tag in the order of steps."""
    return [event.value for event in _events(run_folder).Scalars(tag)]


def scalar_steps(run_folder: Path) -> dict[str, list[int]]:
    """Steps of every scalar tag, as TensorBoard itself reads them."""
    accumulator = _events(run_folder)
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def image_tags(run_folder: Path) -> list[str]:
    """Of every picture, as TensorBoard itself reads them."""
    return list(_events(run_folder).Tags()["images"])


def ledger(run_folder: Path) -> dict[int, dict[int, list[list[int]]]]:
    """Epoch -> step -> micro-batches of image ids, all ranks' spans put together in rank order."""
    found: dict[int, dict[int, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((run_folder / "ledger").glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[row["epoch"]][row["step"]] += row["micro_batches"]
    return {epoch: dict(steps) for epoch, steps in found.items()}
