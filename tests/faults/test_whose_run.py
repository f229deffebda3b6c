"""Nodes without shared storage that were apart: which of them has the run."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

from tests.harness import Running, run, small
from tests.runs import metrics, state_digest

EPOCHS, STEPS = 6, 2
CONFIG = ["--config", "configs/config_test_resume.yaml"]
SETTINGS = (
    f"training.epochs={EPOCHS}",
    f"training.max_batches_per_epoch={STEPS}",
    "training.batch_size=8",
    "evaluation.interval=6",
    "elastic.memory_interval_steps=1",
    "snapshots.interval_seconds=null",
)


def arguments(node: Path, cache: Path, *more: str) -> list[str]:
    """Of a node with a disk and a memory of its own."""
    (node / "memory").mkdir(parents=True, exist_ok=True)
    return [*CONFIG, *small(node, cache, *SETTINGS, f"elastic.memory_folder={node / 'memory'}", *more)]


def together(nodes: list[Path], cache: Path) -> list[Running]:
    """One start on several nodes, the first of which has rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = {"WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Running("elastic_train.py", arguments(node, cache), extra={**both, "RANK": str(rank), "GROUP_RANK": str(rank)})
        for rank, node in enumerate(nodes)
    ]


def alone_until(text: str, node: Path, cache: Path) -> None:
    """Train on one node until it says something; then its power fails, but for its memory."""
    job = Running("elastic_train.py", arguments(node, cache))
    job.wait_for(text)
    job.send(signal.SIGKILL)
    job.wait()


def test_a_new_empty_node_that_began_alone_joins_the_node_with_the_work(tmp_path: Path, cache: Path) -> None:
    """Loss: all nodes die and the replacement boots first. It trains an epoch alone, and when the old node is back the run goes on from
    that: the work of days is moved aside, and what memory held of it is deleted."""
    old, new = tmp_path / "old", tmp_path / "new"
    alone_until(f"epoch 5/{EPOCHS}  step 1/{STEPS}", old, cache)
    alone_until(f"epoch 2/{EPOCHS}  step 1/{STEPS}", new, cache)
    before = [path for node in (old, new) for path in (node / "run").glob("checkpoints/epoch_*")]
    first, second = together([new, old], cache)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    going_on = re.search(r"going on from \S+ \(epoch (\d+), step (\d+)\)", first.output)
    assert going_on and int(going_on[2]) >= 4 * STEPS, first.output
    for node in (old, new):
        assert [path.name for path in node.iterdir() if path.name.startswith("run")] == ["run"], "no folder was moved aside"
    assert before and all(path.exists() for path in before)
    assert [row["epoch"] for row in metrics(new / "run")] == list(range(1, EPOCHS + 1))
    undisturbed = tmp_path / "undisturbed"
    assert run("elastic_train.py", arguments(undisturbed, cache)).returncode == 0
    last = Path("run") / "checkpoints" / f"epoch_{EPOCHS:03d}.pt"
    assert state_digest(new / last) == state_digest(undisturbed / last)
