"""Runs a job and looks after every process that comes of it: `python tests/faults/keeper.py REPORT WORDS`, where `python WORDS` is the job.

Whatever the job's processes leave behind comes to this one, which has asked for orphans: sessions, process groups and double forks hide
nothing from it. It ends when the job has and nothing of it is left, or `PATIENCE` seconds after the job, and kills what is left then.
REPORT is a JSON file; see `Report`. To be started by `tests.harness.start`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gai_yolo.processes import adopt_orphans
from tests.zygote import run_job

PATIENCE = 10.0
"""Seconds that processes may be there after the job's first one has ended."""
TICK = 0.1
"""Seconds between two looks at all processes of the machine."""


@dataclass
class Report:
    """What has become of a job."""

    code: int
    """Exit code of its first process, minus a signal's number."""
    ended_at: float
    """When it ended, in seconds of the monotonic clock."""
    seconds: float = 0.0
    """From then until nothing was left, or `PATIENCE` was over."""
    ever: dict[int, str] = field(default_factory=dict)
    """All processes that were seen: what they ran, by process id."""
    left: dict[int, str] = field(default_factory=dict)
    """Those that were still there in the end."""


def read_report(path: Path) -> Report:
    """What a keeper has written."""
    found = json.loads(path.read_text())
    for name in ("ever", "left"):
        found[name] = {int(pid): what for pid, what in found[name].items()}
    return Report(**found)


def descendants(ancestor: int) -> dict[int, str]:
    """All processes that come of one and that `kill -0` finds: what they run, by process id."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = [ancestor]
    for one in found:  # grows meanwhile
        found += [pid for pid, parent in parents.items() if parent == one]
    return {pid: _what(pid) for pid in found[1:]}


def _what(pid: int) -> str:
    with contextlib.suppress(OSError):
        folder = Path("/proc") / str(pid)
        name, words = (folder / "comm").read_text().strip(), (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        return f"{name}: {words.decode(errors='replace')[:120]}"
    return ""


def watch(job: int) -> Report:
    """Wait for the job's end, and for that of all that is left of it."""
    report: Report | None = None
    ever: dict[int, str] = {}
    while True:
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if dead[0] == job:
                    report = Report(os.waitstatus_to_exitcode(dead[1]), time.monotonic())
        here = descendants(os.getpid())
        ever |= {pid: what for pid, what in here.items() if what}
        if report is not None:
            report.seconds, report.ever, report.left = time.monotonic() - report.ended_at, ever, here
            if not here or report.seconds > PATIENCE:
                return report
        time.sleep(TICK)


def main() -> None:
    """Be the keeper, and in a fork the job."""
    path, words = Path(sys.argv[1]), sys.argv[2:]
    adopt_orphans()
    job = os.fork()
    if job == 0:
        run_job(words)
        return
    path.with_suffix(".pid").write_text(str(job))
    report = watch(job)
    for pid in report.left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    path.write_text(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
