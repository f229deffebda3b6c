"""The training job with all its processes on GPU 0, through gloo: for `benchmarks/gpu.py`, where there is one GPU.

NCCL refuses two processes on one GPU, and so does the job itself. Nothing else is different.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import torch.distributed as dist

from elastic_train import main
from gai_yolo.distributed import world as process


def share_the_gpu() -> None:
    """Let every process of this node take GPU 0, if one asks for a GPU, and gloo bring its tensors to the others."""
    begin = dist.init_process_group

    def choose(setting: Literal["auto", "cpu", "cuda"], _local_rank: int, _local_world_size: int) -> torch.device:
        return torch.device("cpu") if setting == "cpu" else torch.device("cuda", 0)

    def init_process_group(_backend: str, **more: Any) -> None:
        begin("gloo", **more)

    vars(process)["_choose_device"] = choose
    vars(dist)["init_process_group"] = init_process_group


if __name__ == "__main__":
    share_the_gpu()
    sys.exit(main())
