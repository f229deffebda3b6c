"""What ranks do together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import pytest

from gai_yolo.distributed.environment import check_environment
from gai_yolo.distributed.world import World, is_lost_peer
from gai_yolo.errors import CheckpointError, ConfigError
from tests.worlds import good, on_ranks

PATIENCE = 1.5
"""Seconds that ranks wait for each other in these tests; longer than a beat."""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_wait_for_long_work_wherever_it_is_done(slow: int) -> None:
    """Loss: a job that is started again for ever, because one rank scores, reads or fills its cache for longer than ranks wait."""

    def score() -> str:
        time.sleep(2 * PATIENCE)
        return "scored"

    def action(world: World) -> tuple[list[int], str]:
        world.begin_long_work()
        if world.rank == slow:
            time.sleep(2 * PATIENCE)
        everybody = world.gather(world.rank)
        said = world.from_first(score)
        world.together(lambda: time.sleep(2 * PATIENCE if world.rank == slow else 0))
        world.end_long_work()
        return everybody, said

    assert good(on_ranks(2, action, patience=PATIENCE)) == [([0, 1], "scored")] * 2


def test_outside_of_long_work_a_rank_that_does_not_come_is_given_up() -> None:
    """Loss: a hanging rank keeps all others, in each step, for ever; and a test of the above that would hold without any beats."""

    def action(world: World) -> list[int]:
        world.begin_long_work()
        world.end_long_work()
        if world.rank == 1:
            time.sleep(2 * PATIENCE)
        return world.gather(world.rank)

    assert all(isinstance(result, RuntimeError) for result in on_ranks(2, action, patience=PATIENCE))


def test_a_rank_that_dies_is_missed_by_those_who_wait_and_those_who_work() -> None:
    """Loss: an hour of scoring for a job that has lost its other half; or ranks that wait for the dead for ever."""
    seen: list[str | None] = []

    def action(world: World) -> None:
        world.begin_long_work()
        if world.rank == 2:
            time.sleep(0.3)
            world.leave()  # as a process that is gone: nobody beats for it
            return
        if world.rank == 1:
            wait_until(lambda: world.lost is not None)
            seen.append(world.lost)
        world.meet()

    results = on_ranks(3, action, patience=PATIENCE)
    assert [type(result) for result in results[:2]] == [threading.BrokenBarrierError] * 2
    assert seen and str(seen[0]).startswith("peer lost: ")


def test_who_waits_for_others_says_so() -> None:
    """Loss: the watchdog of a rank that waits for another one's scoring takes it for a hang."""

    seen = threading.Event()

    def look(world: World) -> None:
        wait_until(lambda: world.is_waiting)
        seen.set()

    def action(world: World) -> bool:
        world.begin_long_work()
        if world.rank == 1:
            assert seen.wait(20)
            world.leave()
            return False
        assert not world.is_waiting
        threading.Thread(target=look, args=(world,)).start()
        with contextlib.suppress(RuntimeError):
            world.meet()
        return not world.is_waiting

    assert good(on_ranks(2, action, patience=PATIENCE)) == [True, False]


def test_long_work_begins_and_ends_again_and_again() -> None:
    """Loss: beats of one evaluation that are counted in the next."""

    def action(world: World) -> int:
        for number in range(20):
            world.begin_long_work()
            if (number + world.rank) % 3 == 0:
                time.sleep(0.005)
            assert world.gather(number) == [number] * 3
            world.end_long_work()
        world.end_long_work()
        return len(world.gather(None))

    assert good(on_ranks(3, action)) == [3] * 3


def test_what_the_first_refuses_all_refuse() -> None:
    """Loss: processes that wait for ever for one that has said what is wrong and gone."""

    def refuse() -> None:
        raise CheckpointError("no room")

    results = on_ranks(3, lambda world: world.from_first(refuse))
    assert [str(result) for result in results] == ["no room"] * 3
    assert all(isinstance(result, CheckpointError) for result in results)


def test_alone_nobody_is_asked(world: World) -> None:
    """Loss: a run of one process needs a process group."""
    world.begin_long_work()
    world.meet()
    assert world.from_first(lambda: 5) == 5 and world.gather(6) == [6]
    assert not world.is_waiting and world.lost is None
    world.end_long_work()


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


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables", [{}, TORCHRUN, BY_HAND, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"MASTER_ADDR": "node0"}])
def test_an_environment_that_makes_sense_is_taken(variables: dict[str, str]) -> None:
    """Loss: what an operator sets, of each pod's one process, is refused."""
    check_environment(variables)


def test_every_subset_of_the_variables_is_taken_or_refused_with_a_name() -> None:
    """Loss: a KeyError, an IndexError, or two processes that both think that they are the first."""
    for chosen in range(1 << len(TORCHRUN)):
        given = {name: value for bit, (name, value) in enumerate(TORCHRUN.items()) if chosen >> bit & 1}
        makes_sense = "LOCAL_RANK" not in given or "LOCAL_WORLD_SIZE" in given
        makes_sense &= "WORLD_SIZE" in given or not {"RANK", "LOCAL_WORLD_SIZE"} & given.keys()
        makes_sense &= "WORLD_SIZE" not in given or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= given.keys()
        if makes_sense:
            check_environment(given)
        else:
            with pytest.raises(ConfigError, match=r"^[A-Z_]+=\d .*; start the job with gai-yolo launch or torchrun"):
                check_environment(given)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(name: str) -> None:
    """Loss: a traceback of int()."""
    with pytest.raises(ConfigError, match=f"^{name}=: is no whole number"):
        check_environment({**TORCHRUN, name: ""})
