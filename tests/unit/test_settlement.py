"""What the first start decides for the whole life of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.config import Config, parse_config
from gai_yolo.data.order import BatchPlan
from gai_yolo.distributed.world import World
from gai_yolo.job.settlement import advice, launcher_advice, settle
from gai_yolo.machine import available_cores
from gai_yolo.store.manifest import Manifest, Position

MANIFEST = Manifest("epoch", Position(10, 1, 640), 0, "", 0, "f" * 16, "2.11.0", "2026-01-01T00:00:00Z")


def config_of(elastic: dict[str, Any] | None = None, **training: Any) -> Config:
    return parse_config({"training": {"batch_size": 64} | training, "elastic": elastic or {}}, "test")


def world_of(world: World, processes: int, local: int = 1, threads: int = 1) -> World:
    world.world_size, world.local_world_size, world.threads = processes, local, threads
    return world


def said(world: World, micro_batch: int, batch: int = 64, samples: int = 1000, threads: int = 1) -> list[str]:
    """The advice for a run."""
    plan = BatchPlan(samples, batch, micro_batch, seed=0)
    return advice(config_of(batch_size=batch, micro_batch_size=micro_batch, threads=threads).training, plan, world)


@pytest.mark.parametrize(
    ("processes", "most", "expected"), [(1, None, 64), (2, None, 32), (3, None, 22), (2, 8, 8), (1, 4, 16), (8, 4, 8), (100, None, 1)]
)
def test_automatic_micro_batches_leave_work_for_the_largest_world(processes: int, most: int | None, expected: int, world: World) -> None:
    """Loss: a run that starts on one spot machine cannot use the other seven when they come."""
    settled = settle(config_of({"max_world_size": most}), None, world_of(world, processes), 1000).config
    assert settled.training.micro_batch_size == expected


def test_what_the_first_start_settled_stays(world: World) -> None:
    """Loss: after a resize BatchNorm sees other groups of images and sums are threaded otherwise: another run."""
    first = settle(config_of({"max_world_size": 4}), None, world_of(world, 2, threads=3), 1000).config
    assert (first.training.micro_batch_size, first.training.threads) == (16, 3)
    found = LoadedCheckpoint(Path("x"), {"config": first.dump()}, "disk", MANIFEST)
    later = settle(config_of(), found, world_of(world, 7, threads=1), 1000).config
    assert later.training == first.training


def test_what_was_settled_before_anything_was_saved_stays_too(world: World) -> None:
    """Loss: two processes that are killed early, and restarted as one, train in other micro-batches: other weights."""
    first = settle(config_of(), None, world_of(world, 2, threads=3), 1000)
    later = settle(config_of(), None, world_of(world, 1, threads=8), 1000, first.values)
    assert later == first and later.notes == []
    assert (later.config.training.micro_batch_size, later.config.training.threads, later.config.training.optimizer) == (32, 3, "adamw")


def test_before_anything_was_saved_changed_settings_are_heeded_and_told(world: World) -> None:
    """Loss: a run that nobody has trained yet is bound to micro-batches that do not suit its new batch; or it is refused."""
    first = settle(config_of(), None, world_of(world, 2, threads=3), 1000)
    later = settle(config_of(batch_size=32, epochs=6000), None, world_of(world, 1, threads=8), 1000, first.values)
    assert (later.config.training.micro_batch_size, later.config.training.threads, later.config.training.optimizer) == (32, 3, "sgd")
    (line,) = later.notes
    assert line == "training.optimizer is settled anew, sgd in place of adamw: the number of steps has changed since"
    again = settle(config_of({"max_world_size": 8}), None, world_of(world, 1), 1000, first.values)
    assert again.notes == ["training.micro_batch_size is settled anew, 8 in place of 32: elastic.max_world_size has changed since"]


def test_a_checkpoint_binds_more_than_the_run_record(world: World) -> None:
    """Loss: a record that another run has left changes the course of one that was saved."""
    first = settle(config_of(), None, world_of(world, 2, threads=3), 1000)
    found = LoadedCheckpoint(Path("x"), {"config": first.config.dump()}, "disk", MANIFEST)
    other = settle(config_of(), None, world_of(world, 8, threads=1), 1000)
    assert settle(config_of(epochs=6000), found, world_of(world, 1), 1000, other.values).config.training.micro_batch_size == 32
    assert settle(config_of(epochs=6000), found, world_of(world, 1), 1000, other.values).config.training.optimizer == "adamw"


def test_numbers_in_the_configuration_are_taken(world: World) -> None:
    """Loss: the machine decides over the configuration."""
    settled = settle(config_of({"max_world_size": 4}, micro_batch_size=5, threads=2), None, world_of(world, 2, threads=7), 1000).config
    assert (settled.training.micro_batch_size, settled.training.threads) == (5, 2)


def test_idle_processes_are_told_of_with_advice(world: World) -> None:
    """Loss: rented machines that wait, and nobody knows why."""
    (line,) = said(world_of(world, 5), 32)
    assert line.startswith("3 of 5 processes have nothing to do: a batch of 64 is cut into 2 micro-batches of 32, and stays so")
    assert line.endswith("training.micro_batch_size=12, or auto and elastic.max_world_size=5")
    (line,) = said(world_of(world, 5), 1, batch=3)
    assert line == "2 of 5 processes have nothing to do: a batch of 3 is cut into 3 micro-batches", "nothing helps"
    (line,) = said(world_of(world, 3), 32, samples=40)
    assert line.startswith("1 of 3 processes have nothing to do: a batch of 40 is cut into 2 micro-batches of 32"), "a small set"


def test_uneven_shares_and_too_many_threads_are_told(world: World) -> None:
    """Loss: half the speed, silently."""
    (line,) = said(world_of(world, 3), 16)
    assert line == "4 micro-batches do not share out evenly among 3 processes; a divisor of 4 would leave none waiting"
    cores = available_cores()
    (line,) = said(world_of(world, 2, local=2), 32, threads=cores)
    assert line.startswith(f"2 processes of {cores} threads share {cores} cores")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_nothing_is_told_where_all_is_well(processes: int, world: World) -> None:
    """Loss: warnings that people learn to overlook."""
    assert said(world_of(world, processes), 16) == []


def test_more_processes_than_cores_with_one_thread_each_are_nothing_to_tell(world: World) -> None:
    """Loss: advice that was followed already."""
    assert said(world_of(world, 8, local=8 * available_cores()), 8) == []


def test_torchrun_is_told_of_what_it_was_not_told(world: World) -> None:
    """Loss: the first fault, or the first node that joins, ends a job that was thought to be elastic."""
    world.world_size = world.local_world_size = 2
    assert launcher_advice(world, {}) == []
    plain = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "0"}
    (line,) = launcher_advice(world, plain)
    assert "--max-restarts=100" in line
    world.world_size = 4
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in launcher_advice(world, plain)[1]
    assert launcher_advice(world, {**plain, "TORCHELASTIC_MAX_RESTARTS": "100", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) == []
