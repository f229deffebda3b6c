"""How a job ends: nothing is called done, and nothing let go, before all processes are through; what it is called, to whom, and with which
exit code."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gai_yolo.config import Config
from gai_yolo.distributed.world import World
from gai_yolo.errors import INTERRUPTED, LEFT, NO_PROGRESS, RESTART, CheckpointError, Departure, Ending, NoProgress, RunFolderBusy
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job.ending import JobEnd, lost_peer
from gai_yolo.job.run import finish, is_on_disk
from gai_yolo.log import showing
from gai_yolo.membership.join import Membership
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.run_record import RunRecord
from gai_yolo.supervision import outcome
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notice, Notices
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.context import JobContext
from tests.conftest import MakeState
from tests.worlds import good, on_ranks

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")


@pytest.mark.parametrize("all_come", [True, False])
def test_a_job_whose_peer_is_lost_at_the_very_end_is_not_done(all_come: bool, tmp_path: Path, make_state: MakeState) -> None:
    """Loss: the launcher hears "done" and leaves rank 0's node alone, whose last checkpoint is on no disk; and the memory is given back."""
    folder, notices = RunFolder(tmp_path / "run"), Notices(CloudWatch("none"))
    watchdog = Watchdog(notices, Limits(), lambda *_: None)
    memory = NodeMemory(tmp_path, folder.path)
    memory.open()
    memory.keep(RunRecord("1-run"))

    def work(world: World) -> tuple[int, Ending | None]:
        if not world.is_first and not all_come:
            return RESTART, None  # it dies
        end = JobEnd(Recorder(0.0))
        context = JobContext(world, folder, NullConsole(), notices, watchdog, end.recorder)
        with end.told():
            finish(make_state(), Config(), Membership(RunRecord("1-run"), memory if world.is_first else None), context)
            end.finished()
        return end.leave(), end.recorder.record().ending

    first, second = good(on_ranks(2, work, patience=20.0 if all_come else 0.5))
    notices.close()
    assert first == ((0, Ending.FINISHED) if all_come else (RESTART, Ending.PEER_LOST))
    assert second == ((0, Ending.FINISHED) if all_come else (RESTART, None))
    assert memory.path.exists() == (not all_come)


def test_a_state_in_the_middle_of_an_epoch_stays_in_memory_when_the_job_is_done(make_state: MakeState) -> None:
    """Loss: training.epochs is lowered, the run is called finished, and the steps after its last epoch, which only memory holds, are gone
    when it is raised again."""
    state = make_state()
    state.step = 12
    assert not is_on_disk(state)
    state.history.append({"epoch": 1, "step": 10})
    assert not is_on_disk(state)
    state.step = 10
    assert is_on_disk(state)


def test_who_was_told_to_go_and_whose_peer_went_first_has_left() -> None:
    """Loss: both processes of a node are told to go, one of them in a step that takes too long leaves by itself, and the other one's end is
    a lost peer's: `gai-yolo launch` ends with 143, as if nothing was saved, and after SIGUSR1 the agent starts the job again."""
    assert lost_peer(LOST, []).ending == Ending.PEER_LOST
    departure = lost_peer(LOST, ["the disk is full"], Notice("SIGUSR1", Ending.LEFT, 0.0, launcher_knows=False))
    assert (departure.ending, departure.launcher_knows) == (Ending.LEFT, False)
    assert departure.reason.startswith("SIGUSR1: left, peer lost: ") and departure.reason.endswith("; the disk is full")


GOES_ON = "; the same command goes on from the newest complete state in /runs/a"
ENDS: list[tuple[BaseException, Ending, str, int, str]] = [
    (Departure("SIGTERM: left after step 3", Ending.LEFT), Ending.LEFT, "SIGTERM: left after step 3", LEFT, "warning"),
    (KeyboardInterrupt(), Ending.INTERRUPTED, "Ctrl-C", INTERRUPTED, "warning"),
    (LOST, Ending.PEER_LOST, f"peer lost: {LOST}", RESTART, "warning"),
    (CheckpointError("a.pt: is damaged."), Ending.REFUSED, "a.pt: is damaged.", 2, "error: a.pt: is damaged."),
    (NoProgress("no hope."), Ending.NO_PROGRESS, "no hope.", NO_PROGRESS, "error: no hope."),
    (RunFolderBusy("another job."), Ending.WAITING, "another job.", RESTART, ""),
    (KeyError("boxes"), Ending.FAILED, "failed: KeyError: 'boxes'", 1, "error: KeyError"),
]


@pytest.mark.parametrize(("error", "ending", "reason", "code", "said"), ENDS, ids=[case[1] for case in ENDS])
@pytest.mark.parametrize("speaks", [True, False], ids=["first of its node", "another process"])
def test_whatever_was_raised_record_launcher_and_person_hear_the_same(
    error: BaseException,
    ending: Ending,
    reason: str,
    code: int,
    said: str,
    speaks: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Loss: a launcher that starts again what was refused, an account that knows no cause, or a line in each of eight logs."""
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path / "outcome"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    warnings: list[str] = []

    def show(record: logging.LogRecord) -> None:
        end.show(record)
        if record.levelno == logging.WARNING:
            warnings.append(record.getMessage())

    end = JobEnd(Recorder(0.0))
    end.run_folder, end.speaks = Path("/runs/a"), speaks
    with showing(show), end.told(), end.told():
        raise error
    with end.told():
        raise OSError("closing fails, too")
    assert end.leave() == code
    record = end.recorder.record()
    is_refused = isinstance(error, ValueError)
    assert (record.ending, record.outcome) == (ending, f"{ending}: {reason}" if is_refused else reason)
    told = json.loads((tmp_path / "outcome").read_text())
    assert (told["ending"], told["reason"], told["code"]) == (ending, reason, ending.exit_code)
    shown = capsys.readouterr().err
    assert "closing fails, too" in shown
    if said == "warning":
        assert warnings == [("interrupted" if isinstance(error, KeyboardInterrupt) else reason) + GOES_ON]
    elif ending == Ending.FAILED:
        assert shown.startswith(said) and "Traceback" in shown, "a bug is loud, whoever it was"
    else:
        assert warnings == [] and shown.startswith(said if speaks else "Traceback")
