"""The command line of `gai-yolo launch`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from gai_yolo.distributed.network import Endpoint
from gai_yolo.errors import Refusal, refused_by
from gai_yolo.launcher.rendezvous.file_store import StoreRefused, check_store
from gai_yolo.launcher.rendezvous.secret import HOW_TO_MAKE, SECRET_VARIABLE, Secret, given_secret, secret_for
from gai_yolo.launcher.verdict import EXIT_CODES

RENDEZVOUS = {
    "last_call_timeout": 2,
    "keep_alive_interval": 1,
    "keep_alive_max_attempt": 3,
    "join_timeout": 600,
    "read_timeout": 20,
    "close_timeout": 30,
    "heartbeat_timeout": 5,
}
"""torchrun's settings of the rendezvous, in seconds but for the attempts. Its own defaults find a dead node after 15 s, and wait 30 s for
more nodes."""
EPILOG = f"""\
Run it on every node alike. With --rendezvous FILE all nodes share a file, and there is no host whose loss ends the job. With
host:port the launcher on that host keeps the rendezvous; with several, survivors of a lost one go on at the next. The script's folder
is the current one. A job id stands for one job until it has succeeded: what is started under it later begins anew.

Launchers know each other by a secret. Beside a rendezvous FILE the first of them leaves one, FILE.secret, which is of this user alone.
Launchers on several hosts need to be given one: {HOW_TO_MAKE}, and --secret-file job.secret on each host, or its
text in the variable {SECRET_VARIABLE}.

--rendezvous-conf: {", ".join(f"{key}={value}" for key, value in RENDEZVOUS.items())}.
A node that says nothing for keep_alive_interval x keep_alive_max_attempt is lost; clocks must agree better than that. For more nodes
than MIN the others wait last_call_timeout, for MIN nodes join_timeout, and then try again.

{EXIT_CODES}"""


class LaunchError(Refusal):
    """A command line of `gai-yolo launch` that makes no sense."""


@dataclass(frozen=True)
class Settings:
    """What the command line says, checked."""

    min_nodes: int
    max_nodes: int
    processes: str
    """A number, `auto`, `gpu` or `cpu`."""
    rendezvous: Path | tuple[Endpoint, ...] | None
    """A file, or where key-value stores are served; None: a job of this machine alone."""
    secret: Secret | None
    """The one that was given; None: the launcher makes it, or finds it beside the rendezvous file."""
    rendezvous_settings: dict[str, int]
    job: str | None
    max_restarts: int
    host_name: str | None
    patience: float
    """Seconds to wait for the first endpoint."""
    fork_server: bool
    """Workers are forks of a process that has imported what the script imports."""
    module: bool
    """The script is the name of a module."""
    script: str
    script_arguments: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `gai-yolo launch` understands."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.usage = "gai-yolo launch [options] -- SCRIPT [arguments of the script]"
    add = parser.add_argument
    add("--nodes", default="1", metavar="MIN[:MAX]", help="how many machines the job may have (default: %(default)s)")
    add(
        "--processes-per-node",
        default="auto",
        metavar="N",
        help="a number; auto: one for each GPU, or one; gpu: one for each GPU; cpu: one for each core (default: %(default)s)",
    )
    add("--rendezvous", metavar="WHERE", help="where the nodes meet: a file that they share, or host:port[,host:port,...]")
    add("--secret-file", type=Path, metavar="PATH", help="what the launchers of a job know and nobody else, for --rendezvous host:port")
    add("--job-id", metavar="ID", help="tells jobs apart that meet in one place, and one start of a job from the next")
    add("--max-restarts", type=int, default=100, metavar="N", help="restarts of the processes by one agent (default: %(default)s)")
    add("--rendezvous-conf", default="", metavar="KEY=VALUE,...", help="seconds and attempts, in place of those below")
    add("--host-name", metavar="NAME", help="this machine's name in --rendezvous, and for the other nodes (default: found out)")
    add(
        "--first-endpoint-wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="at the start, wait so long for the first of several endpoints (default: %(default).0f)",
    )
    add("--no-fork-server", action="store_true", help="let each process import everything itself, which takes seconds after each fault")
    add("-m", "--module", action="store_true", help="the script is a module, as in python -m")
    add("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="what to run, and its arguments")


def settings_from(given: argparse.Namespace) -> Settings:
    """Check everything that can be checked before a process is started.

    Raises:
        LaunchError: what the user must mend.
    """
    command = list(given.command)
    if command[:1] == ["--"]:
        command = command[1:]
    module = bool(given.module)
    if command[:1] in (["-m"], ["--module"]):
        module, command = True, command[1:]
    if not command:
        raise LaunchError("what to run is missing; end the line with -- elastic_train.py --config configs/config.yaml.")
    script, *arguments = command
    # A module is looked for as python -m does, from the current folder, without running a package's code.
    if module and PathFinder.find_spec(script.partition(".")[0], [str(Path.cwd()), *sys.path]) is None:
        raise LaunchError(f"-m {script}: there is no such module.")
    if not module and not Path(script).is_file():
        raise LaunchError(f"{script}: there is no such script in {Path.cwd()}.")
    min_nodes, max_nodes = _parse_nodes(given.nodes)
    rendezvous = None if given.rendezvous is None else parse_rendezvous(given.rendezvous)
    if rendezvous is None and max_nodes > 1:
        raise LaunchError(f"--nodes {given.nodes}: several machines need a place to meet; give --rendezvous a shared file or host:port.")
    secret = given_secret(given.secret_file, os.environ)
    if isinstance(rendezvous, tuple) and not all(endpoint.is_loopback for endpoint in rendezvous):
        secret = secret_for(rendezvous, secret)
    if given.job_id is not None and not re.fullmatch(r"[\w.-]+", given.job_id):
        raise LaunchError(f"--job-id {given.job_id!r}: give letters, digits, '.', '_' and '-'.")
    if given.max_restarts < 0 or given.first_endpoint_wait < 0:
        raise LaunchError("--max-restarts and --first-endpoint-wait cannot be negative.")
    if not re.fullmatch(r"auto|gpu|cpu|[1-9]\d*", given.processes_per_node):
        raise LaunchError(f"--processes-per-node {given.processes_per_node!r}: give a number from 1, auto, gpu or cpu.")
    return Settings(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        processes=given.processes_per_node,
        rendezvous=rendezvous,
        secret=secret,
        rendezvous_settings=RENDEZVOUS | _parse_settings(given.rendezvous_conf),
        job=given.job_id,
        max_restarts=given.max_restarts,
        host_name=given.host_name,
        patience=given.first_endpoint_wait,
        fork_server=not given.no_fork_server,
        module=module,
        script=script,
        script_arguments=tuple(arguments),
    )


def _parse_nodes(text: str) -> tuple[int, int]:
    """`2` or `1:4` as the least and the greatest number of nodes."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise LaunchError(f"--nodes {text!r}: give a number from 1, or the least and the most, such as 1:4.")
    return least, most


def parse_rendezvous(text: str) -> Path | tuple[Endpoint, ...]:
    """A path, if it has a slash or no colon; endpoints otherwise.

    Raises:
        LaunchError: the file cannot be used, or an endpoint is none.
    """
    if "/" in text or ":" not in text:
        return _check_file(Path(text))
    endpoints = tuple(_parse_endpoint(part.strip()) for part in text.split(","))
    if len(set(endpoints)) < len(endpoints):
        raise LaunchError(f"--rendezvous {text}: names an endpoint twice.")
    return endpoints


def _parse_settings(text: str) -> dict[str, int]:
    """`key=value,...` with the keys of `RENDEZVOUS`."""
    found = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in RENDEZVOUS:
            raise LaunchError(f"--rendezvous-conf {key}: is none of {', '.join(RENDEZVOUS)}.")
        if not re.fullmatch(r"[1-9]\d*", value):
            raise LaunchError(f"--rendezvous-conf {part}: give a whole number from 1.")
        found[key] = int(value)
    return found


def _parse_endpoint(text: str) -> Endpoint:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+)):(\d{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise LaunchError(f"--rendezvous {text!r}: is not host:port, such as node0:29400.")
    return Endpoint(match[1] or match[2], int(match[3]))


def _check_file(path: Path) -> Path:
    if path.is_dir():
        raise LaunchError(f"--rendezvous {path}: is a folder; name a file in it, such as {path / 'rendezvous'}.")
    if not path.parent.is_dir():
        raise LaunchError(f"--rendezvous {path}: the folder {path.parent} does not exist on this machine; make it, or mount it.")
    if not os.access(path if path.exists() else path.parent, os.W_OK | os.R_OK):
        raise LaunchError(f"--rendezvous {path}: cannot be written to; change its permissions, or name another file.")
    try:
        if path.exists():
            check_store(path)
    except StoreRefused as error:
        raise LaunchError(f"--rendezvous {path}: {error.strerror}.") from None
    except OSError as error:
        raise refused_by(error, LaunchError(f"--rendezvous {path}: cannot be read ({error.strerror}).")) from None
    return path
