"""How a job begins: whose run it is, and which memory counts."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gai_yolo.checkpointing.recovery import LoadedCheckpoint
from gai_yolo.config import Config
from gai_yolo.distributed.world import World
from gai_yolo.errors import CheckpointError, Refusal
from gai_yolo.goodput.record import Record, pack, plain, read_records
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.job.rollback import roll_back, state_at
from gai_yolo.job.startup import Options, find, open_record, open_run, read_all_records, tell_if_far_ahead
from gai_yolo.membership.join import remember
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.catalogue import Catalogue
from gai_yolo.store.node_memory import NodeMemory
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.store.run_record import RunRecord, Settled
from gai_yolo.supervision.cloud.watch import CloudWatch
from gai_yolo.supervision.notices import Notices
from gai_yolo.supervision.watchdog import Limits, Watchdog
from gai_yolo.training.context import JobContext
from tests.states import content_of, flip, manifest_of, published, store_at
from tests.worlds import good, on_ranks, told_on_first


def start(number: int, origin: int | None, highest: int, node: str = "a") -> Record:
    """What one node says of a start."""
    return Record(1e9 + number, id=f"{node}{number}", number=number, origin=origin, highest=highest, node=node)


# --- whose run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def notices() -> Iterator[Notices]:
    made = Notices(CloudWatch("none"))
    yield made
    made.close()


SETTLED = {"micro_batch_size": Settled(4, {"training.batch_size": 16})}


def identity_with(settings: dict[str, Any], weights: Path | None = None) -> dict[str, Any]:
    """What a checkpoint says about its run."""
    model = {"weights": None if weights is None else str(weights)}
    return {"config": {"training": settings, "model": model}, "class_names": ["a"], "data_digest": "d" * 64}


class Cluster:
    """Nodes with memory and, unless the run folder is shared, a disk each."""

    def __init__(self, folder: Path, notices: Notices, shared: bool) -> None:
        self.folder, self.notices, self.shared = folder, notices, shared
        self.told: list[str] = []

    def run(self, node: str) -> Path:
        return self.folder / ("shared" if self.shared else node) / "run"

    def config(self, node: str, **elastic: Any) -> Config:
        memory = self.folder / node / "shm"
        memory.mkdir(parents=True, exist_ok=True)
        return Config.model_validate({"elastic": {"memory_folder": str(memory), **elastic}})

    def context(self, world: World, node: str) -> JobContext:
        watchdog = Watchdog(self.notices, Limits(), lambda *_: None)
        return JobContext(world, RunFolder(self.run(node)), NullConsole(), self.notices, watchdog, Recorder(0.0))

    def start(self, *arguments: Any, **options: Any) -> list[LoadedCheckpoint | None]:
        """The same, where no rank may raise."""
        return good(self.try_to_start(*arguments, **options))

    def try_to_start(
        self,
        nodes: str,
        fresh: bool = False,
        step: int | None = None,
        per_node: int = 1,
        options: Options | None = None,
        settings: dict[str, Any] | None = None,
        exact: bool = True,
        weights: Path | None = None,
        **elastic: Any,
    ) -> list[LoadedCheckpoint | Exception | None]:
        """One start on nodes such as `ab`, the first of which has rank 0; returns what each rank finds. Then a state is saved.

        Args:
            settings: of `training`, to be recorded before the first step.
            weights: `model.weights`.
        """

        def work(world: World) -> LoadedCheckpoint | None:
            node = nodes[world.node]
            context = self.context(world, node)
            world.from_first(context.folder.lock)
            memory: NodeMemory | None = None
            try:
                config = self.config(node, **elastic)
                config = config.model_copy(update={"training": config.training.model_copy(update={"exact": exact})})
                run = open_run(config, options or Options(fresh=fresh), context)
                memory = run.memory
                found = find(Options(), context, memory, exact=exact)
                if settings is not None:
                    settled = replace(run, record=replace(run.record, settled=SETTLED))
                    remember(context, settled, found, identity_with(settings, weights))
                if step is not None and memory is not None:
                    content = content_of(step)
                    memory.store.publish(manifest_of(content), lambda file: torch.save(content, file))
                world.gather(None)
                return found
            finally:
                if memory is not None:
                    memory.release()
                context.folder.release()

        with told_on_first() as self.told:
            return on_ranks(len(nodes) * per_node, work, per_node)

    def ids(self, nodes: str) -> list[str | None]:
        records = [RunFolder(self.run(node)).record() for node in nodes]
        return [None if record is None else record.run_id for record in records]

    def asides(self, node: str) -> list[Path]:
        return [path for path in self.run(node).parent.glob("run.*") if path.is_dir()]


def steps(found: Sequence[LoadedCheckpoint | None]) -> list[int | None]:
    return [None if one is None else one.manifest.position.step for one in found]


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gai_yolo.store.node_memory.MEMORY_LOCK_PATIENCE", 0.1)


@pytest.fixture(params=["local folders", "a shared folder"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, notices: Notices) -> Cluster:
    return Cluster(tmp_path, notices, request.param == "a shared folder")


@pytest.fixture
def local(tmp_path: Path, notices: Notices) -> Cluster:
    return Cluster(tmp_path, notices, shared=False)


def launched(monkeypatch: pytest.MonkeyPatch, launch: str | None, restarted: bool = False) -> None:
    monkeypatch.setattr("gai_yolo.job.startup.launch_id", lambda: launch)
    monkeypatch.setattr("gai_yolo.job.startup.was_restarted", lambda: restarted)


def test_all_nodes_keep_one_name_for_the_run(cluster: Cluster) -> None:
    """Loss: each node's memory is taken for that of another run."""
    assert steps(cluster.start("abc", step=5)) == [None] * 3
    (first,) = set(cluster.ids("abc"))
    assert first is not None
    assert steps(cluster.start("bca")) == [5] * 3
    assert set(cluster.ids("abc")) == {first} and cluster.asides("a") == []


def test_a_new_node_joins_the_run_whatever_its_rank(cluster: Cluster) -> None:
    """Loss: a machine that replaces another one makes the run start over."""
    cluster.start("ab", step=5)
    assert steps(cluster.start("nab")) == [5] * 3
    assert len(set(cluster.ids("nab"))) == 1 and cluster.asides("a") == cluster.asides("b") == []


def test_a_run_whose_folder_was_deleted_does_not_come_back_from_memory(cluster: Cluster) -> None:
    """Loss: somebody deletes a run to begin anew, and is given the old weights."""
    cluster.start("ab", step=5)
    old = cluster.ids("a")
    for node in "ab":
        shutil.rmtree(cluster.run(node), ignore_errors=True)
    assert steps(cluster.start("ab")) == [None, None]
    assert cluster.ids("a") != old
    kept = {path for node in "ab" for path in (cluster.run(node) / "aside").glob("*/snapshots/step_00000005.pt")}
    assert len(kept) == 2, "nothing else holds them"


def test_a_folder_that_is_lost_on_one_node_costs_nothing(local: Cluster) -> None:
    """Loss: a new disk in one machine is taken for the wish to begin anew."""
    local.start("ab", step=5)
    (old,) = set(local.ids("ab"))
    shutil.rmtree(local.run("a"))
    assert steps(local.start("ab")) == [5, 5] and set(local.ids("ab")) == {old}


def test_starting_over_moves_the_old_run_aside_on_every_node(cluster: Cluster) -> None:
    """Loss: the old run goes on from a memory, or another node's disk, that nobody has thought of; or it is deleted."""
    cluster.start("ab", step=5)
    for run in {cluster.run(node) for node in "ab"}:
        published(run, 4)
    (old,) = set(cluster.ids("ab"))
    assert steps(cluster.start("ab", fresh=True)) == [None, None]
    (new,) = set(cluster.ids("ab"))
    assert new != old
    for node in "ab":
        (aside,) = cluster.asides(node)
        assert (aside / "snapshots" / "step_00000004.pt").exists()
        brought = list((aside / "aside").glob("*/snapshots/step_00000005.pt"))
        assert len(brought) == (2 if cluster.shared else 1), "the memories' states are kept too"
        assert torch.load(brought[0], weights_only=True)["step"] == 5 and brought[0].with_suffix(".json").exists()
    assert steps(cluster.start("ab")) == [None, None]


def test_a_job_starts_over_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: the restarted workers, which see the same command line, throw away what they are to save."""
    launched(monkeypatch, "job-7")
    cluster.start("ab", fresh=True, step=5)
    assert steps(cluster.start("ab", fresh=True)) == [5, 5]
    assert any("(job-7) has started over already" in line for line in cluster.told)
    launched(monkeypatch, "job-8")
    assert steps(cluster.start("ab", fresh=True)) == [None, None]
    launched(monkeypatch, None, restarted=True)
    cluster.start("ab", step=6)
    assert steps(cluster.start("ab", fresh=True)) == [6, 6]


def test_a_new_first_node_does_not_start_over_what_the_others_have(local: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: without shared storage the loss of the first node of a job that was started with --fresh is the loss of the run: the machine
    in its place sees the command line, and knows of no start before."""
    launched(monkeypatch, "job-7")
    local.start("ab", fresh=True, step=5)
    (old,) = set(local.ids("ab"))
    assert steps(local.start("nb", fresh=True)) == [5, 5]
    assert set(local.ids("nb")) == {old} and local.asides("b") == []


def test_a_start_over_that_was_killed_is_done_again(local: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: the first folder is moved aside, the process killed, and the run goes on with the other nodes' old state."""
    launched(monkeypatch, "job-7")
    local.start("ab", step=5)
    local.run("a").rename(local.run("a").with_name("run.old"))
    assert steps(local.start("ab", fresh=True)) == [None, None]
    assert len(local.asides("b")) == 1


@pytest.mark.parametrize("nodes", ["ab", "ba"], ids=["who started over is first", "who was away is first"])
def test_an_empty_node_that_started_over_alone_is_not_given_the_old_run(
    nodes: str, local: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: --fresh, while only a new machine is there; then the others come back, and the old run goes on, for it has more progress."""
    local.start("b", step=50, settings=RUN)
    launched(monkeypatch, "job-7")
    local.start("a", fresh=True, step=5, settings=RUN)
    assert steps(local.start(nodes, fresh=True, step=6, settings=RUN)) == [5, 5]
    assert len(local.asides("b")) == 1 and local.asides("a") == []
    launched(monkeypatch, None)
    assert steps(local.start("ba", settings=RUN)) == [6, 6], "from now on both know it"


@pytest.mark.parametrize("nodes", ["abc", "bca"], ids=["who started over is first", "who was away is first"])
def test_nodes_that_were_away_when_the_run_was_started_over_follow(nodes: str, local: Cluster) -> None:
    """Loss: two machines come back with the old run, and it goes on in place of the one that somebody wanted."""
    local.start("abc", step=50)
    (old,) = set(local.ids("abc"))
    local.start("a", fresh=True, step=5)
    (new,) = local.ids("a")
    assert new != old
    assert steps(local.start(nodes)) == [5] * 3
    assert set(local.ids("abc")) == {new}
    assert [len(local.asides(node)) for node in "abc"] == [1, 1, 1]
    assert (local.run(nodes[0]) / "checkpoints").is_dir(), "there is a folder to write to"


def test_a_node_that_was_away_twice_follows_too(local: Cluster) -> None:
    """Loss: as above, with two old runs against one new."""
    local.start("abc", step=50)
    local.start("ab", fresh=True, step=30)
    local.start("a", fresh=True, step=5)
    assert steps(local.start("cba")) == [5] * 3


def test_a_folder_without_a_name_gets_one(cluster: Cluster) -> None:
    """Loss: a run of an older version is moved aside."""
    for run in {cluster.run(node) for node in "ab"}:
        published(run, 30, "epoch")
    assert steps(cluster.start("ab")) == [30, 30] and None not in cluster.ids("ab")


# --- one trajectory, several runs ------------------------------------------------------------------------------------------------

RUN = {"batch_size": 16}
OTHER_RUN = {"batch_size": 8}


@pytest.mark.parametrize("nodes", list(itertools.permutations("abe")), ids="".join)
def test_the_node_with_the_work_wins_over_one_that_began_alone(nodes: tuple[str, ...], local: Cluster) -> None:
    """Loss: all nodes die, the replacement boots first and trains an epoch alone: then it beats the node with the work, whose folder is
    moved aside and whose memory is deleted."""
    local.start("b", step=45, settings=RUN)
    published(local.run("b"), 40, "epoch")
    local.start("a", step=12, settings=RUN)
    published(local.run("a"), 10, "epoch")
    (old,) = local.ids("b")
    found = local.start("".join(nodes), settings=RUN)
    assert steps(found) == [45] * 3
    assert [None if one is None else one.tier.split(" (")[0] for one in found] == [
        "memory" if node == "b" else "another node" for node in nodes
    ]
    assert set(local.ids("abe")) == {old}
    assert [local.asides(node) for node in "abe"] == [[], [], []]
    assert (local.run("a") / "checkpoints" / "epoch_001.pt").exists(), "it is of the same trajectory"


@pytest.mark.parametrize("nodes", list(itertools.permutations("ab")), ids="".join)
def test_different_runs_are_refused_on_all_ranks_and_nothing_is_touched(nodes: tuple[str, ...], local: Cluster) -> None:
    """Loss: two runs of one name, one of which is moved aside with a warning on the node that nobody looks at."""
    local.start("b", step=45, settings=RUN)
    local.start("a", step=12, settings=OTHER_RUN)
    before = {path: path.read_bytes() for path in local.folder.rglob("*") if path.is_file() and not path.name.startswith(".run-")}
    results = local.try_to_start("".join(nodes), settings=OTHER_RUN, per_node=2)
    assert len({str(result) for result in results}) == 1
    for result in results:
        assert isinstance(result, Refusal) and result.exit_code == 2
        text = str(result)
        assert "(epoch 4, step 45) and" in text and "(epoch 1, step 12) hold different runs (training.batch_size is 16 and 8)" in text
        assert "/a/" in text and "/b/" in text and "--fresh" in text
    for path, content in before.items():
        assert path.exists() and (path.read_bytes() == content or path.name.endswith((".fence", ".lock"))), path
    assert steps(local.start("b", settings=RUN)) == [45] and steps(local.start("a", settings=OTHER_RUN)) == [12]


def test_runs_that_began_with_other_weights_in_a_file_of_one_name_are_different(local: Cluster, tmp_path: Path) -> None:
    """Loss: `model.weights: best.pt`, which was written anew meanwhile; a node that began with the old ones is joined as if it had not."""
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"ones")
    local.start("b", step=45, settings=RUN, weights=weights)
    local.start("c", step=5, settings=RUN, weights=weights)
    weights.write_bytes(b"others")
    local.start("a", step=12, settings=RUN, weights=weights)
    (result, _) = local.try_to_start("ab", settings=RUN, weights=weights)
    assert isinstance(result, Refusal) and "hold different runs (model.weights is 'SHA-256 " in str(result)
    weights.unlink()
    assert steps(local.start("bc", settings=RUN, weights=weights)) == [45, 45], "where they began alike they are alike, and need it no more"


def test_without_exact_sums_the_lesser_run_is_moved_aside(local: Cluster) -> None:
    """Loss: half of the nodes go on from states of another trajectory."""
    local.start("b", step=45, settings=RUN, exact=False)
    local.start("a", step=12, settings=RUN, exact=False)
    published(local.run("a"), 10, "epoch")
    assert steps(local.start("ab", settings=RUN, exact=False)) == [45, 45]
    (aside,) = local.asides("a")
    assert (aside / ".run.json").exists() and local.asides("b") == []
    assert list((aside / "aside").glob("*/snapshots/step_00000012.pt"))


def test_a_run_of_an_older_version_is_recognised_by_its_checkpoints(local: Cluster) -> None:
    """Loss: after an update of the program a new empty node beats the one with the work."""
    content = content_of(45) | identity_with(RUN)
    store_at(local.run("b")).publish(manifest_of(content), lambda file: torch.save(content, file))
    local.start("a", step=12, settings=RUN)
    assert steps(local.start("ab", settings=RUN)) == [45, 45]
    (local.run("b") / ".run.json").unlink()
    (local.run("b") / ".run_id").write_text("1-feed")
    assert local.ids("b") == ["1-feed"]
    assert steps(local.start("ab", settings=RUN)) == [45, 45]


def test_a_damaged_record_costs_nothing_while_memory_has_a_copy(local: Cluster) -> None:
    """Loss: one flipped bit in a small file, and what memory holds is taken for another run's."""
    local.start("ab", step=45, settings=RUN)
    ids = local.ids("a")
    path = RunFolder(local.run("a")).record_path
    flip(path)
    assert steps(local.start("a", settings=RUN)) == [45] and local.ids("a") == ids
    assert any("that of this node's memory is taken" in line for line in local.told)
    flip(path)
    assert steps(local.start("ab", settings=RUN, memory_interval_steps=None)) == [None, None] and local.ids("a") == ids


def test_a_record_that_cannot_be_read_is_refused_by_all(local: Cluster) -> None:
    """Loss: a disk that hiccups is taken for an empty one."""
    local.start("ab", settings=RUN)
    path = RunFolder(local.run("b")).record_path
    path.rename(path.with_name("kept"))
    path.mkdir()
    for result in local.try_to_start("ab", settings=RUN):
        assert isinstance(result, Refusal) and str(path) in str(result) and "cannot be read" in str(result)
    path.rmdir()
    path.with_name("kept").rename(path)
    assert steps(local.start("ab", settings=RUN)) == [None, None]


def test_settled_values_are_those_of_any_nodes_record(local: Cluster) -> None:
    """Loss: the node that is left, or comes first, settles anew what the others had settled before anything was saved."""
    local.start("ab", settings=RUN)
    for nodes in ("b", "nb", "bn"):
        local.start(nodes)
        for node in nodes:
            record = RunFolder(local.run(node)).record()
            assert record is not None and record.settled == SETTLED
        shutil.rmtree(local.run("n"), ignore_errors=True)


def test_before_anything_was_saved_other_settings_bind_nobody(local: Cluster) -> None:
    """Loss: a run that nobody has trained yet cannot be started, because two nodes had different plans for it."""
    local.start("a", settings=RUN)
    local.start("b", settings=OTHER_RUN)
    assert steps(local.start("ab", settings=OTHER_RUN)) == [None, None]
    records = [RunFolder(local.run(node)).record() for node in "ab"]
    assert records[0] == records[1] and records[0] is not None
    assert [turn.settings["training.batch_size"] for turn in records[0].turns] == [8]


# --- going back ----------------------------------------------------------------------------------------------------------------


def test_who_goes_back_is_not_undone_by_any_nodes_memory_or_disk(cluster: Cluster) -> None:
    """Loss: epochs that a person has taken back come back from /dev/shm, or from another node."""
    cluster.start("ab", settings=RUN, step=45)
    for run in {cluster.run(node) for node in "ab"}:
        for step in (20, 30, 40):
            content = content_of(step) | identity_with(RUN)
            store_at(run).publish(manifest_of(content, "epoch"), lambda file, content=content: torch.save(content, file))  # type: ignore[misc]
    folder = RunFolder(cluster.run("a"))
    folder.lock()
    done = roll_back(folder, "epoch:2")
    folder.release()
    assert done.moved == ["checkpoints/epoch_004.pt", "checkpoints/epoch_003.pt"]
    assert steps(cluster.start("ba", settings=RUN, step=21)) == [20, 20]
    for node in "ab":
        kept = {path.name for path in (cluster.run(node) / "aside").glob("*/*/*.pt")}
        assert kept == {"epoch_003.pt", "epoch_004.pt", "step_00000045.pt"}, "memory too is brought to the disk"
        assert list((cluster.folder / node / "shm").glob("*/*.aside-*")) == []
    assert steps(cluster.start("ab", settings=RUN)) == [21, 21]


@pytest.mark.parametrize(
    ("where", "stem"),
    [
        ("epoch:2", "epoch_002"),
        ("epoch_002.pt", "epoch_002"),
        ("step:20", "epoch_002"),
        ("step:25", "step_00000025"),
        ("step_00000025", "step_00000025"),
    ],
)
def test_a_state_is_found_under_what_people_call_it(where: str, stem: str, local: Cluster) -> None:
    """Loss: a rollback to another state than was meant."""
    for step, kind in ((20, "epoch"), (25, "step"), (30, "epoch")):
        published(local.run("a"), step, "epoch" if kind == "epoch" else "step")
    assert state_at(Catalogue(local.run("a")), where).manifest.stem == stem
    for none in ("epoch:4", "step:24", "epoch_001", "2", "epoch:", "epoch:2 ", "best"):
        with pytest.raises(CheckpointError, match=r"write epoch:3|has no complete state at"):
            state_at(Catalogue(local.run("a")), none)


def test_memory_that_is_far_ahead_of_the_disk_is_told(local: Cluster) -> None:
    """Loss: epochs moved away by hand come back, and nobody says where from."""
    local.start("a", step=45)
    published(local.run("a"), 30, "epoch")
    (found,) = local.start("a")

    def work(world: World) -> None:
        for steps_per_epoch in (15, 14):
            tell_if_far_ahead(local.context(world, "a"), found, steps_per_epoch)

    with told_on_first() as told:
        good(on_ranks(1, work))
    (line,) = told
    assert "in memory only, and more than an epoch ahead of the newest state on a disk (epoch 3, step 30)" in line
    assert f"gai-yolo snapshots rollback {local.run('a')} --to epoch:N" in line


# --- a disk that refuses the record ----------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Run folders in which nothing can be written."""
    folders: set[Path] = set()
    whole = RunFolder.set_record

    def set_record(self: RunFolder, record: RunRecord) -> None:
        if self.path in folders:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.record_path))
        whole(self, record)

    monkeypatch.setattr(RunFolder, "set_record", set_record)
    return folders


def test_a_full_disk_lets_the_record_live_in_memory(full: set[Path], local: Cluster) -> None:
    """Loss: a run on a full disk does not begin although memory could keep it; or it is taken for a deleted one, and begins again."""
    full.add(local.run("a"))
    assert steps(local.start("ab", settings=RUN, step=5)) == [None, None]
    assert any("the run record is kept in this node's memory" in line for line in local.told)
    assert steps(local.start("a", settings=RUN)) == [5]
    full.clear()
    assert steps(local.start("a", settings=RUN)) == [5] and local.ids("a") == local.ids("b")


def test_no_step_is_made_that_no_record_binds(full: set[Path], local: Cluster) -> None:
    """Loss: a run that was begun on a full disk, and killed, settles anew what it had settled: other weights."""
    full.add(local.run("b"))
    for result in local.try_to_start("ab", settings=RUN, memory_interval_steps=None):
        assert isinstance(result, Refusal) and "without a run record on every node no training begins" in str(result)
        assert result.is_transient, "a launcher tries again"
    full.clear()
    local.start("ab", settings=RUN, memory_interval_steps=None)
    published(local.run("a"), 10, "epoch")
    full.add(local.run("b"))
    assert steps(local.start("ab", settings=OTHER_RUN, memory_interval_steps=None)) == [10, 10], "now there is a state that binds"


# --- memory ------------------------------------------------------------------------------------------------------------------


def test_all_ranks_of_a_node_read_what_its_first_keeps(local: Cluster) -> None:
    """Loss: a state that lies on the machine is sent over the network, once for each process."""
    local.start("ab", step=5, per_node=2)
    found = local.start("ab", per_node=2)
    assert [None if one is None else one.tier for one in found] == ["memory"] * 4


def test_memory_may_be_absent_switched_off_or_somebody_elses(local: Cluster) -> None:
    """Loss: a job that could run ends because of what was only to make it better."""
    local.start("a", step=5)
    assert steps(local.start("a", memory_interval_steps=None)) == [None]
    assert steps(local.start("a", memory_folder="/nowhere/at/all")) == [None]
    assert local.told == []
    memory = NodeMemory(local.folder / "a" / "shm", local.run("a"))
    memory.open()
    assert steps(local.start("a")) == [None]
    assert len(local.told) == 1 and local.told[0].endswith("No state is kept in this node's memory.")
    memory.release()
    assert steps(local.start("a")) == [5]


# --- accounts ----------------------------------------------------------------------------------------------------------------


def test_every_node_keeps_the_accounts_of_all(cluster: Cluster) -> None:
    """Loss: the account of the time goes with the node that wrote it; or a start that is counted twice."""
    lone = start(4, 0, 7, node="b")
    folder = RunFolder(cluster.run("b")).goodput
    folder.mkdir(parents=True)
    (folder / "000004-x-b-b4.json").write_bytes(pack(plain(lone)))

    def work(world: World) -> list[Record]:
        context = cluster.context(world, "ab"[world.node])
        records = read_all_records(context)
        open_record(context, records)
        world.gather(None)
        context.recorder.close()
        return records

    first, second = good(on_ranks(2, work))
    assert first == second
    assert len(first) == len({record.id for record in first}), "what two nodes know is sent once"
    for node in "ab":
        records = read_records(RunFolder(cluster.run(node)).goodput)[0]
        assert {record.id for record in records} >= {"b4"}
        (number,) = {record.number for record in records if record.id != "b4"}
        assert number == 5
