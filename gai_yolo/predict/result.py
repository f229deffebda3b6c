"""What was found in one picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gai_yolo.detector.postprocess import Detections
from gai_yolo.inference.pictures import Picture
from gai_yolo.reporting.drawing import draw_detections


@dataclass(frozen=True, eq=False)
class Result:
    """The detections of one picture, by descending score."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB, the picture as it is seen: turned as its EXIF says. Not to be written to."""
    boxes: NDArray[np.float32]
    """(N, 4) xyxy in pixels of `image`, within it."""
    scores: NDArray[np.float32]
    """(N,) in 0..1."""
    classes: NDArray[np.int64]
    """(N,) positions in `class_names`."""
    class_names: tuple[str, ...]
    """Of all classes of the network, as `Detector.names`."""
    path: Path | None = None
    """Of the file; None for what was in memory."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Result({len(self)} detections in {width} x {height}{'' if self.path is None else f', {self.path}'})"

    @property
    def names(self) -> list[str]:
        """The name of each detection: N of them."""
        return [self.class_names[number] for number in self.classes.tolist()]

    def draw(self) -> NDArray[np.uint8]:
        """A copy of `image`, RGB, at its own size, with boxes, names and scores."""
        return draw_detections(self.image, self.boxes, self.scores, self.classes, self.class_names)

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """As COCO's results: `image_id`, `category_id`, `bbox` (left, top, width, height in pixels) and `score`.

        Args:
            category_ids: of each class, as the annotations have them; by default 1, 2, and so on in the order of `class_names`.

        Raises:
            ValueError: not as many ids as classes.
        """
        ids = list(category_ids) if category_ids is not None else list(range(1, len(self.class_names) + 1))
        if len(ids) != len(self.class_names):
            raise ValueError(f"category_ids: {len(ids)} ids for {len(self.class_names)} classes.")
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.classes.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": ids[number], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            for (x1, y1, x2, y2), score, number in rows
        ]

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, with the names in `data["class_name"]`. Raises `ImportError` where that library is not installed."""
        names = np.array(self.names, dtype=str)
        library = _library("supervision")
        return library.Detections(xyxy=self.boxes, confidence=self.scores, class_id=self.classes, data={"class_name": names})

    def to_frame(self) -> Any:
        """As a pandas `DataFrame` with the columns x1, y1, x2, y2, score, class, name. Raises `ImportError` where it is not installed."""
        corners = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T, strict=True))
        return _library("pandas").DataFrame({**corners, "score": self.scores, "class": self.classes, "name": self.names})


def result_of(picture: Picture, found: Detections, class_names: tuple[str, ...]) -> Result:
    """Put together what was looked at and what was found."""
    image = picture.upright()
    if image is picture.stored:
        image = image.view()
    image.flags.writeable = False
    return Result(image, found.boxes.numpy(), found.scores.numpy(), found.classes.numpy(), class_names, picture.path)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed; run `pip install {name}` to get results in its form.", name=name) from error
