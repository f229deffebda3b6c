"""What seldom classes weigh: in the loss, and in how often images are drawn. Functions of the index alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gai_yolo.data.index import Index
from gai_yolo.errors import ConfigError


def class_weights(setting: Mapping[str, float] | Literal["auto"] | None, index: Index) -> list[float] | None:
    """What `loss.class_weights` means for a training set: a weight for each class; None: all have 1.

    Raises:
        ConfigError: it names a class that is none.
    """
    if setting is None:
        return None
    names = index.class_names
    if setting != "auto":
        unknown = [name for name in setting if name not in names]
        if unknown:
            raise ConfigError(f"loss.class_weights: {unknown[0]!r} is no class of {index.source}; its classes are {', '.join(names[:10])}.")
        return [setting.get(name, 1.0) for name in names]
    counts = np.bincount(index.images.classes[~index.images.crowd], minlength=len(names)).astype(np.float64)
    roots = np.where(counts > 0, counts, counts.max(initial=1.0)) ** -0.5
    mean = float((roots * counts).sum() / max(counts.sum(), 1.0)) or 1.0
    return [float(np.float32(weight)) for weight in roots / mean]


def repeat_factors(index: Index, threshold: float) -> NDArray[np.float64]:
    """For each image how often it is to be drawn, in proportion: the largest of its classes' max(1, sqrt(threshold / f)), f being the
    fraction of the images that hold the class (Gupta et al. 2019, arXiv 1908.03195, appendix B.2)."""
    images = index.images
    of_box = np.repeat(np.arange(len(images)), np.diff(images.columns["first_boxes"]))
    pairs = np.unique(np.stack((of_box, images.classes))[:, ~images.crowd], axis=1)
    frequency = np.bincount(pairs[1], minlength=len(index.categories)) / max(len(images), 1)
    of_class = np.maximum(1.0, np.sqrt(threshold / np.maximum(frequency, 1e-12)))
    factors = np.ones(len(images))
    np.maximum.at(factors, pairs[0], of_class[pairs[1]])
    return factors
