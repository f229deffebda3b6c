"""Nodes that are not alike: who is refused, who goes on, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gai_yolo.config import Config, shared_values
from gai_yolo.data.index import Category, Index, Records, empty_record
from gai_yolo.distributed.world import World
from gai_yolo.errors import RESTART, Departure, Refusal
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job.startup import Options, compare_nodes
from gai_yolo.membership.consistency import Member, compare, must_agree
from gai_yolo.membership.environment import Environment, processor_facts, read_record
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notices
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.context import JobContext
from tests.worlds import on_ranks, told_on_first


def members(facts: Sequence[dict[str, Any]], per_node: int = 1, records: dict[int, dict[str, Any]] | None = None) -> list[Member]:
    """One for each rank; `records` by rank."""
    return [Member(f"node{rank // per_node}", rank, rank // per_node, known, (records or {}).get(rank)) for rank, known in enumerate(facts)]


def results(facts: Sequence[dict[str, Any]], per_node: int = 1, records: dict[int, dict[str, Any]] | None = None) -> list[Any]:
    """What each rank is told."""
    return on_ranks(len(facts), lambda world: must_agree(world, facts[world.rank], (records or {}).get(world.rank)), per_node)


def kinds(told: Sequence[Any]) -> str:
    """`r` for a refusal, `d` for a departure, `-` for nothing."""
    return "".join("-" if one is None else "d" if isinstance(one, Departure) else "r" if isinstance(one, Refusal) else "?" for one in told)


USUAL, OTHER = {"loss.box": 7.5, "augment.flip": 0.5}, {"loss.box": 15.0, "augment.flip": 0.0}


def test_nodes_that_are_alike_are_told_nothing() -> None:
    assert kinds(results([USUAL, dict(USUAL), USUAL])) == "---"


def test_the_sentence_names_node_keys_and_both_values() -> None:
    """Loss: a person who has to search four nodes' files for what differs."""
    difference = compare(members([USUAL, OTHER]))
    assert difference is not None
    expected = "node1 (rank 1) has loss.box 15.0 and augment.flip 0.0, node0 (rank 0) has 7.5 and 0.5"
    assert difference.sentence() == expected


def test_the_sentence_stays_short() -> None:
    """Loss: a screen full of keys of which the first would do."""
    many, others = ({f"key{number}": value for number in range(9)} for value in (1, 2))
    difference = compare(members([many, others]))
    assert difference is not None and "key3 2 (and 5 more), node0 (rank 0) has 1" in difference.sentence()
    assert "key4" not in difference.sentence()


def test_a_value_that_only_one_node_knows_is_a_difference() -> None:
    """Loss: a node with another version of this program, which has one key more, goes unnoticed."""
    assert compare(members([USUAL, {**USUAL, "new.key": 1}])) is not None


def test_all_are_refused_where_it_cannot_be_told_who_is_right() -> None:
    """Loss: a silent mixture; or the wrong one of two configurations is trained with."""
    told = results([USUAL, OTHER])
    assert kinds(told) == "rr"
    assert all("has loss.box 15.0" in str(one) and "Give all nodes the same" in str(one) for one in told)


def test_a_node_that_differs_from_most_is_refused_alone() -> None:
    """Loss: one misconfigured node ends the job of all."""
    told = results([OTHER, USUAL, USUAL])
    assert kinds(told) == "rdd"
    assert all(one.exit_code == RESTART for one in told[1:]) and told[0].exit_code == 2
    assert all("(rank 0) has loss.box 15.0" in str(one) for one in told)


def test_most_means_nodes_not_processes() -> None:
    """Loss: a big new node that is wrong outvotes the small ones."""
    told = on_ranks(4, lambda world: must_agree(world, OTHER if world.rank < 2 else USUAL), 2)
    assert kinds(told) == "rrrr"


def test_a_node_that_is_at_odds_with_itself_outvotes_nobody() -> None:
    """Loss: each of its processes takes itself for the majority, and all of them go on."""
    assert kinds(results([USUAL, OTHER], per_node=2)) == "rr"


@pytest.mark.parametrize("of_rank", [0, 1, 2])
def test_what_the_run_was_trained_with_is_right_even_against_most(of_rank: int) -> None:
    """Loss: two replacements with an old configuration take over a run from the node that has the work."""
    assert kinds(results([USUAL, OTHER, OTHER], records={of_rank: {**USUAL, "torch": "2"}})) == "drr"


def test_a_record_that_fits_nobody_or_contradicts_another_says_nothing() -> None:
    """Loss: after a deliberate change on most nodes nobody trains."""
    neither = {"loss.box": 1.0, "augment.flip": 0.5}
    assert kinds(results([USUAL, OTHER, OTHER], records={0: neither})) == "rdd"
    assert kinds(results([USUAL, OTHER, OTHER], records={0: USUAL, 1: OTHER})) == "rdd"


# --- what is compared --------------------------------------------------------------------------------------------------------


def test_every_key_is_compared_but_those_of_a_machine() -> None:
    """Loss: a new key that nobody thought of is not compared."""
    own = {
        "experiment": {"folder": "/x"},
        "data": {"path": "/x", "cache_folder": "/x", "workers": 9, "cache": "ram", "train": {"images": "/x"}},
    }
    own |= {
        "elastic": {"memory_folder": "/x", "notices": "none", "grace_seconds": 9},
        "training": {"device": "cpu"},
        "model": {"weights": "/x"},
    }
    assert shared_values(Config.model_validate(own)) == shared_values(Config())
    for section, key, value in (
        ("experiment", "seed", 1),
        ("elastic", "memory_interval_steps", None),
        ("evaluation", "interval", 2),
        ("training", "threads", 3),
        ("reporting", "images", 0),
    ):
        assert shared_values(Config.model_validate({section: {key: value}})) != shared_values(Config()), key


def index_of(width: int) -> Index:
    return Index("here", (Category(1, "a"),), Records.of([empty_record(1, Path("a.jpg"), width, 20)]))


def test_other_data_are_refused() -> None:
    """Loss: a node whose copy of the data set is an old one trains on other images than the rest."""

    def check(world: World) -> None:
        sets = [index_of(20), index_of(21 if world.rank == 1 else 20)]
        Environment({}, {}, None).check_data(world, sets)

    told = on_ranks(3, check)
    assert kinds(told) == "drd" and "digest of the validation set" in str(told[1])


def test_a_node_that_has_lost_other_images_than_the_rest_is_refused() -> None:
    """Loss: grey or the picture, as whoever happens to be given the sample has it; the weights depend on who trained it."""

    def check(world: World) -> None:
        sets = [replace(index_of(20), lost=frozenset({0} if world.rank == 1 else ())), index_of(20)]
        Environment({}, {}, None).check_data(world, sets)

    told = on_ranks(3, check)
    assert kinds(told) == "drd" and "training images that are gone '1 (a.jpg;" in str(told[1])


# --- at a start --------------------------------------------------------------------------------------------------------------


class Nodes:
    """Nodes with a run folder each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, list[str]()

    def start(self, *boxes: float, fresh: bool = False, threads: Sequence[int] = (), versions: Sequence[str] = ()) -> list[Any]:
        """Compare nodes with these `loss.box`; returns what each is told, or how many threads it has."""
        notices = Notices(CloudWatch("none"))
        watchdog = Watchdog(notices, Limits(), lambda *_: None)

        def work(world: World) -> int:
            folder = RunFolder(self.folder / str(world.rank) / "run")
            context = JobContext(world, folder, NullConsole(), notices, watchdog, Recorder(0.0))
            world.threads = threads[world.rank] if threads else 1
            environment = compare_nodes(Config.model_validate({"loss": {"box": boxes[world.rank]}}), Options(fresh=fresh), context)
            if versions:
                environment = Environment({"torch": versions[world.rank]}, {}, read_record(folder.environment))
                environment.check(world, exact=True)
            folder.path.mkdir(parents=True, exist_ok=True)
            environment.keep(context)
            return world.threads

        before = torch.get_num_threads()
        with told_on_first() as self.told:
            told = on_ranks(len(boxes), work)
        torch.set_num_threads(before)
        notices.close()
        return told


def test_a_run_remembers_what_it_was_trained_with(tmp_path: Path) -> None:
    """Loss: the node that trains is refused together with the one that joins it with another configuration."""
    nodes = Nodes(tmp_path)
    assert nodes.start(7.5) == [1]
    assert kinds(nodes.start(7.5, 15.0)) == "dr"
    assert nodes.start(15.0, 15.0) == [1, 1], "a change on all nodes is no difference"
    assert kinds(nodes.start(7.5, 15.0)) == "rd"


def test_what_was_known_of_an_old_run_is_no_rule_for_a_new_one(tmp_path: Path) -> None:
    """Loss: `--fresh` with a new configuration on two of three nodes, and the forgotten one wins."""
    nodes = Nodes(tmp_path)
    assert nodes.start(7.5, 7.5, 7.5) == [1, 1, 1]
    assert kinds(nodes.start(15.0, 15.0, 7.5)) == "rrd"
    assert kinds(nodes.start(15.0, 15.0, 7.5, fresh=True)) == "ddr"


def test_automatic_threads_are_the_same_on_all_nodes(tmp_path: Path) -> None:
    """Loss: a node with other cores computes other bits for the whole life of the run."""
    assert Nodes(tmp_path).start(7.5, 7.5, 7.5, threads=(4, 2, 8)) == [2, 2, 2]


def test_another_version_is_refused_on_some_nodes_and_told_on_all(tmp_path: Path) -> None:
    """Loss: an upgrade of one node mixes kernels; one of all nodes between two starts leaves a trace that nobody can explain."""
    nodes = Nodes(tmp_path)
    nodes.start(7.5, 7.5, 7.5, versions=("2.14", "2.14", "2.14"))
    assert kinds(nodes.start(7.5, 7.5, 7.5, versions=("2.15", "2.14", "2.14"))) == "rdd"
    nodes.start(7.5, 7.5, 7.5, versions=("2.15", "2.15", "2.15"))
    assert any("changed since the last start" in line and "torch 2.15 (was 2.14)" in line for line in nodes.told)


def test_variables_that_choose_kernels_are_part_of_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: TF32 by an environment variable of one machine, whose weights have ten bits."""
    before = processor_facts(world)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert processor_facts(world) != before


def test_other_processors_are_told() -> None:
    """Loss: weights whose last bits depend on who computed what, and nobody knows why."""

    def check(world: World) -> None:
        Environment({}, {"vector instructions": "AVX2" if world.rank else "AVX512"}, None).check(world, exact=True)

    with told_on_first() as told:
        assert kinds(on_ranks(2, check)) == "--"
    assert "(rank 1) has vector instructions 'AVX2'" in told[0] and "'AVX512'" in told[0]
