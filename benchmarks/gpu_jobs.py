"""Checks of `benchmarks/gpu.py` that start the real job, on the built-in data set, and interrupt it: `python -m benchmarks.gpu_jobs NAME
--work FOLDER`. Each run that was interrupted must end with the digest of the one that was not, to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import REPOSITORY, Check, be_one_of
from gai_yolo.checkpointing.writer_start import WRITER_NAME
from gai_yolo.goodput.record import high_water, read_records
from gai_yolo.processes import children_of, name_of

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts=5")
STEPS_AN_EPOCH = 12
PATIENCE = 100.0
"""Seconds that anything may take."""


def epochs_of(check: Check) -> int:
    """Of each run."""
    return 3 if check.quick else 6


def moments(check: Check) -> tuple[int, int, int]:
    """Steps after which a run is interrupted."""
    steps = STEPS_AN_EPOCH * epochs_of(check)
    return 5, int(0.45 * steps), int(0.75 * steps)


class Job:
    """A job in the background, in a session of its own; its output is in a file."""

    def __init__(self, check: Check, run: str, words: Sequence[str], amp: str) -> None:
        self.check, self.run = check, check.work / check.name / run
        self.output = check.work / f"{check.name}.{run}.output"
        memory = self.memory
        memory.mkdir(parents=True, exist_ok=True)
        batch = (
            ("training.batch_size=4", "training.micro_batch_size=1")
            if check.quick
            else ("training.batch_size=32", "training.micro_batch_size=8")
        )
        values = (
            *(f"experiment.folder={self.run.parent}", f"experiment.name={run}", f"data.cache_folder={check.cache}"),
            *("data.path=shapes", f"data.image_size={64 if check.quick else 256}", "data.cache=none", "data.workers=2"),
            *(f"training.epochs={epochs_of(check)}", "evaluation.interval=3", *batch, "training.threads=1"),
            *(f"training.max_batches_per_epoch={STEPS_AN_EPOCH}", f"training.device={check.device}", f"training.amp={amp}"),
            *("snapshots.interval_steps=4", "elastic.memory_interval_steps=3", f"elastic.memory_folder={memory}"),
            *("elastic.notices=none", "reporting.images=2", "reporting.log_interval=1"),
        )
        command = [sys.executable, *words, *(word for value in values for word in ("--set", value))]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def memory(self) -> Path:
        """In the node's memory."""
        return Path("/dev/shm") / self.check.work.name / f"{self.check.name}-{self.run.name}"

    def step(self) -> int:
        """The highest that was completed."""
        return high_water(read_records(self.run / "goodput")[0])

    def starts(self) -> int:
        """How often it has begun to train."""
        return len([one for one in read_records(self.run / "goodput")[0] if one.origin is not None])

    def wait_for_step(self, step: int) -> None:
        """Wait until so many are completed."""
        self.wait_until(lambda: self.step() >= step, f"step {step}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so, while the job runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what} was not reached, exit code {self.process.poll()}: {self.tail()}")
            time.sleep(0.01)

    def is_on_disk(self) -> bool:
        """Whether there is something to go on from without the node's memory."""
        return any(self.run.glob("snapshots/step_*.json")) or any(self.run.glob("checkpoints/epoch_*.json"))

    def kill(self) -> None:
        """End all its processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """The exit code, when it has ended."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"did not end: {self.tail()}") from None

    def tail(self) -> str:
        """The end of what it said."""
        return self.output.read_text(errors="replace")[-1500:]


def digests_of(run: Path) -> dict[str, str]:
    """Of a run's newest state, by part."""
    command = [sys.executable, "-m", "gai_yolo.cli", "digest", str(run), "--json"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"gai-yolo digest {run}: {told.stderr.strip()}")
    digests: dict[str, str] = json.loads(told.stdout)[0]["digests"]
    return digests


def compare(check: Check, job: Job, amp: str) -> None:
    """Wait for a run's end, and expect the state of the undisturbed one."""
    code = job.end()
    check.expect(code == 0, f"{job.run.name}: exit code {code}: {job.tail() if code else ''}")
    sources = [one.source for one in sorted(read_records(job.run / "goodput")[0], key=lambda one: one.number)]
    check.say(f"{job.run.name}: went on from", sources)
    own, other = digests_of(job.run), digests_of(check.work / f"undisturbed-{amp}" / "run")
    differing = [part for part in own if own[part] != other[part]]
    check.expect(not differing, f"{job.run.name}: differs from the undisturbed run in {', '.join(differing)}")
    check.say(f"{job.run.name}: equal to the undisturbed run", not differing)
    shutil.rmtree(job.memory, ignore_errors=True)


def undisturbed(check: Check, amp: str) -> None:
    """The run that the others are compared with."""
    started = time.monotonic()
    job = Job(check, "run", ["elastic_train.py"], amp)
    job.wait_for_step(1)
    children = sorted(name_of(pid) for pid in children_of(job.process.pid))
    check.say("processes beside it", children)
    check.expect(WRITER_NAME in children, "the checkpoint writer is no fork")
    code = job.end()
    check.expect(code == 0, f"exit code {code}: {job.tail() if code else ''}")
    check.say("seconds", time.monotonic() - started)
    check.say("digests", digests_of(job.run))
    metrics = json.loads((job.run / "checkpoints" / "training_metrics.json").read_text())
    check.say("training losses", [row["train_loss"] for row in metrics])
    shutil.rmtree(job.memory, ignore_errors=True)


def interrupted(check: Check, amp: str) -> None:
    """kill -9 twice, the second time with the loss of what the node's memory holds; then SIGTERM."""
    for step, how in zip(moments(check), ("kill", "kill and forget", "SIGTERM"), strict=True):
        job = Job(check, "run", ["elastic_train.py"], amp)
        job.wait_for_step(step)
        if how == "kill and forget":
            job.wait_until(job.is_on_disk, "a snapshot on the disk")
        if how == "SIGTERM":
            job.process.terminate()
            code = job.end()
            check.expect(code == 75, f"exit code {code} after SIGTERM: {job.tail()}")
        else:
            job.kill()
        if how == "kill and forget":
            shutil.rmtree(job.memory)
    compare(check, Job(check, "run", ["elastic_train.py"], amp), amp)


def under_torchrun(check: Check, amp: str) -> None:
    """One process under torchrun, with NCCL's group, killed once."""
    job = Job(check, "run", [*TORCHRUN, "--nproc-per-node=1", "elastic_train.py"], amp)
    kill_workers(check, job, 1)
    compare(check, job, amp)


def two_processes(check: Check, amp: str) -> None:
    """Two processes share the one GPU, through gloo; one of them is killed, and later the other."""
    job = Job(check, "run", [*TORCHRUN, "--nproc-per-node=2", "-m", "benchmarks.gpu_shared"], amp)
    kill_workers(check, job, 2)
    compare(check, job, amp)


def kill_workers(check: Check, job: Job, number: int) -> None:
    """Kill one of torchrun's processes in the first epoch; if there are two, the other one in the second."""
    for turn, step in enumerate(moments(check)[:number]):
        job.wait_for_step(step)
        workers = sorted(children_of(job.process.pid))
        check.expect(len(workers) == number, f"torchrun has {len(workers)} processes, not {number}")
        starts = job.starts()
        os.kill(workers[turn], signal.SIGKILL)
        killed = time.monotonic()
        job.wait_until(lambda starts=starts: job.starts() > starts, "another start")  # type: ignore[misc]
        check.say(f"seconds from kill {turn + 1} to training", time.monotonic() - killed)


def fork_server(check: Check, amp: str) -> None:
    """`gai-yolo launch`, whose worker is killed: the next one is a fork of what has imported everything, and uses the GPU."""
    for run, options in {"forked": [], "imported": ["--no-fork-server"]}.items():
        job = Job(check, run, ["-m", "gai_yolo.cli", "launch", *options, "--", "elastic_train.py"], amp)
        job.wait_for_step(5)
        worker = worker_of(job.process.pid)
        check.say(f"{run}: name of the worker", name_of(worker))
        check.say(f"{run}: processes beside it", sorted(name_of(pid) for pid in children_of(worker)))
        if run == "forked":
            check.expect(name_of(worker).startswith("rank-"), "the worker is no fork: the fork server found itself unfit")
        starts, killed = job.starts(), time.time()
        os.kill(worker, signal.SIGKILL)
        job.wait_until(lambda starts=starts, job=job: job.starts() > starts, "another start")  # type: ignore[misc]
        check.say(f"{run}: seconds from the kill to training", time.time() - killed)
        before = job.step()
        job.wait_until(lambda before=before, job=job: job.step() > before, "another step")  # type: ignore[misc]
        check.say(f"{run}: seconds from the kill to a new step", time.time() - killed)
        compare(check, job, amp)
        last = max(read_records(job.run / "goodput")[0], key=lambda one: one.number)
        check.say(f"{run}: seconds of the last start", {str(phase): round(value, 2) for phase, value in last.seconds.items()})


def worker_of(launcher: int) -> int:
    """The training process under a launcher: the descendant that has loaders, and is no loader or server itself."""
    (agent,) = [pid for pid in children_of(launcher) if children_of(pid)]
    named = [pid for pid in children_of(agent) if name_of(pid).startswith("rank-")]
    return named[0] if named else max(children_of(agent), key=lambda pid: len(children_of(pid)))


def repeated(check: Check) -> None:
    """`gpu_kernels operations` twice, in two processes: equal digests."""
    turns = ("first", "second")
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda turn: start_kernels(check, "operations", turn).wait(), turns))
    found = []
    for turn, code in zip(turns, codes, strict=True):
        path = check.work / f"operations-{turn}.result.json"
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"figures": {}, "failures": []}
        found.append(result["figures"])
        check.expect(code == 0, f"{turn} process: exit code {code}")
        for failure in result["failures"]:
            check.expect(False, f"{turn} process: {failure}")
    for label in found[0].keys() | found[1].keys():
        if "digests" not in str(found[0].get(label)):
            continue
        one, other = (figures.get(label, {}) for figures in found)
        check.expect(one.get("digests") == other.get("digests"), f"{label}: two processes have other bits")
        check.say(label, {"equal": one.get("digests") == other.get("digests"), "seconds of a step": one.get("step"), **one})
    check.say("kinds", len(found[0]) - 1)
    check.say("without deterministic kernel", {label: value for label, value in found[0].items() if "without" in label})


def stuck(check: Check, where: str) -> None:
    """`gpu_kernels rescue`: what was saved is the last whole step's state, and the process is gone in time."""
    started = time.monotonic()
    process = start_kernels(check, "rescue", where)
    try:
        code: int | None = process.wait(60.0)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    check.say("seconds in all", time.monotonic() - started)
    path = check.work / f"rescue-{where}.result.json"
    figures = json.loads(path.read_text())["figures"] if path.exists() else {}
    expected = figures.pop("expected", None)
    for name, value in figures.items():
        check.say(name, value)
    check.expect(code == 76, f"exit code {code}, not 76: {'it hangs' if code is None else 'it was not the watchdog that ended it'}")
    try:
        saved = digests_of(check.work / f"rescue-{where}" / "run")
    except RuntimeError as error:
        check.expect(False, f"nothing was saved: {error}")
        return
    differing = [part for part in saved if expected is None or saved[part] != expected[part]]
    check.say("saved the last whole step", not differing)
    check.expect(not differing, f"what was saved is not the last whole step: {', '.join(differing)}")


def start_kernels(check: Check, *words: str) -> subprocess.Popen[bytes]:
    """A check of `gpu_kernels`, beside this one."""
    options = ["--work", str(check.work), "--device", check.device, *(["--quick"] if check.quick else [])]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_kernels", *words, *options], cwd=REPOSITORY)


CHECKS = {
    "undisturbed": undisturbed,
    "interrupted": interrupted,
    "under_torchrun": under_torchrun,
    "two_processes": two_processes,
    "fork_server": fork_server,
    "repeated": repeated,
    "stuck": stuck,
}


if __name__ == "__main__":
    be_one_of(CHECKS, __doc__)
