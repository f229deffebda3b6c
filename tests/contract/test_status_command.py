"""`gai-yolo status`: where is the run, and what did its interruptions cost?"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gai_yolo.cli import main as cli
from gai_yolo.errors import Ending
from gai_yolo.goodput.record import Phase
from gai_yolo.goodput.report import from_json
from gai_yolo.reporting.status import LABELS, duration
from tests.harness import REPOSITORY
from tests.starts import EPOCH, Node


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of 1000 steps whose first start lost a node and whose second is at step 150."""
    folder = tmp_path / "[bold]run"
    first = [Node(0.0, 1, node, 3, folder=folder / "goodput") for node in ("node-a", "node-b", "node-c")]
    for node in first:
        node.load(0)
        node.steps(1, 100, 0.5)
        node.spend(Phase.EVALUATION, 6.0)
    first[1].spend(Phase.STEP, 0.25)
    first[1].end()
    for node in (first[0], first[2]):
        node.spend(Phase.STEP, 0.5)
        node.end(Ending.PEER_LOST)
    second = Node(70.0, 2, "node-a", 2, folder=folder / "goodput")
    second.load(96, "memory", known=100)
    second.steps(97, 150, 0.5)
    second.end()
    return folder


def status(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    capsys.readouterr()
    code = cli.main(["status", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_a_report_says_where_it_is_and_what_it_cost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: the owner of a job on spot machines does not know what they cost."""
    code, output, errors = status(capsys, run)
    assert (code, errors) == (0, "")
    text = re.sub(r" +", " ", output)
    assert "".join(text.split()).startswith(str(run)), "whatever its length"
    assert re.search(r"\n\n state not running: killed without notice, \d+ d", text)
    assert "position epoch 2 of 10, step 150 of 1000 (15 %)\n" in text
    assert "pace 0.5 s a step, 7 min 38 s left once it runs\n" in text
    assert "processes 2 on node-a; start 2 of the run\n" in text
    assert "steps 150 done; 4 replayed, 4 lost to 2 interruptions\n" in text
    assert "goodput 74.3 % of 1 min 41 s\n" in text
    assert "useful steps 1 min 15 s 74.3 % " in text and "replayed steps 2 s 2.0 %" in text and "downtime 9.5 s 9.4 %" in text
    moment = time.strftime("%m-%d %H:%M:%S", time.localtime(EPOCH + 60.5))
    assert re.search(rf"{moment} killed without notice 100 96 4 9.5 s 3 > 2\n \(node-b\)\n", text)


def test_a_report_fits_80_columns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a log that wraps every line."""
    lines = status(capsys, run)[1].splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_running_job_is_told_from_a_silent_and_a_finished_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: somebody starts a second job beside a running one, or waits for a dead one."""
    cases = (
        ("running (step)", 0.0, None, 1000),
        ("running (step), no sign of life for 7", 7.0, None, 1000),
        ("not running: killed without notice, 20 s ago", 20.0, None, 1000),
        ("not running: left, 20 s ago", 20.0, Ending.LEFT, 1000),
        ("finished, 20 s ago", 20.0, Ending.FINISHED, 100),
        ("finished early (training.patience or time_budget), 20 s ago", 20.0, Ending.FINISHED, 1000),
    )
    for number, (text, quiet, ending, total_steps) in enumerate(cases):
        run = tmp_path / str(number)
        node = Node(time.time() - quiet - 24.0 - EPOCH, folder=run / "goodput")
        node.load(0, total_steps=total_steps)
        node.steps(1, 20)
        node.end(ending)
        code, output, _ = status(capsys, run)
        assert code == 0 and f"  state      {text}" in output
        assert ("left once it runs" in output) == text.startswith("not running")


def test_json_is_the_account(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a script that watches a job has to parse a table."""
    code, output, errors = status(capsys, run, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert from_json(output).wall == found["wall"] == pytest.approx(sum(found["seconds"].values()))
    assert [one["cause"] for one in found["interruptions"]] == ["killed without notice"] * 2
    assert set(found["seconds"]) == set(LABELS)


def test_the_accounts_of_a_run_without_its_records_is_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a run that was copied without its small files has no history."""
    (tmp_path / "copy").mkdir()
    text = status(capsys, run, "--json")[1]
    (tmp_path / "copy" / "goodput.json").write_text(text)
    code, output, errors = status(capsys, tmp_path / "copy")
    assert (code, errors) == (0, "")
    assert "step 150 of 1000" in output and "there are no records of starts; this is goodput.json as of" in output
    assert json.loads(status(capsys, tmp_path / "copy", "--json")[1]) == json.loads(text)


def test_what_has_no_account_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback, or zeros that look like a run."""
    for folder in (tmp_path, tmp_path / "absent"):
        code, output, errors = status(capsys, folder)
        assert (code, output) == (2, "") and errors.count("\n") == 1
        assert errors.startswith(f"error: {folder}: holds no records of a job (goodput/*.json, goodput.json); give the folder of a run")
    (tmp_path / "goodput.json").write_text('{"wall": 1}')
    code, output, errors = status(capsys, tmp_path)
    assert (code, output) == (2, "") and errors.startswith(f"error: {tmp_path}/goodput.json: cannot be read") and errors.count("\n") == 1


def test_a_damaged_record_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an account that misses a start and does not say so."""
    path = sorted((run / "goodput").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:100])
    code, output, _ = status(capsys, run)
    assert code == 0 and "step 100 of 1000" in output
    assert f"note: goodput/{path.name} is damaged" in output.replace("\n", " ")


def on_terminal(*arguments: object) -> tuple[subprocess.Popen[bytes], int]:
    """The command on a terminal of its own, and the terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gai_yolo.cli", "status", *map(str, arguments)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "50"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, env=environment)
    os.close(theirs)
    return process, ours


def read_until(terminal: int, word: bytes) -> bytes:
    """What appears on a terminal up to a word; all of it if the command ends before."""
    seen = b""
    while word not in seen:
        try:
            seen += os.read(terminal, 4096)
        except OSError:
            break
    return seen


def test_a_terminal_follows_a_running_job_until_ctrl_c(tmp_path: Path) -> None:
    """Loss: a view that stands still, or that ends in a traceback."""
    node = Node(time.time() - 24.0 - EPOCH, folder=tmp_path / "goodput")
    node.load(0)
    node.steps(1, 20)
    process, terminal = on_terminal(tmp_path)
    assert b"step 20 of 1000" in read_until(terminal, b"step 20 of 1000")
    node.steps(21, 25, 0.1)
    assert b"step 25 of 1000" in read_until(terminal, b"step 25 of 1000")
    process.send_signal(signal.SIGINT)
    rest = read_until(terminal, b"Traceback")
    assert process.wait(20) == 0 and b"Traceback" not in rest
    os.close(terminal)
    node.end()


def test_a_terminal_gets_one_report_of_a_run_that_is_over(run: Path) -> None:
    """Loss: a command that never returns."""
    process, terminal = on_terminal(run)
    seen = read_until(terminal, b"\0")
    assert process.wait(20) == 0 and seen.count(b"step 150 of 1000") == 1
    os.close(terminal)


def test_durations_have_two_figures_or_two_units() -> None:
    """Loss: 133.02 min, which nobody can read."""
    seconds = (0.0, 0.0123, 0.412, 9.94, 9.96, 59.4, 59.6, 125, 3600, 7380, 86400 * 3 + 4 * 3600)
    words = ["0 s", "0.012 s", "0.41 s", "9.9 s", "10 s", "59 s", "1 min", "2 min 5 s", "1 h", "2 h 3 min", "3 d 4 h"]
    assert [duration(value) for value in seconds] == words
