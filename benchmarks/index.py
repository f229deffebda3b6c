"""What the index of a data set of COCO's size costs: the first look at every image, and a later start.

    uv run benchmarks/index.py [--images 118000] [--boxes 860000] [--rounds 5]

Writes small pictures into a temporary folder (some 0.6 GB of disk). Each look is one new process; printed are medians
over the rounds, without imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

CODE = """
import sys, time
from pathlib import Path
from gai_yolo.data import content, sources
from gai_yolo.sections import DataConfig

def memory():
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(rows["VmRSS"].split()[0]) / 1024

config = DataConfig.model_validate(dict(path=sys.argv[1], cache_folder=sys.argv[2]))
before, started = memory(), time.perf_counter()
index = sources.load_index(config, "train")
ready, ready_memory = time.perf_counter() - started, memory() - before
started = time.perf_counter()
train, val = sources.load_indexes(config)
both = time.perf_counter() - started
assert sum(len(image.boxes) for image in train.images) == len(index.images.boxes)
print(ready, ready_memory, both, memory() - before)
"""
SIZES = ((64, 48), (48, 64), (64, 64), (60, 40))


def write(root: Path, split: str, num_images: int, num_boxes: int, rng: np.random.Generator) -> None:
    """A split in COCO's layout."""
    pictures = [cv2.imencode(".jpg", rng.integers(0, 255, (h, w, 3)).astype(np.uint8))[1].tobytes() for w, h in SIZES]
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images = []
    for number in range(num_images):
        width, height = SIZES[number % len(SIZES)]
        name = f"{number:012d}.jpg"
        (root / split / name).write_bytes(pictures[number % len(SIZES)])
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
    owners, classes = rng.integers(1, num_images + 1, num_boxes).tolist(), rng.integers(1, 81, num_boxes).tolist()
    corners = np.concatenate([rng.uniform(0, 30, (num_boxes, 2)), rng.uniform(2, 10, (num_boxes, 2))], axis=1).round(2).tolist()
    annotations = [
        {"id": number, "image_id": owners[number], "category_id": classes[number], "bbox": corners[number], "iscrowd": 0}
        for number in range(num_boxes)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": n, "name": f"class {n}"} for n in range(1, 81)]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def look(root: Path, cache: Path) -> list[float]:
    """Seconds until the training index is ready, its MB; seconds of both splits with all files looked at, MB after all was used."""
    done = subprocess.run([sys.executable, "-c", CODE, str(root), str(cache)], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    """Write, read, read again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "data"), Path(folder, "cache")
        write(root, "train2017", options.images, options.boxes, rng)
        write(root, "val2017", max(1, options.images // 24), max(1, options.boxes // 24), rng)
        first = look(root, cache)
        print(f"read for the first time: {first[0]:.1f} s for {options.images} images, {options.boxes} boxes", flush=True)
        later = [look(root, cache) for _ in range(options.rounds)]
        ready, memory, both, all_memory = (statistics.median(column) for column in zip(*later, strict=True))
        print(f"from the cache: ready after {ready:.2f} s and {memory:.0f} MB, {ready / first[0]:.4f} of the first time")
        print(f"both splits, each image file looked at: {both:.2f} s; {all_memory:.0f} MB once every image was asked for")


if __name__ == "__main__":
    main()
