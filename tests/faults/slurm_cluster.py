"""A real Slurm on one machine, without systemd: munged, slurmctld and a slurmd for each node, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 60.0
"""Seconds to wait for a daemon on a busy machine."""
EXPIRY = 5
"""Seconds after which Slurm's credentials expire; a requeued job waits so long (120 by default) before it may start again."""

SLURM_CONF = """
ClusterName=faults
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expiry}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerParameters=sched_min_interval=200000,sched_interval=2
{nodes}
PartitionName=faults Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def slurm_is_missing() -> str | None:
    """Why there can be no cluster here; None if there can be one."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(missing)} (Debian's slurm-wlm)" if missing else None


class SlurmCluster:
    """Nodes n1, n2, ... of one core each, all of them this machine; started by `with`, and ended with what runs on them.

    Args:
        folder: of its own, with a short path: a socket lies in it.
    """

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder = folder
        self._nodes = [f"n{number + 1}" for number in range(num_nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        self._write_configuration()
        try:
            munge = self.folder / "munge.socket"
            files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
            self._start("munged", "--foreground", "--force", f"--socket={munge}", *files)
            self._wait(munge.exists, "munged's socket")
            self._start("slurmctld", "-D", "-c")
            for node in self._nodes:
                self._start("slurmd", "-D", "-N", node, key=node)
            self._wait(
                lambda: self.command("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(self._nodes))], "idle nodes"
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs, and end the daemons."""
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=self.environment, check=False, capture_output=True)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()

    def lose(self, node: str) -> None:
        """Kill everything on a node at once: its slurmd, what Slurm has started there, and the jobs' processes.

        Slurm finds that out after `SlurmdTimeout` (300 s). A shorter one would take the other nodes of a busy machine for lost, too, so
        it is told.
        """
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        tasks = [pid for pid in _pids() if marks <= set(_read(pid, "environ").split(b"\0"))]
        keepers = {_parent(pid) for pid in tasks}
        steps = [pid for pid in keepers if _read(pid, "cmdline").startswith(b"slurmstepd:")]
        daemon = self._daemons.pop(node)
        for pid in (daemon.pid, *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    @property
    def environment(self) -> dict[str, str]:
        """With which Slurm's commands speak to this cluster."""
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        return {**outer, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, cwd: Path | None = None) -> str:
        """Output of one of Slurm's commands; what went wrong, where it went wrong."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says of a job, by its own names: JobState, Restarts, ExitCode, ..."""
        words = self.command("scontrol", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _write_configuration(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in self._nodes)):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(64))
        (self.folder / "munge.key").chmod(0o400)
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=1 State=UNKNOWN" for node in self._nodes
        )
        text = SLURM_CONF.format(host=host, folder=self.folder, expiry=EXPIRY, controller_port=_free_port(), nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start(self, name: str, *arguments: str, key: str = "") -> None:
        with (self.folder / f"{key or name}.out").open("wb") as out:
            # A session of its own: what a terminal or pytest sends to its group is not for it.
            daemon = subprocess.Popen([name, *arguments], env=self.environment, stdout=out, stderr=out, start_new_session=True)
        self._daemons[key or name] = daemon

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            dead = [key for key, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{what} did not come; ended: {dead}\n{self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in sorted(self.folder.glob("*.out")))


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""  # it has just ended


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else -1


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian puts daemons


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
