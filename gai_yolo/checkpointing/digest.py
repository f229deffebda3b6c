"""Digests of a training state: a quick one to compare ranks, a strong one to compare runs."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gai_yolo.checkpointing.state import FIELDS, PARTS, TrainingState
from gai_yolo.distributed.world import World
from gai_yolo.errors import Ending, Stop

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes as an element has."""


class RankDiffers(Stop):
    """A rank has another state than the others: broken hardware, or a bug."""

    ending = Ending.HARDWARE


class DivergenceAlarm:
    """Compares the state of all ranks, so that no checkpoint is written of one that went wrong."""

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
    """A digest of everything that ranks must have in common, times aside: sums of the bits of each tensor as whole numbers, hashed. One
    wrong bit always shows."""
    content = state.capture()
    plain = {field.name: field.seen(content[field.name]) if field.seen else content[field.name] for field in FIELDS}
    return hashlib.sha256(b"".join([tensors_digest(content).encode(), *_encoded(plain, with_tensors=False)])).hexdigest()


@torch.no_grad()
def tensors_digest(content: Mapping[str, Any]) -> str:
    """The same, of the tensors of what `TrainingState.capture` gives."""
    sums = [tensor.detach().view(WORDS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in _tensors(content)]
    # One copy from a GPU for all of them.
    bits = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []
    return hashlib.sha256(str(bits).encode()).hexdigest()


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
    """SHA-256 of the parts of what `TrainingState.capture` gives, times aside; equal in two runs if and only if the parts are, to the last
    bit."""
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for field in FIELDS:
        if field.seen is not None and (field.is_required or field.name in content):  # what older checkpoints lack is no part of theirs
            for part, value in field.seen(content[field.name]).items():
                parts[part].update(value)
    digests = {}
    for part, values in parts.items():
        hasher = hashlib.sha256()
        for chunk in _encoded(values):
            hasher.update(chunk)
        digests[part] = hasher.hexdigest()
    return digests


def _encoded(value: Any, name: str = "", with_tensors: bool = True) -> Iterator[bytes]:
    """The names and values of nested data, tensors as type, shape and bytes in row-major order."""
    if isinstance(value, Tensor) and not with_tensors:
        yield f"{name}\n".encode()
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _encoded(value[key], f"{name}/{key}", with_tensors)
    elif isinstance(value, (list, tuple)):
        yield f"{name} {len(value)}\n".encode()
        for number, item in enumerate(value):
            yield from _encoded(item, f"{name}/{number}", with_tensors)
    else:
        yield f"{name} {json.dumps(value)}\n".encode()
