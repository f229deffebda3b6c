"""The class `Detector`: a trained network for programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from gai_yolo.data.formats.reading import expand
from gai_yolo.inference.pictures import Picture, as_picture, described, read_picture
from gai_yolo.inference.prediction import (
    Predictor,
    Selection,
    batches,
    checked_count,
    checked_size,
    choose_device,
    class_positions,
    read_ahead,
)
from gai_yolo.inference.trained import TrainedModel, load_trained
from gai_yolo.predict.result import Result, result_of

OneImage: TypeAlias = "str | os.PathLike[str] | NDArray[np.uint8] | torch.Tensor | Pillow.Image"
DEFAULT_BATCH = 16


class Detector:
    """A trained network that looks for objects in pictures. Threads may share one; it writes no file and changes no global setting.

    ```python
    from gai_yolo import Detector

    detector = Detector.load("experiments/shapes")
    result = detector.predict("photo.jpg")
    for box, score, name in zip(result.boxes, result.scores, result.names):
        print(name, score, box)
    ```

    Args:
        trained: its network is moved to the device, and belongs to the detector from then on.
        device: as `choose_device`.
    """

    def __init__(self, trained: TrainedModel, device: str = "auto") -> None:
        self._predictor = Predictor(trained, choose_device(device))

    @classmethod
    def load(cls, source: str | os.PathLike[str], which: str = "best", device: str = "auto") -> Detector:
        """Read a network out of the folder of a run or a weight file.

        Args:
            which: of a run: `best`, `last`, or a checkpoint's name such as `epoch_010`.
            device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...

        Raises:
            CheckpointError: it is neither, or damaged, or not that of a YOLO12.
            Refusal: there is no such device.
        """
        return cls(load_trained(expand(Path(source)), which), device)

    @property
    def names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self._predictor.class_names)

    @property
    def size(self) -> int:
        """Side in pixels of the square that pictures are fitted into by default: that of the training."""
        return self._predictor.size

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._predictor.device

    def predict(
        self,
        images: Any,
        *,
        confidence: float = 0.25,
        iou: float = 0.7,
        max_detections: int = 300,
        classes: Iterable[str | int] | str | int | None = None,
        size: int | None = None,
        batch_size: int = DEFAULT_BATCH,
    ) -> Any:
        """Look for objects in one image or several.

        Args:
            images: one of these, or a sequence or other iterable of them:
                a path; a NumPy array (H, W, 3) uint8 **RGB** (OpenCV's are BGR: turn them by `[..., ::-1]`), (H, W, 4) RGBA or (H, W)
                grey; a torch tensor (3, H, W), uint8 0..255 or floating point 0..1, RGB; an image of Pillow's. Files and Pillow's images
                are turned as their EXIF says. A tensor (B, 3, H, W) and an array (B, H, W, 3) are several images.
            confidence: 0..1; what has a score at or below it is dropped.
            iou: 0..1; of two boxes of one class that overlap more, the surer stays.
            max_detections: of an image.
            classes: names or numbers of the only ones to look for; None for all.
            size: side in pixels, a multiple of 32, of the square that images are fitted into; None for that of the training.
            batch_size: images that are computed together; large ones in smaller batches.

        Returns:
            A `Result` for one image, a list of them for several. A list holds all the images: for very many use `stream`.

        Raises:
            DataError: a file is not there, or cannot be decoded; the first one ends the call.
            TypeError, ValueError: what is no image; an argument that is not in its range (`Refusal`, a `ValueError`).
        """
        several = not _is_one(images)
        read = self._checked(confidence, iou, max_detections, classes, size, batch_size)
        results = list(read(images if several else [images], True))
        return results if several else results[0]

    def stream(
        self,
        images: Iterable[Any],
        *,
        confidence: float = 0.25,
        iou: float = 0.7,
        max_detections: int = 300,
        classes: Iterable[str | int] | str | int | None = None,
        size: int | None = None,
        batch_size: int = 1,
    ) -> Iterator[Result]:
        """The results of any number of images, one after the other: of a camera, or of more than there is memory for.

        Takes no more than `batch_size` images from `images` before it gives out their results. Arguments and errors as of `predict`, and
        one image is one here as well; those of an image are raised when its turn comes, and end the stream.
        """
        read = self._checked(confidence, iou, max_detections, classes, size, batch_size)
        return read([images] if _is_one(images) else images, False)

    def _checked(
        self,
        confidence: float,
        iou: float,
        max_detections: int,
        classes: Iterable[str | int] | str | int | None,
        size: int | None,
        batch_size: int,
    ) -> Callable[[Iterable[Any], bool], Iterator[Result]]:
        """Arguments as one function, so that a wrong one is refused before a stream begins."""
        wanted: Any = classes if classes is None or (isinstance(classes, Iterable) and not isinstance(classes, str | bytes)) else [classes]
        positions = None if wanted is None else class_positions(wanted, self._predictor.class_names)
        selection, side = Selection(confidence, iou, max_detections, positions), checked_size(self.size if size is None else size)
        checked_count("batch_size", batch_size)

        def results(images: Iterable[Any], is_ahead: bool) -> Iterator[Result]:
            numbered = enumerate(images)
            pictures = read_ahead(_read, numbered) if is_ahead else map(_read, numbered)
            for batch in batches(pictures, batch_size, lambda picture: picture.stored.size // 3):
                yield from self.results_of(batch, selection, side)

        return results

    def results_of(self, pictures: list[Picture], selection: Selection, size: int) -> list[Result]:
        """The results of one batch."""
        found = self._predictor(pictures, selection, size)
        return [result_of(picture, one, self._predictor.class_names) for picture, one in zip(pictures, found, strict=True)]


def _is_one(images: Any) -> TypeGuard[OneImage]:
    if isinstance(images, torch.Tensor | np.ndarray):
        return images.ndim != 4
    return isinstance(images, str | os.PathLike | Pillow.Image) or not isinstance(images, Iterable)


def _read(numbered: tuple[int, Any]) -> Picture:
    number, value = numbered
    if isinstance(value, str | os.PathLike):
        return read_picture(expand(Path(value)))
    return as_picture(value, described(value, number))
