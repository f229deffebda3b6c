"""Evaluates a checkpoint on the built-in data set and prints everything it found; started by a test on several processes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from gai_yolo.data.dataset import EvaluationSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.data.sources import load_index
from gai_yolo.detector import YOLO12
from gai_yolo.detector.loss import DetectionLoss
from gai_yolo.detector.weights import load_weights
from gai_yolo.distributed.world import World
from gai_yolo.evaluation.evaluator import Evaluator
from gai_yolo.sections import DataConfig, EvaluationConfig


def main(checkpoint: Path, cache: Path) -> None:
    """Print one line of JSON on rank 0."""
    world = World("cpu", threads=1)
    index = load_index(DataConfig(cache_folder=cache), "val")
    model = YOLO12("debug", len(index.categories))
    load_weights(model, checkpoint)
    # So early in training all scores are far below the threshold; raising the biases gives something to count.
    for branch in model.head.cv3:
        branch[-1].bias.data += 6.0  # type: ignore[index]
    images = EvaluationSet(ImageSource(index.images, 64, "none", cache))
    # 13 images in batches of 2: a short last batch, and uneven shares.
    loader = EvaluationLoader(images, 2, world.rank, world.world_size, workers=0, pin_memory=False)
    evaluate = Evaluator(loader, index, DetectionLoss(), world, EvaluationConfig(), amp="none", channels_last=True)
    result = evaluate(model.eval())
    if world.is_first:
        hasher = hashlib.sha256()
        for found in sorted(result.detections, key=lambda item: item.image_id):
            for array in (found.boxes, found.scores, found.classes):
                hasher.update(str(found.image_id).encode() + array.tobytes())
        summary = {
            "losses": result.losses,
            "stats": result.metrics.stats,
            "per_class": result.metrics.per_class,
            "num_images": len({found.image_id for found in result.detections}),
            "num_detections": sum(len(found.scores) for found in result.detections),
            "digest": hasher.hexdigest(),
        }
        print(json.dumps(summary))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
