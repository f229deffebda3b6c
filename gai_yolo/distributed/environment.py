"""What a launcher says of this process, in torchrun's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gai_yolo.errors import ConfigError

HOW_TO_START = "start the job with gai-yolo launch or torchrun, which set all that is needed, or unset it."
"""For who has set some of torchrun's variables by hand."""


def environment_rank() -> int:
    """Rank from torchrun's environment; 0 without torchrun."""
    return number_in(os.environ, "RANK", 0)


def environment_local_rank() -> int:
    """Rank on this node from torchrun's environment; 0 without torchrun."""
    return number_in(os.environ, "LOCAL_RANK", 0)


def check_environment(variables: Mapping[str, str]) -> None:
    """Whether what is set of torchrun's variables makes sense. Others set them too: schedulers, operators, people. Who sets no LOCAL_*
    has each process on a machine of its own.

    Raises:
        ConfigError: it does not.
    """
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name in variables and not variables[name].isdecimal():
            raise ConfigError(f"{name}={variables[name]}: is no whole number; {HOW_TO_START}")
    world_size = number_in(variables, "WORLD_SIZE", 1)
    if world_size > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]):
        raise ConfigError(f"WORLD_SIZE={world_size} is set, and {', '.join(missing)} not; {HOW_TO_START}")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        number, limit = number_in(variables, rank, 0), number_in(variables, size, 1)
        if number >= limit:
            said = f"{size}={variables[size]}" if size in variables else f"a job without {size}"
            raise ConfigError(f"{rank}={number} makes no sense in {said}; {HOW_TO_START}")
    if number_in(variables, "LOCAL_WORLD_SIZE", 1) > world_size:
        raise ConfigError(f"LOCAL_WORLD_SIZE={variables['LOCAL_WORLD_SIZE']} makes no sense in a world of {world_size}; {HOW_TO_START}")


def number_in(variables: Mapping[str, str], name: str, otherwise: int) -> int:
    """Of a variable that is one; `check_environment` says when it is not."""
    text = variables.get(name, "")
    return int(text) if text.isdecimal() else otherwise


def launch_id() -> str | None:
    """torchrun's id of the job, the same after every restart and resize; None without torchrun or where it has none.

    The restart count would not do: torchrun does not count changes of membership.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job == "none" else job


def was_restarted() -> bool:
    """Whether torchrun has started this process anew after a failure. It does not count changes of membership."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
