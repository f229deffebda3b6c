"""The exit code of a refusal depends on whether time can mend it, and on whether somebody tries again."""

from __future__ import annotations

import pytest

from gai_yolo.errors import RESTART, ConfigError, Refusal, RunFolderBusy
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job.ending import JobEnd
from gai_yolo.log import showing
from gai_yolo.supervision import outcome


@pytest.mark.parametrize(
    ("variables", "code", "said", "waits"),
    [
        ({}, 2, "error: another job", False),
        ({outcome.VARIABLE: "/nowhere/outcome"}, RESTART, "", False),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "0"}, 2, "error: another job", False),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "9"}, RESTART, "waiting: another job", True),
    ],
    ids=["at a terminal", "under the launcher", "torchrun without restarts", "torchrun"],
)
def test_a_busy_folder_is_waited_for_where_somebody_tries_again(
    variables: dict[str, str], code: int, said: str, waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a dead node's lock, which a file server keeps for 90 s, ends the job for good."""
    for name in (outcome.VARIABLE, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended: list[str] = []
    monkeypatch.setattr(outcome, "end_agent", lambda: ended.append("agent"))
    slept: list[float] = []
    monkeypatch.setattr("gai_yolo.job.ending.time.sleep", slept.append)

    def end_with(refusal: Refusal) -> int:
        end = JobEnd(Recorder(0.0))
        with showing(end.show), end.told():
            raise refusal
        return end.leave()

    assert end_with(RunFolderBusy("another job is there.")) == code
    assert capsys.readouterr().err.startswith(said) and bool(slept) == waits and ended == (["agent"] if code == 2 else [])
    assert end_with(ConfigError("no such key.")) == 2
    assert capsys.readouterr().err == "error: no such key.\n"
