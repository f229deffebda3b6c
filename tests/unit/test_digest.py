"""Digests, and the alarm that compares them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gai_yolo.checkpointing.digest import DivergenceAlarm, RankDiffers, part_digests, quick_digest
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.distributed.world import World

MakeState = Callable[..., TrainingState]
PARTS = {"weights", "batch_norm", "ema", "optimizer", "metrics", "position"}


class Cluster(World):
    """A world whose other ranks say what the test wants."""

    def __init__(self, others: list[str]) -> None:
        super().__init__("cpu", 1)
        self.world_size = 1 + len(others)
        self.others, self.asked = others, 0

    def gather(self, item: Any) -> Any:
        self.asked += 1
        return [item, *((other or item[0], f"node{number}") for number, other in enumerate(self.others, start=1))]


def trained(make_state: MakeState, optimizer: str = "adamw") -> TrainingState:
    """A state in which every part has something."""
    state = make_state(optimizer)
    for number, parameter in enumerate(state.model.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-3 * (number % 7))
    state.optimizer.step()
    state.gradient_exponents = [1, 2, 3]
    state.history = [{"epoch": 1, "train_loss": 0.5, "mAP50-95": None, "seconds": 3.0, "images_per_second": 7.0}]
    state.progress.losses["box"], state.progress.seconds = 1.5, 9.0
    return state


def tensors(state: TrainingState) -> list[tuple[str, Tensor]]:
    """Every tensor of a state, with the part that it belongs to."""
    found = []
    for name, tensor in state.model.state_dict().items():
        found.append(("batch_norm" if "running_" in name or "num_batches" in name else "weights", tensor))
    found += [("ema", tensor) for tensor in state.ema.model.state_dict().values()]
    found += [("optimizer", value) for entry in state.optimizer.state.values() for value in entry.values()]
    return found


def flip_a_bit(tensor: Tensor, place: int) -> None:
    """The lowest bit of one element."""
    with torch.no_grad():
        tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)[place * tensor.element_size()] ^= 1


@pytest.mark.parametrize("every", [97, pytest.param(11, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_bit_anywhere_changes_the_digest_of_its_part_alone(optimizer: str, every: int, make_state: MakeState) -> None:
    """Loss: two runs that are called equal and are not; or a difference that is looked for in the wrong place."""
    state = trained(make_state, optimizer)
    before, quick = part_digests(state.capture()), quick_digest(state)
    assert before.keys() == PARTS and len(set(before.values())) == len(PARTS)
    changed = set()
    for number, (part, tensor) in enumerate(tensors(state)):
        if number % every and number > 10:
            continue
        changed.add(part)
        place = number % tensor.numel()
        flip_a_bit(tensor, place)
        after = part_digests(state.capture())
        assert {name for name in PARTS if after[name] != before[name]} == {part}, number
        assert quick_digest(state) != quick
        flip_a_bit(tensor, place)
    assert part_digests(state.capture()) == before and quick_digest(state) == quick
    assert changed == {"weights", "batch_norm", "ema", "optimizer"}


def test_digests_do_not_see_times_and_memory_formats(make_state: MakeState) -> None:
    """Loss: equal runs that are called different because one machine was slower."""
    state = trained(make_state)
    before = part_digests(state.capture())
    state.history[0]["seconds"], state.history[0]["images_per_second"], state.progress.seconds = 99.0, 1.0, 5.0
    state.model.to(memory_format=torch.channels_last)
    assert part_digests(state.capture()) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda state: state.history[0].update(train_loss=0.25), "metrics"),
        (lambda state: state.progress.losses.update(box=2.0), "metrics"),
        (lambda state: setattr(state, "step", state.step + 1), "position"),
        (lambda state: setattr(state, "bad_in_row", 2), "position"),
        (lambda state: setattr(state.progress, "bad_steps", 1), "metrics"),
        (lambda state: setattr(state, "best_metric", 0.5), "position"),
        (lambda state: setattr(state, "gradient_exponents", [1, 2, 4]), "position"),
        (lambda state: state.optimizer.param_groups[0].update(lr=0.5), "optimizer"),
    ],
)
def test_every_plain_value_counts(change: Callable[[TrainingState], None], part: str, make_state: MakeState) -> None:
    """Loss: a difference in what is no tensor goes unnoticed."""
    state = trained(make_state)
    before = part_digests(copy.deepcopy(state.capture()))
    change(state)
    after = part_digests(state.capture())
    assert {name for name in PARTS if after[name] != before[name]} == {part}


def test_the_alarm_compares_at_its_interval_and_before_every_save(make_state: MakeState) -> None:
    """Loss: a state that was never compared is saved."""
    state, cluster = make_state(), Cluster(["", ""])
    alarm = DivergenceAlarm(cluster, 4)
    asked = []
    for step in range(1, 10):
        state.step = step
        alarm.after_step(state, saving=step == 6)
        asked.append(cluster.asked)
    assert asked == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_the_alarm_names_the_rank_that_differs(make_state: MakeState) -> None:
    """Loss: nobody knows which machine is to be taken out."""
    state = make_state()
    state.step = 12
    with pytest.raises(RankDiffers, match=r"^rank 2 on node2 has another state than the other 3 ranks after step 12 .*nothing was saved"):
        DivergenceAlarm(Cluster(["", "bad", ""]), 1).compare(state)
    with pytest.raises(RankDiffers, match=r"^rank 0 on \S+ has another state than the other 2 ranks"):
        DivergenceAlarm(Cluster(["same", "same"]), 1).compare(state)
    with pytest.raises(RankDiffers, match=r"^rank 1 on node1, rank 3 on node3 have another state than the other 3 ranks"):
        DivergenceAlarm(Cluster(["x", "", "y", ""]), 1).compare(state)


def test_two_ranks_that_differ_are_both_named(make_state: MakeState) -> None:
    """Loss: the healthy machine is blamed by the toss of a coin."""
    with pytest.raises(RankDiffers, match=r"^the ranks do not agree: rank 0 on \S+ has \w{8}, rank 1 on node1 has bad"):
        DivergenceAlarm(Cluster(["bad"]), 1).compare(make_state())
    assert RankDiffers("").exit_code == 3


def test_a_single_process_has_nobody_to_compare_with(make_state: MakeState) -> None:
    """Loss: time."""
    alone = Cluster([])
    DivergenceAlarm(alone, 1).after_step(make_state(), saving=True)
    assert alone.asked == 0
