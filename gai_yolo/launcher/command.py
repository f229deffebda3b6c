"""What the launcher's child is started with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gai_yolo.launcher.arguments import Settings
from gai_yolo.launcher.rendezvous.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE
from gai_yolo.supervision.outcome import LAUNCHER_VARIABLE
from gai_yolo.supervision.outcome import VARIABLE as OUTCOME_VARIABLE

JOB_VARIABLE = "GAI_YOLO_JOB"
"""Environment variable: the job's id, under which its runs are counted."""
FORK_VARIABLE = "GAI_YOLO_FORK_SERVER"
"""Environment variable of the agent: `0`, where each worker is to import everything itself."""
BACKEND = "gai-yolo"
"""Name of our rendezvous among torchrun's."""
MONITOR_SECONDS = 0.1
"""torchrun looks after its workers so often."""


def agent_command(settings: Settings, address: str, run: str, local_address: str | None) -> list[str]:
    """The agent's command line.

    Args:
        address: of the key-value store: a file, or host:port.
        run: name of the run, for torchrun the job's id.
        local_address: under which the other nodes reach this one; None: its host name.
    """
    store = "file" if "/" in address else "tcp"
    conf = {"store_type": store, **settings.rendezvous_settings}
    return [
        sys.executable,
        "-m",
        "gai_yolo.launcher.agent",
        f"--nnodes={settings.min_nodes}:{settings.max_nodes}",
        f"--nproc-per-node={settings.processes}",
        f"--rdzv-backend={BACKEND}",
        f"--rdzv-endpoint={address}",
        f"--rdzv-id={run}",
        f"--rdzv-conf={','.join(f'{key}={value}' for key, value in conf.items())}",
        f"--max-restarts={settings.max_restarts}",
        f"--monitor-interval={MONITOR_SECONDS}",
        # The agent has its own handlers, from its first moment on. This one must name a signal.
        "--signals-to-handle=SIGQUIT",
        *([f"--local-addr={local_address}"] if local_address else []),
        *(["--module"] if settings.module else []),
        settings.script,
        *settings.script_arguments,
    ]


def worker_command(arguments: Sequence[str]) -> list[str]:
    """The command line with which torchrun starts a worker, by the agent's arguments: their options have the form `--name=value`."""
    at = next(index for index, word in enumerate(arguments) if not word.startswith("--"))
    return [sys.executable, "-u", *(["-m"] if "--module" in arguments[:at] else []), *arguments[at:]]


def agent_environment(
    inherited: Mapping[str, str], job: str, outcome: str, launcher: int, secret_file: Path, fork_server: bool = True
) -> dict[str, str]:
    """The agent's environment, which its workers inherit: of the secret it says where it is."""
    # torchrun takes PET_* for defaults of its arguments: a cluster's operator may have set what is not meant for this agent.
    kept = {key: value for key, value in inherited.items() if not key.startswith("PET_")}
    kept.pop(SECRET_VARIABLE, None)
    return {
        **kept,
        SECRET_FILE_VARIABLE: str(secret_file),
        # Without it a node that joins waits for ever, and no restart succeeds after the loss of rank 0's node.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        OUTCOME_VARIABLE: outcome,
        LAUNCHER_VARIABLE: str(launcher),
        JOB_VARIABLE: job,
        **({} if fork_server else {FORK_VARIABLE: "0"}),
    }


def threads_each(cores: int, processes: int) -> int:
    """Threads of each of a machine's processes."""
    return max(1, cores // processes)
