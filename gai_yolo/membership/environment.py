"""What a run is trained with: configuration, versions, data, processor. All nodes must be alike, which is compared at every start."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import gai_yolo
from gai_yolo.checkpointing.state import CHECKPOINT_FORMAT
from gai_yolo.config import Config, shared_values
from gai_yolo.data.index import Index
from gai_yolo.distributed.world import World
from gai_yolo.errors import DataError, refused_by
from gai_yolo.log import OF_NODE, told_if_refused
from gai_yolo.membership.consistency import Facts, must_agree, should_agree
from gai_yolo.store.atomic import publish_text
from gai_yolo.training.context import JobContext

VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
)
"""Environment variables that choose kernels."""

logger = logging.getLogger(__name__)


class Environment:
    """What this rank trains with, in a form that is compared with the other ranks', and with the record of an earlier start of the same run
    that this node's run folder has."""

    def __init__(self, facts: Facts, processor: Facts, record: Facts | None) -> None:
        self._facts, self._processor, self._record = {**facts}, processor, record

    def check(self, world: World, exact: bool) -> None:
        """Compare what is known before anything is read; under `training.exact` other processors are worth a warning. A collective; raises
        as `must_agree`."""
        must_agree(world, self._facts, self._record)
        differing = should_agree(world, self._processor)
        if exact and differing is not None:
            logger.warning(
                f"the nodes have different processors, whose kernels may give different last bits: {differing}. Weights may depend on who "
                "computed what; nodes of one kind keep them exact."
            )
        changes = changes_since(self._record or {}, {**self._facts, **self._processor})
        if exact and changes:
            logger.warning(f"changed since the last start, and may show in the last bits: {', '.join(changes)}")

    def check_data(self, world: World, indexes: Sequence[Index]) -> None:
        """Compare what the data sets hold. A collective; raises as `must_agree`."""
        found = data_facts(indexes)
        must_agree(world, found, self._record)
        must_agree(world, {"training images that are gone": lost_names(indexes[0])})  # of this start, whatever was there at others
        self._facts.update(found)

    def keep(self, context: JobContext) -> None:
        """Let each node's run folder remember it, once the folder is known to be that of this run. A collective."""
        text = json.dumps({**self._facts, **self._processor}, indent=1)

        def write() -> None:
            path = context.folder.environment
            with contextlib.suppress(OSError, ValueError):
                if path.read_text(encoding="utf-8") == text:
                    return
            with told_if_refused(logger, path, extra=OF_NODE):
                publish_text(path, text)

        context.on_each_node(write)


def shared_facts(config: Config, world: World) -> dict[str, Any]:
    """What every rank knows of itself before anything is read."""
    return {
        **shared_values(config),
        "training.device": world.device.type,
        "checkpoint format": CHECKPOINT_FORMAT,
        "gai-yolo": gai_yolo.__version__,
        "program code": CODE,
        "torch": torch.__version__,
        "torchvision": _version_of("torchvision"),
        "NumPy": np.__version__,
        "OpenCV": cv2.__version__,
    }


def data_facts(indexes: Sequence[Index]) -> dict[str, Any]:
    """What identifies the training set and the validation set."""
    facts: dict[str, Any] = {}
    for name, index in zip(("training set", "validation set"), indexes, strict=True):
        facts[f"images of the {name}"] = len(index)
        facts[f"digest of the {name}"] = index.digest()[:16]
        facts[f"digest of the images of the {name}"] = index.content[:16]
    return facts


def lost_names(index: Index) -> str:
    """Some names, and what tells any two sets of images apart."""
    positions = sorted(index.lost)
    names = ", ".join(index.images.name(position) for position in positions[:3])
    return f"{len(positions)} ({names}; {hashlib.sha256(repr(positions).encode()).hexdigest()[:8]})" if positions else "none"


def processor_facts(world: World) -> dict[str, Any]:
    """What the last bits of results depend on beside the program."""
    variables = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        model = {"GPU": properties.name, "multiprocessors": properties.multi_processor_count, "cuDNN": cudnn}
        return {**model, "variables": variables}
    return {"vector instructions": torch.backends.cpu.get_cpu_capability(), "variables": variables}


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise refused_by(error, DataError(f"{path}: cannot be read ({error.strerror}).")) from None


def read_record(path: Path) -> dict[str, Any] | None:
    """What an earlier start has kept; None if nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    return None


def changes_since(record: Facts, facts: Facts) -> list[str]:
    """What a start has that an earlier one had not: `torch 2.15.0 (was 2.14.0)`. The configuration's keys are compared elsewhere."""
    return [f"{key} {facts[key]} (was {record[key]})" for key in facts if "." not in key and key in record and record[key] != facts[key]]


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_digest(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        hasher.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]


CODE = _code_digest(Path(gai_yolo.__file__).parent)
"""12 hexadecimal digits of this program's own source files, because versions in the making have one number. Taken when they are
imported, which is once for all forks of a fork server."""
