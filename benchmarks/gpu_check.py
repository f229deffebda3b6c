"""What the checks of `benchmarks/gpu.py` have in common: their findings, and a small run on made-up batches."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from gai_yolo.data.dataset import Batch
    from gai_yolo.training.loop import TrainingParts

REPOSITORY = Path(__file__).parents[1]
KEPT: list[TrainingParts] = []
"""Runs of this process. A pinned buffer that goes without being closed leaves its address pinned, and the next one there is refused."""
STALL_SECONDS = 25.0
"""How long a stuck GPU stays so."""


@dataclass
class Check:
    """What one check finds. It is on the disk at once: one that hangs is ended, and what it has found counts."""

    name: str
    work: Path
    """For its files, and those of other checks under their names."""
    device: str
    """`cuda`, or `cpu` to try the check itself out."""
    quick: bool
    """As little as shows that the check works."""
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def result(self) -> Path:
        """Where the findings are."""
        return self.work / f"{self.name}.result.json"

    @property
    def cache(self) -> Path:
        """Of the built-in data set."""
        return self.work / "cache"

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device == "cuda"

    def say(self, name: str, value: Any) -> None:
        """Note a figure."""
        self.figures[name] = round(value, 5) if isinstance(value, float) else value
        print(f"{self.name}: {name} = {self.figures[name]}", flush=True)
        self._write()

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a failure unless something holds."""
        if not holds:
            self.failures.append(otherwise)
            print(f"{self.name}: FAILED: {otherwise}", flush=True)
            self._write()

    def _write(self) -> None:
        temp = self.result.with_suffix(f".{os.getpid()}")
        temp.write_text(json.dumps({key: asdict(self)[key] for key in ("figures", "failures")}, default=str))
        temp.replace(self.result)


def be_one_of(checks: Mapping[str, Any], about: str | None) -> NoReturn:
    """Run the check that the command line names, and end the process."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("name", choices=checks)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    os.chdir(REPOSITORY)
    # The arguments are part of the name.
    checks[given.name](Check("-".join((given.name, *given.arguments)), given.work, given.device, given.quick), *given.arguments)
    sys.stdout.flush()
    os._exit(0)  # a stuck GPU would be waited for, and loader processes


def build_run(check: Check, name: str, settings: Sequence[str], world: Any = None) -> TrainingParts:
    """A run of the real parts, in a folder of its own."""
    from benchmarks.epoch import build

    fixed = (
        f"experiment.folder={check.work}/{check.name}",
        f"experiment.name={name}",
        *("data.path=shapes", f"data.cache_folder={check.cache}", "data.cache=none", "data.workers=0"),
        *(f"training.device={check.device}", "training.threads=1", "training.epochs=1000", "reporting.tensorboard=false"),
    )
    run = build(REPOSITORY / "configs" / "config.yaml", [*fixed, *settings], world)
    run.state.model.train()
    KEPT.append(run)
    return run


def make_batch(number: int, images: int, side: int, boxes: int, pinned: bool = False) -> Batch:
    """Noise with so many random boxes in each image; a function of its arguments."""
    import torch

    from gai_yolo.data.dataset import Batch

    random = torch.Generator().manual_seed(number)
    centres = torch.rand(images * boxes, 2, generator=random) * side
    halves = (4 + torch.rand(images * boxes, 2, generator=random) * side / 4).clamp(max=side / 2)
    batch = Batch(
        images=torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=random),
        box_image=torch.arange(images).repeat_interleave(boxes),
        classes=torch.randint(0, 4, (images * boxes,), generator=random),
        boxes=torch.cat((centres - halves, centres + halves), 1).clamp(0, side),
        image_ids=torch.arange(images),
        letterbox=torch.zeros(images, 3),
        unreadable=torch.zeros(0, dtype=torch.int64),
    )
    return batch.pin_memory() if pinned else batch


def make_batches(run: TrainingParts, boxes: int, pinned: bool = False) -> list[Batch]:
    """The micro-batches of one step."""
    training = run.step.config
    assert isinstance(training.micro_batch_size, int)
    number = training.batch_size // training.micro_batch_size
    return [make_batch(one, training.micro_batch_size, run.input_size.image_size, boxes, pinned) for one in range(number)]


def take_steps(run: TrainingParts, batches: list[Batch], steps: int) -> float:
    """Seconds of so many steps over the same batches, until the GPU has done them."""
    synchronise(run)
    started = time.perf_counter()
    for _ in range(steps):
        take_step(run, batches)
    synchronise(run)
    return time.perf_counter() - started


def take_step(run: TrainingParts, batches: list[Batch]) -> None:
    """One step; the GPU may still be at it."""
    run.step(batches, len(batches), sum(len(batch.images) for batch in batches), run.input_size.image_size)


def synchronise(run: TrainingParts) -> None:
    """Wait until the GPU, if there is one, has done what was queued."""
    import torch

    if run.step.world.device.type == "cuda":
        torch.cuda.synchronize()


def digest_of(run: TrainingParts) -> str:
    """Of the whole state, in 16 letters."""
    import hashlib

    from gai_yolo.checkpointing.digest import part_digests

    return hashlib.sha256(json.dumps(part_digests(run.state.capture())).encode()).hexdigest()[:16]
