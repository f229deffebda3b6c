"""What ranks do together."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gai_yolo.elastic.process import World, is_lost_peer
from gai_yolo.errors import CheckpointError
from tests.worlds import good, on_ranks


def test_all_wait_for_what_takes_the_first_longer_than_ranks_wait_for_each_other() -> None:
    """Loss: the last checkpoint's slow disk, and the other ranks give the job up, or call it done."""
    ended: list[tuple[int, float]] = []

    def slow(meanwhile: Callable[[], None]) -> str:
        for _ in range(5):
            meanwhile()
            time.sleep(0.05)
        ended.append((-1, time.monotonic()))
        return "done"

    def action(world: World) -> str:
        said = world.from_first_in_time(slow)
        ended.append((world.rank, time.monotonic()))
        return said

    assert good(on_ranks(3, action)) == ["done"] * 3
    assert min(ended, key=lambda end: end[1])[0] == -1 and len(ended) == 4


def test_what_the_first_refuses_all_refuse() -> None:
    """Loss: processes that wait for ever for one that has said what is wrong and gone."""

    def refuse(meanwhile: Callable[[], None]) -> None:
        meanwhile()
        raise CheckpointError("no room")

    results = on_ranks(3, lambda world: world.from_first_in_time(refuse))
    assert [str(result) for result in results] == ["no room"] * 3
    assert all(isinstance(result, CheckpointError) for result in results)


def test_alone_nobody_is_asked(world: World) -> None:
    """Loss: a run of one process needs a process group."""

    def make(meanwhile: Callable[[], None]) -> int:
        meanwhile()
        return 5

    assert world.from_first_in_time(make) == 5


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4"), True),
        (RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "), True),
        (RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ConnectionResetError("reset"), True),
        (ValueError("Timed out"), False),
    ],
)
def test_a_dead_process_is_told_from_a_bug(error: Exception, lost: bool) -> None:
    """Loss: a loader that the kernel has killed ends in a traceback; or a bug is taken for a lost peer, and tried again and again."""
    assert is_lost_peer(error) == lost
