"""After a start all ranks go on from the same state: the newest complete one that any node holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from gai_yolo.checkpointing.recovery import LoadedCheckpoint, agree, newest, share
from gai_yolo.distributed.world import World
from gai_yolo.errors import RESTART, CheckpointError, Departure
from gai_yolo.log import showing
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.manifest import decode
from tests.states import content_of, flip, foreign, manifest_of, published, store_at
from tests.worlds import good, on_ranks

Tiers = Mapping[str, Catalogue]


class Cluster:
    """Nodes with a memory and a disk each, and what their ranks told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[int, str]] = []

    def memory(self, node: int) -> Path:
        return self.folder / f"node{node}" / "memory"

    def disk(self, node: int) -> Path:
        return self.folder / f"node{node}" / "disk"

    def tiers(self, node: int) -> Tiers:
        return {"memory": Catalogue(self.memory(node)), "disk": Catalogue(self.disk(node))}

    def start(
        self, nodes: int, per_node: int = 1, agreeing: Callable[..., tuple[LoadedCheckpoint | None, bool]] = agree
    ) -> list[LoadedCheckpoint | Exception | None]:
        """What each rank goes on from."""
        self.told.clear()
        ranks: dict[int | None, int] = {}

        def work(world: World) -> LoadedCheckpoint | None:
            ranks[threading.get_ident()] = world.rank
            found, self.any_passed_over = agreeing(world, self.tiers(world.node))
            return found

        with showing(lambda record: self.told.append((ranks[record.thread], record.getMessage()))):
            return on_ranks(nodes * per_node, work, per_node)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def positions(results: list[LoadedCheckpoint | Exception | None]) -> list[tuple[int, str] | None]:
    """Step and tier of each rank; the content is what was saved at that step."""
    found = good(results)
    for one in found:
        if one is not None:
            assert one.content["step"] == one.manifest.position.step
            assert torch.equal(one.content["model_state_dict"]["w"], content_of(one.content["step"])["model_state_dict"]["w"])
    return [None if one is None else (one.manifest.position.step, one.tier.split(" (")[0]) for one in found]


def test_nobody_holds_anything(cluster: Cluster) -> None:
    """Loss: the first start of a run fails for want of a second."""
    assert positions(cluster.start(3)) == [None, None, None]
    assert cluster.told == [] and not cluster.any_passed_over


@pytest.mark.parametrize(("place", "tier"), [("memory", "memory"), ("disk", "disk")], ids=["in a node's memory", "on a node's disk"])
def test_the_newest_wins_on_whatever_tier_of_whatever_node(place: str, tier: str, cluster: Cluster) -> None:
    """Loss: steps that somebody still has are trained again; or ranks that go on from different states."""
    for node in range(3):
        published(cluster.disk(node), 30, "epoch")
        published(cluster.memory(node), 33)
    published(getattr(cluster, place)(1), 36)
    assert positions(cluster.start(3)) == [(36, "another node"), (36, tier), (36, "another node")]


def test_each_rank_reads_its_own_copy_the_fastest_first(cluster: Cluster) -> None:
    """Loss: a start that waits for the network, or the disk, for what lies in memory."""
    published(cluster.disk(0), 30, "epoch")
    for node in (1, 2):
        published(cluster.disk(node), 30, "epoch")
        published(cluster.memory(node), 30, "epoch")
    assert positions(cluster.start(3)) == [(30, "disk"), (30, "memory"), (30, "memory")]


@pytest.mark.parametrize("alike", [True, False])
def test_halves_that_went_on_apart_go_on_from_the_state_of_one(alike: bool, cluster: Cluster) -> None:
    """Loss: a network that was cut, plain sums or unlike machines, two states of one step; each goes on from its own, and good hardware is
    called broken."""
    for node, weight in enumerate((1.0, 2.0, 3.0)):
        content = content_of(30)
        content["model_state_dict"]["w"] = torch.full_like(content["model_state_dict"]["w"], weight)
        store_at(cluster.memory(node)).publish(manifest_of(content), lambda file, content=content: torch.save(content, file))  # type: ignore[misc]
    found = good(cluster.start(3, agreeing=partial(agree, alike=alike)))
    weights = [float(one.content["model_state_dict"]["w"].flatten()[0]) for one in found if one is not None]
    assert weights == [1.0] * 3
    assert [(rank, "hold different states of one step" in text) for rank, text in cluster.told] == ([(0, True)] if alike else [])


def test_a_state_that_all_nodes_hold_is_not_sent(cluster: Cluster) -> None:
    """Loss: every start costs a transfer, although each node has what it needs; or is told of a difference that is none."""
    for node in range(3):
        published(cluster.memory(node), 33)
    assert positions(cluster.start(3)) == [(33, "memory")] * 3 and cluster.told == []


def test_an_epochs_state_is_newer_than_that_before_its_evaluation(cluster: Cluster) -> None:
    """Loss: an evaluation done twice; or ranks that stand before and after it."""
    content = content_of(30, 2)
    store_at(cluster.memory(0)).publish(manifest_of(content), lambda file: torch.save(content, file))
    published(cluster.disk(1), 30, "epoch")
    assert positions(cluster.start(2)) == [(30, "another node"), (30, "disk")]
    (first, _) = good(cluster.start(2))
    assert first is not None and first.content["epoch"] == 3


def test_only_one_node_is_left_that_holds_anything(cluster: Cluster) -> None:
    """Loss: without shared storage the loss of the others is the loss of the run."""
    published(cluster.memory(2), 35)
    results = cluster.start(4)
    assert positions(results) == [(35, "another node"), (35, "another node"), (35, "memory"), (35, "another node")]
    manifest = decode((cluster.memory(2) / "snapshots" / "step_00000035.json").read_bytes())
    assert all(isinstance(found, LoadedCheckpoint) and found.manifest == manifest for found in results)


def test_a_damaged_newest_falls_back_on_all_ranks_alike(cluster: Cluster) -> None:
    """Loss: one flipped bit, and the ranks go on from different states, or none does."""
    published(cluster.disk(0), 30, "epoch")
    for number in (33, 36, 38):
        published(cluster.memory(1), number)
    for number in (36, 38):
        flip(cluster.memory(1) / "snapshots" / f"step_000000{number}.pt")
    assert positions(cluster.start(2, per_node=2)) == [(33, "another node")] * 2 + [(33, "memory")] * 2
    assert [rank for rank, _ in cluster.told] == [2, 2], "the node's first rank tells, once"
    for (_, sentence), number in zip(cluster.told, (38, 36), strict=True):
        assert f"step_000000{number}.pt is damaged" in sentence and "left in place" in sentence
    assert (cluster.memory(1) / "snapshots" / "step_00000038.pt").exists()


def test_a_damaged_copy_is_replaced_by_another_tiers_or_nodes(cluster: Cluster) -> None:
    """Loss: steps go although a whole copy is there."""
    for node in range(2):
        published(cluster.memory(node), 36)
        published(cluster.disk(node), 36)
    flip(cluster.memory(0) / "snapshots" / "step_00000036.pt")
    assert positions(cluster.start(2)) == [(36, "disk"), (36, "memory")]
    flip(cluster.disk(0) / "snapshots" / "step_00000036.pt")
    assert positions(cluster.start(2)) == [(36, "another node"), (36, "memory")]


def test_everything_is_damaged(cluster: Cluster) -> None:
    """Loss: training starts over, and nobody knows why."""
    for node in range(2):
        published(cluster.memory(node), 36)
        flip(cluster.memory(node) / "snapshots" / "step_00000036.pt")
    assert positions(cluster.start(2)) == [None, None]
    assert sorted(rank for rank, _ in cluster.told) == [0, 1] and cluster.any_passed_over


def assert_refused(results: list[LoadedCheckpoint | Exception | None], text: str) -> None:
    for result in results:
        assert isinstance(result, CheckpointError) and text in str(result)


def test_a_state_of_another_version_on_one_node_is_refused_by_all(cluster: Cluster) -> None:
    """Loss: the one rank ends, and the others wait for it; or half of the nodes go on without what an old version wrote."""
    published(cluster.disk(0), 30, "epoch")
    path = published(cluster.memory(1), 36)
    path.with_suffix(".json").write_bytes(foreign())
    results = cluster.start(3)
    assert_refused(results, "manifest format 99")
    assert len({str(result) for result in results}) == 1


def test_a_folder_that_cannot_be_read_is_refused_by_all(cluster: Cluster) -> None:
    """Loss: a disk that is away for a moment is taken for an empty one, and training starts over."""
    published(cluster.disk(0), 30, "epoch")
    cluster.disk(1).mkdir(parents=True)
    (cluster.disk(1) / "checkpoints").write_text("not a folder")
    assert_refused(cluster.start(2), "cannot be read")


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_what_changes_while_it_is_sent_is_noticed_by_all(fault: str, cluster: Cluster) -> None:
    """Loss: ranks that go on from bytes that nobody has verified; or those who have it wait for those who do not."""
    path = published(cluster.memory(1), 36)

    def agreeing(world: World, tiers: Tiers) -> tuple[LoadedCheckpoint, bool]:
        found, _ = newest(tiers["memory"])
        world.gather(None)
        if world.rank == 1:
            if fault == "gone":
                path.unlink()
            else:
                flip(path)
        return share(world, found, 1, alike=True), False

    for result in cluster.start(3, agreeing=agreeing):
        assert isinstance(result, Departure) and result.exit_code == RESTART and "has changed while it was sent" in result.reason


def test_one_process_alone_needs_nobody(cluster: Cluster, world: World, told: list[str]) -> None:
    """Loss: a single process waits for others."""
    published(cluster.memory(0), 36)
    found, _ = agree(world, cluster.tiers(0))
    assert found is not None and found.manifest.position.step == 36 and told == []
