"""What a process tells its launcher beside the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gai_yolo.errors import Ending
from gai_yolo.supervision import outcome
from gai_yolo.supervision.outcome import Outcome
from tests.harness import REPOSITORY, environment


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "outcome.json"
    monkeypatch.setenv(outcome.VARIABLE, str(path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    return path


def test_the_code_and_the_reason_are_told(path: Path) -> None:
    """Loss: torchrun makes every code a 1, and the launcher starts again what must not be, or does not what must."""
    outcome.report(Outcome(Ending.LEFT, "SIGTERM: left after step 7 \N{EM DASH} gesichert"))
    outcome.report(Outcome(Ending.PEER_LOST, "peer lost"))
    said = json.loads(path.read_text())
    assert 0 <= time.monotonic() - said.pop("at") < 20
    assert said == {"code": 76, "reason": "peer lost", "ending": "peer lost"}
    assert [file.name for file in path.parent.iterdir()] == ["outcome.json"], "no drafts"


def test_the_nodes_other_processes_tell_only_what_may_be_the_cause(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a process that ended because the first one did hides the cause; or the one that is the cause is not heard."""
    outcome.report(Outcome(Ending.NO_PROGRESS, "no progress"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    outcome.report(Outcome(Ending.PEER_LOST, "peer lost"))
    outcome.clear()
    assert json.loads(path.read_text())["code"] == 4
    assert [file.name for file in path.parent.iterdir()] == ["outcome.json"]
    outcome.report(Outcome(Ending.FAILED, "KeyError: 7"))
    assert json.loads(path.with_name("outcome.json.1").read_text())["ending"] == "failed"
    outcome.clear()
    assert [file.name for file in path.parent.iterdir()] == ["outcome.json"]


def test_what_a_former_process_said_is_forgotten(path: Path) -> None:
    """Loss: the process is killed, and its launcher believes what the one before it said."""
    outcome.clear()
    outcome.report(Outcome(Ending.FINISHED, "finished"))
    outcome.clear()
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_nobodys_loss(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a full disk replaces the exit code by a traceback."""
    monkeypatch.setenv(outcome.VARIABLE, str(path / "missing" / "file"))
    outcome.report(Outcome(Ending.FINISHED, "finished"))
    outcome.clear()
    monkeypatch.delenv(outcome.VARIABLE)
    outcome.report(Outcome(Ending.FINISHED, "finished"))
    outcome.clear()
    assert list(path.parent.iterdir()) == []


AGENT = """
import ctypes, os, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: an orphan becomes this process's child
signal.signal(signal.SIGTERM, lambda *_: (print("ended", flush=True), os._exit(0)))
command = [sys.executable, "-c", sys.argv[1]]
middle = subprocess.Popen(["sh", "-c", '"$0" -c "$1" & echo; wait', *command[::2]] if sys.argv[2] == "orphan" else command)
if sys.argv[2] == "orphan":
    sys.stdin.readline()
    middle.kill()
    middle.wait()
os.wait()
print("goes on", flush=True)
"""
WORKER = """
import os
from gai_yolo.supervision import outcome
from gai_yolo.errors import Ending
print("ready", flush=True)
if os.environ.get("ORPHAN"):
    while os.getppid() == outcome.AGENT:
        pass
outcome.end_agent()
"""


def what_the_agent_says(kind: str, **variables: str) -> str:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, WORKER, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**environment(), **variables},
        start_new_session=True,
    )
    assert agent.stdout is not None and agent.stdin is not None
    while agent.stdout.readline() != "ready\n":
        assert agent.poll() is None
    with agent, agent.stdout, agent.stdin:
        if kind == "orphan":
            agent.stdin.write("\n")
            agent.stdin.flush()
        return agent.stdout.read().strip()


UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_MAX_RESTARTS": "3", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (UNDER_TORCHRUN, "ended"),
        ({**UNDER_TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "0"}, "goes on"),
        ({**UNDER_TORCHRUN, "LOCAL_RANK": "1"}, "goes on"),
        ({}, "goes on"),
    ],
    ids=["an agent that would start it again", "one that would not", "another rank", "no torchrun"],
)
def test_an_agent_that_would_start_this_process_again_is_ended(variables: dict[str, str], expected: str) -> None:
    """Loss: a node under notice takes part again until it is switched off; or whatever started the process is killed."""
    assert what_the_agent_says("parent", **variables) == expected


def test_whoever_inherits_an_orphan_is_not_ended() -> None:
    """Loss: the agent is dead, and the first process of the container, or of the machine, is killed in its place."""
    assert what_the_agent_says("orphan", ORPHAN="1", **UNDER_TORCHRUN) == "goes on"
