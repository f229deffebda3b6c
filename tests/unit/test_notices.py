"""What the outside world tells: signals and the cloud, remembered until somebody asks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from gai_yolo.errors import Ending
from gai_yolo.supervision.cloud.providers import CloudNotice
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import SIGNALS, Notice, Notices


class Cloud(CloudWatch):
    """Says what the test lets it say."""

    def __init__(self) -> None:
        super().__init__("none")
        self.said: CloudNotice | None = None

    def notice(self) -> CloudNotice | None:
        return self.said


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notices(cloud: Cloud, clock: Clock) -> Iterator[Notices]:
    made = Notices(cloud, clock)
    yield made
    made.close()


def leaving(what: str) -> CloudNotice:
    return CloudNotice("azure", what, leave=True)


def advice(what: str) -> CloudNotice:
    return CloudNotice("aws", what, leave=False)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGTERM, Notice("SIGTERM", Ending.LEFT, 100.0, launcher_knows=True)),
        (signal.SIGHUP, Notice("SIGHUP", Ending.LEFT, 100.0, launcher_knows=True)),
        (signal.SIGUSR1, Notice("SIGUSR1", Ending.LEFT, 100.0, launcher_knows=False)),
        (signal.SIGINT, Notice("Ctrl-C", Ending.INTERRUPTED, 100.0, launcher_knows=True)),
    ],
)
def test_a_signal_stays_until_somebody_asks(number: signal.Signals, expected: Notice, notices: Notices, clock: Clock) -> None:
    """Loss: a preempted machine trains on to its end; or the wrong exit code, and nobody starts the job again."""
    assert notices.pending() is None
    notices.defer(True)
    signal.raise_signal(number)
    assert notices.pending() == expected
    clock.now += 5
    assert notices.pending() == expected, "the time is that of the first look"


def test_a_hang_up_that_is_ignored_stays_ignored(cloud: Cloud) -> None:
    """Loss: a job that was started with nohup ends with the session all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        notices = Notices(cloud)
        os.kill(os.getpid(), signal.SIGHUP)
        assert notices.pending() is None
        notices.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_stands(notices: Notices, clock: Clock) -> None:
    """Loss: a launcher that says it twice makes the grace longer than it is."""
    signal.raise_signal(signal.SIGTERM)
    first = notices.pending()
    clock.now += 3
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    assert notices.pending() == first


def test_ctrl_c_ends_a_start_up_at_once(notices: Notices) -> None:
    """Loss: somebody who sees a typo waits for the data to be read."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    pending = notices.pending()
    assert pending is not None and pending.ending == Ending.INTERRUPTED


def test_while_steps_are_made_only_the_second_ctrl_c_interrupts(notices: Notices) -> None:
    """Loss: the step under way is thrown away by the first; or a job that cannot be ended from its terminal."""
    notices.defer(True)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_sigterm_before_does_not_make_the_first_ctrl_c_the_second(notices: Notices) -> None:
    """Loss: an interrupted save after a notice, by a single Ctrl-C."""
    notices.defer(True)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    pending = notices.pending()
    assert pending is not None and pending.ending == Ending.LEFT


def test_the_handler_of_a_signal_does_nothing_that_can_wait(notices: Notices) -> None:
    """Loss: a process that hangs in a signal handler, because nobody reads what it writes."""
    for _ in range(70_000):  # more than a pipe holds
        signal.raise_signal(signal.SIGTERM)
    pending = notices.pending()
    assert pending is not None and pending.cause == "SIGTERM"


def test_any_thread_sees_a_signal(notices: Notices) -> None:
    """Loss: the watchdog, which acts when the training thread cannot, does not know that there is anything to do."""
    seen: list[Notice | None] = []
    signal.raise_signal(signal.SIGTERM)
    watcher = threading.Thread(target=lambda: seen.append(notices.pending()))
    watcher.start()
    watcher.join()
    assert seen == [notices.pending()] and seen[0] is not None


def test_a_notice_of_the_cloud_may_be_withdrawn_and_come_again(notices: Notices, cloud: Cloud, clock: Clock) -> None:
    """Loss: a machine that stays leaves; or one that goes is taken to have stood under notice for hours, and gets no grace."""
    cloud.said = leaving("Preempt at 3")
    assert notices.pending() == Notice("Preempt at 3", Ending.LEFT, 100.0, launcher_knows=False)
    cloud.said = None
    assert notices.pending() is None
    clock.now = 5000.0
    cloud.said = leaving("Preempt at 3")
    pending = notices.pending()
    assert pending is not None and pending.at == 5000.0


def test_other_words_of_the_cloud_do_not_make_the_grace_longer(notices: Notices, cloud: Cloud, clock: Clock) -> None:
    """Loss: the event begins, its words change, and the clock that counts the seconds to the machine's end starts anew."""
    cloud.said = leaving("Preempt at 3")
    notices.pending()
    clock.now += 4
    cloud.said = leaving("Preempt now")
    assert notices.pending() == Notice("Preempt now", Ending.LEFT, 100.0, launcher_knows=False)


def test_a_signal_stays_when_the_cloud_withdraws(notices: Notices, cloud: Cloud) -> None:
    """Loss: the launcher wants this process to end, and the cloud's change of mind keeps it."""
    cloud.said = leaving("Preempt")
    signal.raise_signal(signal.SIGTERM)
    cloud.said = None
    pending = notices.pending()
    assert pending is not None and pending.cause == "SIGTERM"


def test_advice_is_taken_once_and_nobody_leaves(notices: Notices, cloud: Cloud) -> None:
    """Loss: a state saved at every step for an hour; or a machine that is not going away is left."""
    assert notices.take_advice() is None
    cloud.said = advice("rebalance")
    assert notices.pending() is None
    assert [notices.take_advice(), notices.take_advice()] == ["rebalance", None]
    cloud.said = None
    assert notices.take_advice() is None
    cloud.said = advice("rebalance")
    assert notices.take_advice() == "rebalance", "withdrawn and given again"
    cloud.said = leaving("interruption")
    assert notices.take_advice() is None
    cloud.said = advice("rebalance")
    assert notices.take_advice() is None, "an interruption in between is no withdrawal"


def test_the_signals_are_given_back() -> None:
    """Loss: what runs in this process afterwards cannot be interrupted."""
    before = [signal.getsignal(number) for number in SIGNALS]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    outer = signal.set_wakeup_fd(writer)
    try:
        notices = Notices(Cloud())
        signal.raise_signal(signal.SIGTERM)
        notices.close()
        assert [signal.getsignal(number) for number in SIGNALS] == before
        assert notices.pending() is not None, "what was announced stays to be read"
    finally:
        assert signal.set_wakeup_fd(outer) == writer
        os.close(reader)
        os.close(writer)


def test_a_thread_that_looks_while_they_are_closed_reads_nobody_elses_file(cloud: Cloud) -> None:
    """Loss: the watchdog dies of a bad descriptor; or takes bytes out of a file that got the number, and a job leaves for them."""
    looking, gone_on = threading.Event(), threading.Event()

    def clock() -> float:
        looking.set()
        gone_on.wait(0.3)  # in the middle of a look: there may be more to read
        return 100.0

    notices = Notices(cloud, clock)
    seen: list[Notice | None] = []
    signal.raise_signal(signal.SIGUSR1)
    watcher = threading.Thread(target=lambda: seen.append(notices.pending()))
    watcher.start()
    assert looking.wait(10)
    notices.close()
    reader, writer = os.pipe()
    os.write(writer, bytes([signal.SIGTERM] * 8))
    gone_on.set()
    watcher.join()
    try:
        assert seen == [Notice("SIGUSR1", Ending.LEFT, 100.0, launcher_knows=False)] == [notices.pending()]
        assert os.read(reader, 64) == bytes([signal.SIGTERM] * 8)
    finally:
        os.close(reader)
        os.close(writer)
