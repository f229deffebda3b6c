"""`launch/`: the scripts for bare machines and Slurm, the image, and what their page says of them."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gai_yolo import errors
from gai_yolo.launcher.verdict import FAILED, TERMINATED
from tests.harness import REPOSITORY, environment

LAUNCH = REPOSITORY / "launch"
SCRIPTS = ("spot.sh", "slurm.sbatch")

STAND_IN = """#!/usr/bin/env bash
# In place of gai-yolo: writes down how it was called, then ends with the next code of the list, or waits for a signal.
echo "$*" >>"$LOG"
code=$(sed -n "$(wc -l <"$LOG")p" "$CODES")
[[ $code == wait ]] || exit "$code"
trap 'echo TERM >>"$LOG.signals"; exit 75' TERM
trap 'echo INT >>"$LOG.signals"; exit 130' INT
echo >"$LOG.waits"
while :; do sleep 0.05; done
"""


class Machine:
    """A bare machine: `spot.sh` in a repository of its own, with a launcher that ends as it is told."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "calls"
        self._codes = folder / "codes"
        self._script = folder / "launch" / "spot.sh"
        for part in ("launch", ".venv/bin"):
            (folder / part).mkdir(parents=True)
        shutil.copy(LAUNCH / "spot.sh", self._script)
        launcher = folder / ".venv" / "bin" / "gai-yolo"
        launcher.write_text(STAND_IN, encoding="utf-8")
        launcher.chmod(0o755)
        self._log.touch()

    @property
    def calls(self) -> list[str]:
        """How the launcher was called so far."""
        return self._log.read_text(encoding="utf-8").splitlines()

    def start(self, codes: list[int | str], *arguments: str) -> subprocess.Popen[bytes]:
        """Start the script; the launcher will end with these codes, or wait for a signal where it says `wait`."""
        self._codes.write_text("".join(f"{code}\n" for code in codes), encoding="utf-8")
        extra = {"LOG": str(self._log), "CODES": str(self._codes), "SPOT_PAUSE": "0"}
        return subprocess.Popen([str(self._script), *arguments], env={**environment(), **extra}, start_new_session=True)

    def signals_after(self, script: subprocess.Popen[bytes], number: signal.Signals) -> list[str]:
        """Send a signal to the script alone, once the launcher waits; what the launcher got, when the script has ended."""
        waits, seen = Path(f"{self._log}.waits"), Path(f"{self._log}.signals")
        deadline = time.monotonic() + 30
        while not waits.exists():
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.02)
        script.send_signal(number)
        script.wait(30)
        return seen.read_text(encoding="utf-8").split()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A bare machine."""
    return Machine(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 127, 130, 143])
def test_spot_machine_does_not_start_again_what_has_ended(code: int, machine: Machine) -> None:
    """Loss: a machine that goes away joins again and takes the others with it; a refusal repeated for ever, on paid time."""
    script = machine.start([code], "--nodes", "1:4", "--", "elastic_train.py", "--set", "a=b c")
    assert script.wait(30) == code
    assert machine.calls == ["launch --nodes 1:4 -- elastic_train.py --set a=b c"]


def test_spot_machine_starts_a_killed_launcher_again(machine: Machine) -> None:
    """Loss: a machine stands idle until somebody looks, because the kernel's OOM killer took the launcher."""
    assert machine.start([137, 139, 0], "--", "elastic_train.py").wait(30) == 0
    assert machine.calls == ["launch -- elastic_train.py"] * 3


def test_spot_machine_that_stays_comes_back_after_a_withdrawn_notice(machine: Machine) -> None:
    """Loss: a machine that was announced to go, and did not, is paid for and does nothing."""
    assert machine.start([75, 75, 0], "--stay", "--", "elastic_train.py").wait(30) == 0
    assert machine.calls == ["launch -- elastic_train.py"] * 3


@pytest.mark.parametrize("stay", [[], ["--stay"]])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_spot_machine_passes_a_signal_on_and_ends(number: signal.Signals, code: int, stay: list[str], machine: Machine) -> None:
    """Loss: systemd stops the script while the training goes on without it, or is killed without having saved."""
    script = machine.start(["wait", 0], *stay, "--", "elastic_train.py")
    assert machine.signals_after(script, number) == [signal.Signals(code - 128).name[3:] if code > 128 else "TERM"]
    assert script.returncode == code
    assert len(machine.calls) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name: str) -> None:
    """Loss: a slip in a branch that only a dying machine takes."""
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(LAUNCH / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_slurm_is_asked_for_notice_and_requeue() -> None:
    """Loss: at the time limit Slurm kills the job without a word, and forgets it."""
    text = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8")
    asked = set(re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= asked


def test_image_holds_the_job_under_an_init_process() -> None:
    """Loss: torchrun as process 1 ignores SIGTERM in rendezvous, and the pod is killed after its grace period."""
    text = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["tini", "--"]' in text
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == kept
    assert {"gai_yolo", "configs", "elastic_train.py", "uv.lock"} <= copied
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []


def test_page_explains_every_file_and_exit_code() -> None:
    """Loss: an exit code at three in the morning that nothing explains."""
    text = (LAUNCH / "README.md").read_text(encoding="utf-8")
    codes = {0, FAILED, 2, errors.HARDWARE, errors.NO_PROGRESS, errors.LEFT, errors.RESTART, errors.INTERRUPTED, TERMINATED}
    assert codes <= {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    files = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert [name for name in files if name not in text] == []
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert [name for name in links if not (LAUNCH / name).exists()] == []
