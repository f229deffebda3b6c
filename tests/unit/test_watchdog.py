"""The thread that acts where the training thread cannot."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from gai_yolo.errors import LEFT, RESTART, Ending
from gai_yolo.goodput.record import Phase
from gai_yolo.supervision.notices import Notice, Notices
from gai_yolo.supervision.watchdog import FIRST_STEP_FACTOR, LOST_PATIENCE, TICK, Limits, Watchdog, activity_of
from tests.harness import REPOSITORY, environment

GRACE, STEP_TIMEOUT, IDLE_TIMEOUT = 15.0, 60.0, 300.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Standing(Notices):
    """A notice that the test gives and takes; no signals."""

    def __init__(self) -> None:
        self.now: Notice | None = None

    def pending(self) -> Notice | None:
        return self.now


class Scene:
    """A watchdog, its clock, and everything that it does, in order."""

    def __init__(self, grace: float = GRACE, step_timeout: float = STEP_TIMEOUT, real_time: bool = False) -> None:
        self.now = 1000.0
        self.did: list[str] = []
        self.terminal_is_gone = False
        self.terminal_goes_on = threading.Event()
        self.terminal_goes_on.set()
        self.left = threading.Event()
        self.notices = Standing()
        clock = time.monotonic if real_time else lambda: self.now
        self.active = 0.0
        """Processor time of the training thread; stands still unless a test moves it."""
        self.looks = 0
        self.slept = 0.0
        """Seconds in which nothing runs, from the end of the next look on."""
        limits = Limits(grace, step_timeout, IDLE_TIMEOUT)
        self.dog = Watchdog(self.notices, limits, self.farewell, self.leave, clock, self.activity)

    def activity(self) -> float:
        """The last thing that a look asks for, whoever looks."""
        self.looks += 1
        self.now, self.slept = self.now + self.slept, 0.0
        return self.active

    def wait_for_looks(self, count: int) -> None:
        """Until the thread has looked so many times more, or left."""
        seen = self.looks
        wait_until(lambda: self.looks >= seen + count or self.left.is_set())

    def farewell(self, ending: Ending, reason: str, launcher_knows: bool) -> None:
        if self.terminal_is_gone:
            raise BrokenPipeError
        assert self.terminal_goes_on.wait(20)
        self.did.append(f"{ending.exit_code} {reason} ({'known' if launcher_knows else 'unknown'} to the launcher)")

    def leave(self, code: int) -> NoReturn:
        self.did.append(f"left {code}")
        self.left.set()
        if not isinstance(threading.current_thread(), threading.Timer):  # they have nothing else to do
            raise SystemExit(code)
        return None  # type: ignore[misc]

    def rescue(self) -> list[str]:
        self.did.append("saved")
        return []

    def step(self, seconds: float) -> None:
        self.dog.enter(Phase.STEP)
        self.now += seconds
        self.dog.step_done()

    def look(self) -> bool:
        """Whether the process left."""
        try:
            self.dog.look()
        except SystemExit:
            return True
        return False

    def look_after(self, seconds: float) -> bool:
        self.now += seconds
        return self.look()


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_hanging_step_shows_its_stacks_saves_and_ends(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: a job that hangs until a person looks; or one that ends and says not where, or loses what could be saved."""
    scene.dog.rescue = scene.rescue
    for _ in range(3):
        scene.step(1.0)
    scene.dog.enter(Phase.DATA)
    assert not scene.look_after(STEP_TIMEOUT)
    assert scene.look_after(1.0)
    said = f"{RESTART} step hung: none for 61 s, see the stacks above; the last step's state is saved (known to the launcher)"
    assert scene.did == ["saved", said, f"left {RESTART}"]
    assert "test_watchdog.py" in capfd.readouterr().err


def test_the_first_steps_may_take_longer(scene: Scene) -> None:
    """Loss: a job that is ended while its loaders start, again and again."""
    scene.dog.enter(Phase.DATA)
    assert not scene.look_after(FIRST_STEP_FACTOR * STEP_TIMEOUT)
    assert scene.look_after(1.0)


def test_a_run_of_long_steps_is_not_taken_for_hanging(scene: Scene) -> None:
    """Loss: a large model on few machines is ended at every step; or one slow step among fast ones makes the dog sleep."""
    for seconds in (20.0, 22.0, 500.0, 21.0, 20.0):
        scene.step(seconds)
    assert scene.dog.patience == 210.0
    assert not scene.look_after(209.0)
    assert scene.look_after(2.0)


OWN_WORK = [Phase.EVALUATION, Phase.LOAD, Phase.CLOSING]


@pytest.mark.parametrize("phase", OWN_WORK)
def test_only_steps_are_timed(phase: Phase, scene: Scene) -> None:
    """Loss: an evaluation of an hour is taken for a step; or the first step after it for one that took an hour."""
    for _ in range(3):
        scene.step(1.0)
    scene.dog.enter(phase)
    for _ in range(60):
        scene.active += 0.001  # it computes, or reads
        assert not scene.look_after(IDLE_TIMEOUT - 1)
    scene.dog.enter(Phase.SNAPSHOT)
    assert not scene.look_after(STEP_TIMEOUT + 1), "a checkpoint between epochs is no step"
    scene.dog.enter(Phase.DATA)
    assert not scene.look_after(STEP_TIMEOUT - 1)
    scene.dog.step_done()
    assert scene.dog.patience == STEP_TIMEOUT


@pytest.mark.parametrize("phase", OWN_WORK)
def test_a_thread_that_does_nothing_at_all_hangs(phase: Phase, scene: Scene) -> None:
    """Loss: a job of one process that waits for a dead network disk, or for itself, until a person looks."""
    scene.dog.rescue = scene.rescue
    scene.dog.enter(phase)
    assert not scene.look_after(IDLE_TIMEOUT)
    assert scene.look_after(1.0)
    assert scene.did[0] == "saved" and f"{RESTART} {phase} hung: nothing has moved for 301 s (in " in scene.did[1]


def test_an_evaluation_without_a_batch_hangs_even_if_it_computes(scene: Scene) -> None:
    """Loss: a loader or a GPU that does not answer any more, in an evaluation, where no step is missed; PyTorch's waiting is not idle."""
    scene.dog.enter(Phase.EVALUATION)
    batches = scene.dog.counted(range(10))
    for _ in range(5):
        next(batches)
        scene.now += 8.0
    scene.active += 1.0
    assert not scene.look_after(STEP_TIMEOUT)
    scene.active += 1.0
    assert scene.look_after(20.0 + 1.0)
    assert f"{RESTART} evaluation hung: no batch for 89 s, see the stacks above" in scene.did[0]


def test_slow_batches_are_no_hang_nor_what_follows_them(scene: Scene) -> None:
    """Loss: a large model's evaluation on a slow machine, or its scoring, which has no batches, is ended each time."""
    scene.dog.enter(Phase.EVALUATION)
    for _ in scene.dog.counted(range(6)):
        assert not scene.look_after(FIRST_STEP_FACTOR * STEP_TIMEOUT)
    scene.active += 1.0
    assert not scene.look_after(10 * FIRST_STEP_FACTOR * STEP_TIMEOUT)


class Waiting:
    """Other ranks that work."""

    is_waiting = True
    lost: str | None = None


@pytest.mark.parametrize("phase", [Phase.EVALUATION, Phase.LOAD, Phase.CLOSING, Phase.REPORTING])
def test_who_waits_for_others_long_work_does_not_hang(phase: Phase, scene: Scene) -> None:
    """Loss: every rank but the one that scores is ended, again and again."""
    others = Waiting()
    scene.dog.others = others
    scene.dog.enter(phase)
    assert not scene.look_after(3600.0)
    others.is_waiting = False
    assert not scene.look_after(IDLE_TIMEOUT) and scene.look_after(1.0)


def test_who_works_when_another_rank_is_lost_is_ended(scene: Scene) -> None:
    """Loss: an hour of scoring for a job that has lost its other half, before anybody starts it again."""
    others = Waiting()
    scene.dog.others, scene.dog.rescue = others, scene.rescue
    scene.dog.enter(Phase.EVALUATION)
    assert not scene.look()
    others.is_waiting, others.lost = False, "peer lost: connection reset"
    assert not scene.look() and not scene.look_after(LOST_PATIENCE - 0.1), "it may say so itself"
    assert scene.look_after(0.1)
    assert scene.did[:2] == ["saved", f"{RESTART} peer lost: connection reset; the last step's state is saved (known to the launcher)"]


@pytest.mark.parametrize("told_first", [True, False])
def test_who_was_told_to_go_before_its_peers_went_leaves(told_first: bool, scene: Scene) -> None:
    """Loss: on a machine that is going the job is started again, or its scheduler takes its end for a failure: 143 in place of 75."""
    others = Waiting()
    scene.dog.others, scene.dog.rescue = others, scene.rescue
    scene.dog.enter(Phase.SNAPSHOT)
    scene.now += 0.5
    others.is_waiting, others.lost = False, "peer lost: connection reset"
    if not told_first:
        assert not scene.look()  # the agent ends those that are left
        scene.now += 0.1
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, scene.now, True)
    assert not scene.look()
    assert scene.look_after(LOST_PATIENCE)
    assert scene.did[1].startswith(f"{LEFT} SIGTERM: peer lost" if told_first else f"{RESTART} peer lost")


def test_waiting_for_a_disk_that_moves_is_no_hang(scene: Scene) -> None:
    """Loss: a slow disk ends the training, by way of a step that waits for it."""
    for _ in range(3):
        scene.step(1.0)
    scene.dog.enter(Phase.SNAPSHOT)
    for _ in range(100):
        assert not scene.look_after(STEP_TIMEOUT - 1)
        scene.dog.progress()
    assert scene.look_after(STEP_TIMEOUT + 1)


def test_activity_is_that_of_the_thread() -> None:
    """Loss: the watchdog's own looks count for work, and nothing ever hangs; or one who works stands still."""
    ready, go_on = threading.Event(), threading.Event()
    measured: list[Callable[[], float]] = []

    def work() -> None:
        measured.append(activity_of(threading.get_ident()))
        ready.set()
        go_on.wait()
        sum(range(100_000))
        ready.set()
        threading.Event().wait(0.5)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    idle = -1.0

    def stands_still() -> bool:
        nonlocal idle
        before, idle = idle, measured[0]()
        time.sleep(0.05)
        return before == idle == measured[0]()

    wait_until(stands_still)
    ready.clear()
    go_on.set()
    ready.wait()
    assert measured[0]() > idle
    thread.join()


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        (Phase.IMPORT, 0.0),
        (Phase.RENDEZVOUS, 0.0),
        (Phase.LOAD, 0.0),
        (Phase.EVALUATION, 0.0),
        (Phase.STEP, 3.0),
        (Phase.DATA, 3.0),
        (Phase.SNAPSHOT, 3.0),
        (Phase.CLOSING, 9.0),
    ],
)
def test_a_notice_leaves_the_training_thread_time_for_its_step(phase: Phase, seconds: float, scene: Scene) -> None:
    """Loss: half a step, each time; or the machine is gone before anything is saved, because a peer that is dead was waited for."""
    scene.dog.rescue = scene.rescue
    scene.dog.enter(phase)
    scene.notices.now = Notice("SIGUSR1", Ending.LEFT, scene.now, launcher_knows=False)
    if seconds:
        assert not scene.look() and not scene.look_after(seconds - 0.1)
        scene.now += 0.1
    assert scene.look()
    said = f"{LEFT} SIGUSR1: this process leaves; the last step's state is saved (unknown to the launcher)"
    assert scene.did == ["saved", said, f"left {LEFT}"]


def test_a_withdrawn_notice_is_none(scene: Scene) -> None:
    """Loss: a machine that stays is left."""
    scene.dog.enter(Phase.STEP)
    scene.notices.now = Notice("Preempt", Ending.LEFT, scene.now, launcher_knows=False)
    assert not scene.look_after(2.0)
    scene.notices.now = None
    assert not scene.look_after(20.0) and scene.did == []


def test_nothing_is_saved_where_there_is_nothing(scene: Scene) -> None:
    """Loss: a start-up that cannot be ended, or that says it saved something."""
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, scene.now, launcher_knows=True)
    assert scene.look()
    assert scene.did == [f"{LEFT} SIGTERM: this process leaves (known to the launcher)", f"left {LEFT}"]


def test_what_could_not_be_saved_is_said(scene: Scene) -> None:
    """Loss: somebody believes the state to be on the disk."""
    scene.dog.rescue = lambda: ["no room", "no right"]
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, scene.now, launcher_knows=True)
    assert scene.look() and "not everywhere saved: no room; no right" in scene.did[0]


def test_a_rescue_that_fails_in_an_unknown_way_ends_the_process_all_the_same(scene: Scene) -> None:
    """Loss: the thread that was to end the process is dead, and the process lives on."""

    def fail() -> list[str]:
        raise ValueError("who would have thought")

    scene.dog.rescue = fail
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, scene.now, launcher_knows=True)
    assert scene.look()
    assert "not everywhere saved: ValueError: who would have thought" in scene.did[0] and scene.did[1] == f"left {LEFT}"


def test_a_terminal_that_is_gone_does_not_keep_the_process(scene: Scene) -> None:
    """Loss: the last words cannot be written, and so the process never ends."""
    scene.terminal_is_gone = True
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, scene.now, launcher_knows=True)
    assert scene.look()
    assert scene.did == [f"left {LEFT}"]


def test_a_stderr_that_is_none_does_not_keep_the_process(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: the stacks cannot be shown, and so a hanging step hangs for ever."""
    monkeypatch.setattr(sys, "stderr", None)
    scene.dog.enter(Phase.STEP)
    assert scene.look_after(FIRST_STEP_FACTOR * STEP_TIMEOUT + 1)


def in_background(scene: Scene) -> None:
    threading.Thread(target=scene.look, daemon=True).start()


def test_a_disk_that_hangs_holds_the_process_no_longer_than_the_grace() -> None:
    """Loss: a process that waits for a dead disk until the machine is gone, and its launcher is never told."""
    scene = Scene(grace=0.6, real_time=True)
    hanging, started = threading.Event(), time.monotonic()

    def rescue() -> list[str]:
        hanging.wait()
        return []

    scene.dog.rescue = rescue
    scene.notices.now = Notice("Preempt", Ending.LEFT, started, launcher_knows=False)
    in_background(scene)
    assert scene.left.wait(5.0)
    assert scene.did[:2] == [
        f"{LEFT} Preempt: this process leaves; the state could not be saved in time (unknown to the launcher)",
        f"left {LEFT}",
    ]
    wait_until(lambda: len(scene.did) > 2)
    assert scene.did[2] == f"left {LEFT}", "the last word is not waited for either"
    hanging.set()


def test_last_words_that_hang_hold_the_process_no_longer_than_the_grace() -> None:
    """Loss: a terminal that was stopped with Ctrl-S keeps a process on a machine that goes away."""
    scene = Scene(grace=0.6, real_time=True)
    scene.terminal_goes_on.clear()
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, time.monotonic(), launcher_knows=True)
    in_background(scene)
    assert scene.left.wait(5.0)
    assert scene.did[0] == f"left {LEFT}"
    scene.terminal_goes_on.set()


def test_saving_may_take_what_is_left_of_the_grace() -> None:
    """Loss: a slow disk is cut off in the middle of the last state, with seconds to spare."""
    scene = Scene(grace=3.0, real_time=True)

    def rescue() -> list[str]:
        time.sleep(1.1)  # more than a third
        return scene.rescue()

    scene.dog.rescue = rescue
    scene.dog.enter(Phase.EVALUATION)
    scene.notices.now = Notice("SIGTERM", Ending.LEFT, time.monotonic(), launcher_knows=True)
    assert scene.look()
    assert scene.did[0] == "saved" and "the last step's state is saved" in scene.did[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is how `leave` ends the thread
def test_time_in_which_the_process_was_stopped_counts_for_nothing() -> None:
    """Loss: whoever wakes a machine that slept finds every job on it killed."""
    scene = Scene(step_timeout=2.0)
    for _ in range(3):
        scene.step(0.1)
    scene.dog.enter(Phase.STEP)
    scene.dog.start()
    scene.wait_for_looks(1)
    scene.slept = 3600.0
    scene.wait_for_looks(3)
    assert scene.slept == 0.0 and scene.did == []
    for _ in range(2):
        assert not scene.left.is_set()
        scene.slept = 9 * TICK  # a busy machine, but nobody slept
        scene.wait_for_looks(2)
    assert scene.left.wait(20), "it still looks"
    scene.dog.stop()
    assert scene.did[-1] == f"left {RESTART}"


def test_it_can_be_stopped(scene: Scene) -> None:
    """Loss: an orderly end is taken for a hang."""
    scene.dog.start()
    scene.wait_for_looks(1)
    scene.dog.stop()
    before = Scene()
    before.dog.stop()
    before.dog.start()
    looks = scene.looks, before.looks
    for one in (scene, before):
        one.dog.enter(Phase.STEP)
        one.now += 3600
    time.sleep(3 * TICK)
    assert (scene.looks, before.looks) == looks and scene.did == before.did == []


WORKER = """
import ctypes, sys
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notices
from gai_yolo.goodput.record import Phase
from gai_yolo.supervision.watchdog import Limits, Watchdog

def farewell(ending, reason, launcher_knows):
    print(ending.exit_code, reason, flush=True)

dog = Watchdog(Notices(CloudWatch("none")), Limits(2.0, 60.0), farewell)
dog.rescue = lambda: []
dog.enter(Phase.STEP)
dog.start()
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
for _ in range(2):  # the second time it waits for ever, as for a peer: no handler of Python runs any more
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_sigterm_is_heeded_while_the_training_thread_waits_for_a_dead_peer() -> None:
    """Loss: exactly where the peers are dead a process does not hear that it is to leave, and is killed with its last steps."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment(), start_new_session=True
    )
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    time.sleep(0.3)
    worker.terminate()
    try:
        out, _ = worker.communicate(timeout=10)
    finally:
        worker.kill()
    assert worker.returncode == LEFT
    assert out == f"{LEFT} SIGTERM: this process leaves; the last step's state is saved\n"


def test_a_worker_does_not_outlive_its_agent() -> None:
    """Loss: orphans that train on, and write into the run of those who were started in their place."""
    agent = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, WORKER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**environment(), "TORCHELASTIC_RUN_ID": "job"},
    )
    assert agent.stdout is not None and agent.stdout.readline() == "ready\n"
    agent.kill()
    out, _ = agent.communicate(timeout=10)  # ends when the worker has
    assert out == f"{RESTART} the launcher's agent is gone; the last step's state is saved\n"
