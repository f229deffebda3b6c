"""What can only be seen on a GPU, in one go of some minutes: `python benchmarks/gpu.py --out FOLDER`, the repository on PYTHONPATH.

Every check is a process of its own with a time limit; one that fails or hangs leaves the others alone. Those of one stage run side
by side, stages one after the other, and what is measured is measured alone. One line is printed for each check; the findings are in
FOLDER/gpu.json and what the checks said in FOLDER/log.txt, both kept up to date. `--only NAME ...` runs some of them, and
`--device cpu --quick` tries the checks themselves out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
LOG_BYTES = 400_000
"""Of one check's output in the log, at most."""


@dataclass(frozen=True)
class BatchPlan:
    """One check."""

    words: tuple[str, ...]
    """Module in `benchmarks`, name, arguments."""
    limit: float
    """Seconds."""
    launcher: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join(self.words[1:])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
STAGES = (
    (BatchPlan(("gpu_kernels", "environment"), 100),),
    (
        BatchPlan(("gpu_jobs", "repeated"), 110),
        BatchPlan(("gpu_jobs", "undisturbed", "bf16"), 110),
        BatchPlan(("gpu_jobs", "undisturbed", "fp16"), 110),
        BatchPlan(("gpu_kernels", "synchronisations"), 60),
        BatchPlan(("gpu_kernels", "hook"), 60, TORCHRUN),
    ),
    (
        BatchPlan(("gpu_jobs", "interrupted", "bf16"), 200),
        BatchPlan(("gpu_jobs", "two_processes", "bf16"), 200),
        BatchPlan(("gpu_jobs", "fork_server", "bf16"), 200),
        BatchPlan(("gpu_jobs", "under_torchrun", "bf16"), 200),
        BatchPlan(("gpu_jobs", "interrupted", "fp16"), 200),
    ),
    (BatchPlan(("gpu_jobs", "stuck", "within"), 75),),
    (BatchPlan(("gpu_jobs", "stuck", "before"), 75),),
    (BatchPlan(("gpu_jobs", "stuck", "behind"), 75),),
    (BatchPlan(("gpu_speed", "stall", "n"), 45),),
    (BatchPlan(("gpu_speed", "throughput"), 90),),
    (BatchPlan(("gpu_speed", "stall", "x"), 60),),
    (BatchPlan(("gpu_speed", "busy"), 50),),
    (BatchPlan(("gpu_speed", "loader"), 60),),
)


class Report:
    """What was found so far."""

    def __init__(self, out: Path, work: Path) -> None:
        self.out, self.work = out, work
        self.checks: dict[str, dict[str, Any]] = {}
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")

    def add(self, plan: BatchPlan, outcome: str, seconds: float) -> None:
        """Note a check that has ended, and say so."""
        path = self.work / f"{plan.name}.result.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"figures": {}, "failures": []}
        if outcome != "ended":
            found["failures"].append(outcome)
        self.checks[plan.name] = {"outcome": "FAILED" if found["failures"] else "ok", "seconds": round(seconds, 1), **found}
        self.write()
        with (self.out / "log.txt").open("a") as log:
            for said in sorted(self.work.glob(f"{plan.name}.*output")):
                log.write(f"\n===== {said.name}\n{said.read_text(errors='replace')[-LOG_BYTES:]}")
        first = f": {found['failures'][0][:300]}" if found["failures"] else ""
        print(f"{self.checks[plan.name]['outcome']:7}{plan.name:28}{seconds:6.1f} s{first}", flush=True)

    def write(self) -> None:
        """Bring the file up to date."""
        (self.out / "gpu.json").write_text(json.dumps(self.checks, indent=1))


def main() -> int:
    """Run the checks; returns 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="those whose names begin so, and what they need")
    parser.add_argument("--minutes", type=float, default=8.5, help="in all; what has not begun by then is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    work = Path(tempfile.mkdtemp(prefix="gpu-checks-"))
    report = Report(given.out, work)
    patience = 1.0 if given.device == "cuda" else 3.0
    options = ["--work", str(work), "--device", given.device, *(["--quick"] if given.quick else [])]
    try:
        for stage in STAGES:
            plans = [plan for plan in stage if not given.only or plan.name.startswith(tuple(given.only))]
            with ThreadPoolExecutor(max(1, len(plans)) if given.device == "cuda" else 1) as pool:
                list(pool.map(lambda plan: run(plan, options, report, plan.limit * patience, deadline), plans))
    finally:
        for folder in (work, Path("/dev/shm") / work.name):
            shutil.rmtree(folder, ignore_errors=True)
    show(report)
    return int(any(found["failures"] for found in report.checks.values()))


def run(plan: BatchPlan, options: list[str], report: Report, limit: float, deadline: float) -> None:
    """Run one check within its limit, and end all that it has started."""
    started = time.monotonic()
    limit = min(limit, deadline - started)
    if limit < 5.0:
        report.add(plan, "left out: no time", 0.0)
        return
    module, *words = plan.words
    command = [sys.executable, *plan.launcher, "-m", f"benchmarks.{module}", *words, *options]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with (report.work / f"{plan.name}.output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    family: dict[int, str] = {}
    outcome = ""
    while not outcome:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.5)
            outcome = "ended" if code == 0 else f"exit code {code}: {last_line(report.work / f'{plan.name}.output')}"
        family |= descendants({process.pid, *family})
        if not outcome and time.monotonic() - started > limit:
            outcome = f"took more than {limit:.0f} s and was ended"
    process.kill()
    process.wait()
    for pid, born in family.items():
        with contextlib.suppress(OSError):
            if born_at(pid) == born:  # and no other that has got its number
                os.kill(pid, signal.SIGKILL)
    report.add(plan, outcome, time.monotonic() - started)


def descendants(of: set[int]) -> dict[int, str]:
    """All processes that these have started, and those have, with their times of birth."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            parents[int(path.parent.name)] = (int(fields[1]), fields[19])
    found: dict[int, str] = {}
    while new := {pid: born for pid, (parent, born) in parents.items() if parent in of | found.keys() and pid not in found}:
        found |= new
    return found


def born_at(pid: int) -> str:
    """When a process was started, in ticks of the machine's clock."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]


def last_line(path: Path) -> str:
    """Of a check's output."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def show(report: Report) -> None:
    """Everything that was found, once more."""
    for name, found in report.checks.items():
        print(f"\n{found['outcome']} {name}")
        for failure in found["failures"]:
            print(f"  FAILED: {failure[:600]}")
        for figure, value in found["figures"].items():
            print(f"  {figure}: {str(value)[:240]}")


if __name__ == "__main__":
    sys.exit(main())
