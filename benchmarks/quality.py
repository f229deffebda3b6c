"""Does exactness change what is learned? `uv run benchmarks/quality.py [--config configs/bccd.yaml] [--seeds 0 1 2] [--epochs 30]`.

Trains with `training.exact` true and false for each seed, one pair side by side, and prints the last epoch's and the best mAP50-95
of each run, and the means and spreads. An interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/bccd.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("experiments/quality"))
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    given = parser.parse_args()
    given.folder = REPOSITORY / given.folder
    kinds = ("exact", "plain")
    for seed in given.seeds:
        pair = [start(given, kind, seed) for kind in kinds]
        if any([process.wait() for process in pair]):  # noqa: C419 -- both are waited for
            sys.exit(f"seed {seed}: a run failed; see {given.folder}/*.log")
        for kind in kinds:
            print(f"seed {seed} {kind}: last {last(given, kind, seed):.4f}, best {best(given, kind, seed):.4f}", flush=True)
    for kind in kinds:
        values = [last(given, kind, seed) for seed in given.seeds]
        print(f"{kind}: mAP50-95 after {given.epochs} epochs {statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")


def start(given: argparse.Namespace, kind: str, seed: int) -> subprocess.Popen[bytes]:
    """A run in the background."""
    settings = [
        f"experiment.folder={given.folder}",
        f"experiment.name={kind}_{seed}",
        f"experiment.seed={seed}",
        f"training.exact={kind == 'exact'}",
        f"training.epochs={given.epochs}",
        "training.threads=1",
        "training.micro_batch_size=8",  # so that there is something to sum
        "snapshots.keep_epochs=1",
        f"evaluation.interval={max(1, given.epochs // 3)}",
        *given.set,
    ]
    given.folder.mkdir(parents=True, exist_ok=True)
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    with (given.folder / f"{kind}_{seed}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "elastic_train.py", "--config", str(given.config), *arguments], cwd=REPOSITORY, stdout=log, stderr=log
        )


def rows(given: argparse.Namespace, kind: str, seed: int) -> list[float]:
    """mAP50-95 of the evaluated epochs."""
    text = (given.folder / f"{kind}_{seed}" / "checkpoints" / "training_metrics.json").read_text()
    return [row["mAP50-95"] for row in json.loads(text) if row["mAP50-95"] is not None]


def last(given: argparse.Namespace, kind: str, seed: int) -> float:
    """After the last epoch."""
    return rows(given, kind, seed)[-1]


def best(given: argparse.Namespace, kind: str, seed: int) -> float:
    """Of all evaluated epochs."""
    return max(rows(given, kind, seed))


if __name__ == "__main__":
    main()
