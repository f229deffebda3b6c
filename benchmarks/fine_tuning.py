"""What weights from another data set are worth: `uv run benchmarks/fine_tuning.py --data ../shared/data/bccd`.

Trains on `shapes`, and then as many epochs on a data set twice for each seed: from these weights (backbone frozen for the first epochs,
multi-scale, patience), and from nothing. Prints mAP50-95 of each run's best epoch. Reads no clock: other jobs may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FROM_WEIGHTS = ("model.freeze=9", "model.freeze_epochs=2", "augment.multi_scale=0.25", "training.patience=5")


def main() -> None:
    """Run all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data.path of the data set that is tuned for")
    parser.add_argument("--weights", type=Path, help="a weight file to begin with, in place of a training on shapes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="for the runs on --data")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = given.weights.resolve() if given.weights else trained_on_shapes(folder)
        found: dict[str, list[float]] = {"from weights": [], "from nothing": []}
        for seed in range(given.seeds):
            for arm, values in found.items():
                more = [f"model.weights={weights}", *FROM_WEIGHTS] if arm == "from weights" else []
                settings = [f"data.path={given.data.resolve()}", f"training.epochs={given.epochs}", f"experiment.seed={seed}", *given.set]
                values.append(train(folder, f"{arm.replace(' ', '_')}_{seed}", "bccd", [*settings, *more]))
                print(f"seed {seed}, {arm}: mAP50-95 {values[-1]:.4f}", flush=True)
    for arm, values in found.items():
        print(f"{arm}: median {statistics.median(values):.4f} of {len(values)} seeds, {given.epochs} epochs each")


def trained_on_shapes(folder: Path) -> Path:
    """A weight file of the best epoch on the built-in data set."""
    print(f"shapes: mAP50-95 {train(folder, 'shapes', 'config', []):.4f}", flush=True)
    weights = folder / "shapes.safetensors"
    command = [sys.executable, "-m", "gai_yolo", "weights", "export", str(folder / "shapes"), "--output", str(weights)]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return weights


def train(folder: Path, name: str, config: str, settings: list[str]) -> float:
    """mAP50-95 of a run's best epoch."""
    settings = [f"experiment.folder={folder}", f"experiment.name={name}", "reporting.tensorboard=false", *settings]
    command = [sys.executable, "-m", "gai_yolo", "train", "--config", config, "--set", *settings]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((folder / name / "checkpoints" / "training_metrics.json").read_text())
    return float(max(row["mAP50-95"] for row in rows if row["mAP50-95"] is not None))


if __name__ == "__main__":
    main()
