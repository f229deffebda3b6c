"""How a job ends: nothing is called done, and nothing let go, before all processes are through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gai_yolo.config import Config
from gai_yolo.data.index import Index
from gai_yolo.distributed.world import World
from gai_yolo.errors import LEFT, Departure, Ending
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job import run as job
from gai_yolo.job.startup import Options
from gai_yolo.membership.environment import Environment
from gai_yolo.membership.join import Membership
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.run_record import RunRecord
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notice, Notices
from gai_yolo.supervision.watchdog import Watchdog
from gai_yolo.training.context import JobContext
from tests.conftest import MakeState


class Alike(Environment):
    """Nothing is compared."""

    def check_data(self, world: World, indexes: Sequence[Index]) -> None:
        assert world.is_first and not indexes


@pytest.fixture
def context(tmp_path: Path, world: World) -> Iterator[JobContext]:
    notices = Notices(CloudWatch("none"))
    watchdog = Watchdog(notices, 15.0, 60.0, lambda *_: None)
    yield JobContext(world, RunFolder(tmp_path / "run"), NullConsole(), notices, watchdog, Recorder(0.0))
    notices.close()


@pytest.mark.parametrize("all_came", [True, False])
def test_a_job_whose_peer_is_lost_at_the_very_end_is_not_done(
    all_came: bool, context: JobContext, tmp_path: Path, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: the launcher hears "done" and leaves rank 0's node alone, whose last checkpoint is on no disk; and the memory is given back."""
    memory = NodeMemory(tmp_path, context.folder.path)
    memory.open()
    memory.keep(RunRecord("1-run"))
    monkeypatch.setattr(job, "read_data", lambda *_: ())
    monkeypatch.setattr(job, "open_run", lambda *_: Membership(RunRecord("1-run"), memory))
    monkeypatch.setattr(job, "train_to_the_end", lambda *_: make_state())
    monkeypatch.setattr(context.world, "wait_for_all", lambda: all_came)
    said: list[Ending] = []
    monkeypatch.setattr(context.recorder, "ended", said.append)
    if all_came:
        job.run_in(Config(), Options(), context, Alike({}, {}, None))
    else:
        with pytest.raises(Departure) as departure:
            job.run_in(Config(), Options(), context, Alike({}, {}, None))
        assert departure.value.ending == Ending.PEER_LOST
    assert said == ([Ending.FINISHED] if all_came else [])
    assert memory.path.exists() == (not all_came)


def test_a_state_in_the_middle_of_an_epoch_stays_in_memory_when_the_job_is_done(make_state: MakeState) -> None:
    """Loss: training.epochs is lowered, the run is called finished, and the steps after its last epoch, which only memory holds, are gone
    when it is raised again."""
    state = make_state()
    state.step = 12
    assert not job.is_on_disk(state)
    state.history.append({"epoch": 1, "step": 10})
    assert not job.is_on_disk(state)
    state.step = 10
    assert job.is_on_disk(state)


def test_who_was_told_to_go_and_whose_peer_went_first_has_left() -> None:
    """Loss: both processes of a node are told to go, one of them in a step that takes too long leaves by itself, and the other one's end is
    a lost peer's: `gai-yolo launch` ends with 143, as if nothing was saved, and after SIGUSR1 the agent starts the job again."""
    error = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    assert job.lost_peer(error, []).ending == Ending.PEER_LOST
    departure = job.lost_peer(error, ["the disk is full"], Notice("SIGUSR1", LEFT, 0.0, launcher_knows=False))
    assert (departure.ending, departure.launcher_knows) == (Ending.LEFT, False)
    assert departure.reason.startswith("SIGUSR1: left, peer lost: ") and departure.reason.endswith("; the disk is full")
