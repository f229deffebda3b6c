"""Samples as training and evaluation see them, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from gai_yolo.data.augment import Sample, letterbox, mixup, mosaic, random_affine, random_flip, random_hsv
from gai_yolo.data.images import GREY, ImageSource, fitted_size
from gai_yolo.data.order import Key
from gai_yolo.sections import AugmentConfig


@dataclass(frozen=True)
class Item:
    """One sample on its way into a batch."""

    sample: Sample
    image_id: int
    letterbox: tuple[float, float, float]
    """Scale, left and top padding; zeros in training."""
    unreadable: tuple[int, ...]
    """Ids of images that could not be decoded."""


@dataclass
class Batch:
    """What the loader hands to the training step and to evaluation: images of one size with the boxes of all of them in one list."""

    images: Tensor
    """(B, 3, S, S) uint8, RGB."""
    box_image: Tensor
    """(M,) int64: the position in the batch of the image each box belongs to."""
    classes: Tensor
    """(M,) int64 class positions."""
    boxes: Tensor
    """(M, 4) float32 xyxy in pixels of the network input."""
    image_ids: Tensor
    """(B,) int64 ids as in the index."""
    letterbox: Tensor
    """(B, 3) float32: scale, left padding and top padding in pixels, with x_input = x_file * scale + left. Evaluation only."""
    unreadable: Tensor
    """(K,) int64 ids of images that could not be decoded and were replaced by grey without boxes."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; asynchronous from pinned memory."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def resized(self, image_size: int) -> Batch:
        """The same with images of another side, in pixels; rounded to uint8, as decoded ones are."""
        old = self.images.shape[-1]
        if old == image_size:
            return self
        images = interpolate(self.images.float(), (image_size, image_size), mode="bilinear", align_corners=False)
        return replace(self, images=images.round().to(torch.uint8), boxes=self.boxes * (image_size / old))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins memory."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


class SampleSet(Dataset[Item]):
    """Samples of one size, by `Key`."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.records)


class TrainingSet(SampleSet):
    """Augmented samples: every random draw comes from the seed and the key.

    Args:
        epochs: of the whole run; mosaic and mixup are off in its last `augment.close_mosaic` ones.
    """

    def __init__(self, images: ImageSource, augment: AugmentConfig, seed: int, epochs: int) -> None:
        super().__init__(images)
        self.augment = augment
        self.seed = seed
        self.epochs = epochs

    def __getitem__(self, key: Key) -> Item:
        draw = (key.draw,) if key.draw else ()
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, key.epoch, key.position, *draw)))
        unreadable: list[int] = []
        mixing = key.epoch <= self.epochs - self.augment.close_mosaic
        sample = self._composed(key.position, mixing, rng, unreadable)
        if mixing and rng.random() < self.augment.mixup:
            other = int(rng.integers(len(self)))
            sample = mixup(sample, self._composed(other, mixing, rng, unreadable), rng)
        sample = Sample(random_hsv(sample.image, self.augment, rng), sample.boxes, sample.classes)
        sample = random_flip(sample, self.augment, rng)
        return Item(sample, self.images.records[key.position].image_id, (0.0, 0.0, 0.0), tuple(unreadable))

    def _composed(self, position: int, mixing: bool, rng: np.random.Generator, unreadable: list[int]) -> Sample:
        size = self.images.image_size
        if mixing and rng.random() < self.augment.mosaic:
            others = rng.integers(len(self), size=3).tolist()
            tiles = [load_sample(self.images, p, unreadable) for p in (position, *others)]
            sample = mosaic(tiles, size, rng)
        else:
            sample = letterbox(load_sample(self.images, position, unreadable), size)[0]
        return random_affine(sample, size, self.augment.scale, self.augment.translate, rng)


class EvaluationSet(SampleSet):
    """Letterboxed images without any random change."""

    def __getitem__(self, key: Key) -> Item:
        unreadable: list[int] = []
        record = self.images.records[key.position]
        sample = load_sample(self.images, key.position, unreadable)
        scale = self.images.image_size / max(record.height, record.width)
        sample, left, top = letterbox(sample, self.images.image_size)
        return Item(sample, record.image_id, (scale, float(left), float(top)), tuple(unreadable))


def load_sample(images: ImageSource, position: int, unreadable: list[int]) -> Sample:
    """An image and its boxes in the pixels of the resized image; grey and without boxes where the file cannot be decoded."""
    record = images.records[position]
    image = images.load(position)
    if image is None:
        unreadable.append(record.image_id)
        grey = np.full((*fitted_size(record, images.image_size), 3), GREY, dtype=np.uint8)
        return Sample(grey, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    keep = ~record.crowd  # A crowd region has no box of its own to learn; evaluation matches it from the index.
    scale = np.float32(images.image_size / max(record.height, record.width))
    return Sample(image, record.boxes[keep] * scale, record.classes[keep])


def collate(items: Sequence[Item], out: NDArray[np.uint8] | None = None) -> Batch:
    """Put samples of one size together; the images' memory is channels-last, as decoded.

    Args:
        out: where to put the images, (B, S, S, 3).
    """
    samples = [item.sample for item in items]
    counts = torch.tensor([len(s.boxes) for s in samples])
    return Batch(
        images=torch.from_numpy(np.stack([s.image for s in samples], out=out)).permute(0, 3, 1, 2),
        box_image=torch.repeat_interleave(torch.arange(len(samples)), counts),
        classes=torch.from_numpy(np.concatenate([s.classes for s in samples])),
        boxes=torch.from_numpy(np.concatenate([s.boxes for s in samples])),
        image_ids=torch.tensor([item.image_id for item in items]),
        letterbox=torch.tensor([item.letterbox for item in items], dtype=torch.float32),
        unreadable=torch.tensor([i for item in items for i in item.unreadable], dtype=torch.int64),
    )
