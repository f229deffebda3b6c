"""Digests of a training state: a quick one to compare ranks, a strong one to compare runs."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.distributed.world import World
from gai_yolo.errors import HARDWARE, Ending, Stop

TIMES = ("seconds", "images_per_second")
"""Columns of the metrics rows that depend on the machine."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes as an element has."""


class RankDiffers(Stop):
    """A rank has another state than the others: broken hardware, or a bug."""

    exit_code = HARDWARE
    ending = Ending.HARDWARE


class DivergenceAlarm:
    """Compares the state of all ranks, so that no checkpoint is written of one that went wrong.

    Args:
        interval: steps between two comparisons.
    """

    def __init__(self, world: World, interval: int) -> None:
        self.world, self.interval = world, interval

    def after_step(self, state: TrainingState, saving: bool) -> None:
        """Compare every `interval` steps and before the state is saved; to be called on all ranks, with equal arguments.

        Raises:
            RankDiffers: on all ranks alike.
        """
        if saving or state.step % self.interval == 0:
            self.compare(state)

    def compare(self, state: TrainingState) -> None:
        """Compare now; as `after_step`."""
        if self.world.world_size == 1:
            return
        found = self.world.gather((quick_digest(state), socket.gethostname()))
        (usual, count), *others = Counter(digest for digest, _ in found).most_common()
        if not others:
            return
        if 2 * count > len(found):
            odd = [f"rank {rank} on {host}" for rank, (digest, host) in enumerate(found) if digest != usual]
            who = f"{', '.join(odd)} {'has' if len(odd) == 1 else 'have'} another state than the other {count} ranks"
        else:
            who = "the ranks do not agree: " + ", ".join(
                f"rank {rank} on {host} has {digest[:8]}" for rank, (digest, host) in enumerate(found)
            )
        raise RankDiffers(
            f"{who} after step {state.step} (memory or processor at fault, or a bug); nothing was saved since the last comparison that "
            "held: start again, without that machine if it happens again."
        )


@torch.no_grad()
def quick_digest(state: TrainingState) -> str:
    """A digest of everything that ranks must have in common: sums of the bits of each tensor as whole numbers, hashed. One
    wrong bit always shows."""
    tensors = [*state.model.state_dict().values(), *state.ema.model.state_dict().values()]
    for entry in state.optimizer.state.values():
        tensors += [value for value in entry.values() if isinstance(value, Tensor)]
    rest = {
        name: value for name, value in state.capture().items() if name not in ("model_state_dict", "ema_state_dict", "optimizer_state_dict")
    }
    rest["history"], rest["progress"] = _without_times(state.history), (state.progress.losses, state.progress.bad_steps)
    return hashlib.sha256(f"{_bit_sums(tensors)} {rest}".encode()).hexdigest()


@torch.no_grad()
def tensors_digest(content: Mapping[str, Any]) -> str:
    """The same, of the tensors of a checkpoint.

    Args:
        content: as `TrainingState.capture` gives it.
    """
    return hashlib.sha256(str(_bit_sums(list(_tensors(content)))).encode()).hexdigest()


def _bit_sums(tensors: Sequence[Tensor]) -> list[int]:
    if not tensors:
        return []
    device = tensors[0].device
    return torch.stack([t.detach().view(WORDS[t.element_size()]).sum(dtype=torch.int64).to(device) for t in tensors]).tolist()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All in nested data, in the order of their names."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def part_digests(content: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the parts of a checkpoint, times aside; equal in two runs if and only if the parts are, to the last bit.

    Args:
        content: as `TrainingState.capture` gives it.
    """
    model = content["model_state_dict"]
    statistics = {name: tensor for name, tensor in model.items() if "running_" in name or name.endswith("num_batches_tracked")}
    rest = ("epoch", "step", "samples", "ema_updates", "best_metric", "scaler_state_dict", "gradient_exponents", "bad_in_row")
    parts: dict[str, Any] = {
        "weights": {name: tensor for name, tensor in model.items() if name not in statistics},
        "batch_norm": statistics,
        "ema": content["ema_state_dict"],
        "optimizer": content["optimizer_state_dict"],
        "metrics": {
            "rows": _without_times(content["history"]),
            "epoch so far": {name: value for name, value in content["progress"].items() if name not in TIMES},
        },
        "position": {name: content[name] for name in rest},
    }
    digests = {}
    for part, value in parts.items():
        hasher = hashlib.sha256()
        for chunk in _encoded(value):
            hasher.update(chunk)
        digests[part] = hasher.hexdigest()
    return digests


def _without_times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _encoded(value: Any, name: str = "") -> Iterator[bytes]:
    """The names and values of nested data, tensors as type, shape and bytes in row-major order."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _encoded(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{name} {len(value)}\n".encode()
        for number, item in enumerate(value):
            yield from _encoded(item, f"{name}/{number}")
    else:
        yield f"{name} {json.dumps(value)}\n".encode()
