"""The folder that a prediction leaves: pictures, tables, labels. Each file is there as a whole, or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gai_yolo.errors import Refusal
from gai_yolo.predict.result import Result
from gai_yolo.predict.sources import PREDICTION_FILE, Item
from gai_yolo.reporting.drawing import write_image
from gai_yolo.store.atomic import publish, publish_text

SAVED_KINDS = ("images", "coco", "yolo", "csv")
"""What can be saved."""
COCO_FILE, TABLE_FILE, LABEL_FOLDER, DRAWN_FOLDER = "coco.json", "predictions.csv", "labels", "images"
"""Files, and folders."""
BEGUN = '{"complete": false}\n'
"""What prediction.json says until the end."""
LONGEST_JPEG = 65_500
"""Pixels of a side."""
MOST_WAITING = 8
"""Pictures that are drawn and written while the network goes on."""
TABLE_COLUMNS = ("file", "frame", "class", "name", "score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True, eq=False)
class Row:
    """What was found in one picture or frame; the picture itself would be too much to keep."""

    file: str
    frame: int | None
    """Of a video or camera, from 1."""
    width: int
    height: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


def new_folder(given: Path | None, name: str, overwrite: bool) -> Path:
    """The folder for results, made.

    Args:
        given: that of `--output`, which must be empty or not there; None for the first free one of `predictions/<name>/1`, 2, ...
        overwrite: files in `given` may be replaced; others stay.

    Raises:
        Refusal: it is in use.
        OSError: it cannot be made.
    """
    if given is not None:
        if given.exists() and not given.is_dir():
            raise Refusal(f"{given}: is a file; give --output a folder.")
        given.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(given.iterdir()):
            raise Refusal(f"{given}: is not empty; give another --output, or --overwrite.")
        return given
    parent = Path("predictions", name)
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(one.name) for one in parent.iterdir() if one.name.isascii() and one.name.isdecimal()), default=0) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # another command was faster
            number += 1
        else:
            return parent / str(number)


class Output:
    """Writes results into a folder, as they come; `finish` writes the files that are about all of them.

    Used as a context manager, so that what waits to be written is written, however the block ends.

    Args:
        overwrite: the folder may hold another prediction.
    """

    def __init__(self, folder: Path, kinds: Collection[str], class_names: tuple[str, ...], overwrite: bool = False) -> None:
        self.folder, self._kinds, self._class_names, self._overwrite = folder, kinds, class_names, overwrite
        self.rows: list[Row] = []
        self._pool = ThreadPoolExecutor(2, "gai-yolo-write")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)

    @property
    def draws(self) -> bool:
        """Whether drawn pictures are wanted."""
        return "images" in self._kinds

    def add(self, item: Item, result: Result, frame: int | None = None) -> None:
        """Take a result; drawn pictures and labels are written by threads.

        Raises:
            Refusal: another command writes into the folder.
            OSError: this or an earlier one cannot be written.
        """
        if not self.rows:
            self._claim()
        height, width = result.image.shape[:2]
        row = Row(_text(item.path), frame, width, height, result.boxes, result.scores, result.classes)
        self.rows.append(row)
        if self.draws and frame is None:
            suffix = ".jpg" if max(height, width) <= LONGEST_JPEG else ".png"
            self._later(partial(_draw, self.place(DRAWN_FOLDER, item.output + suffix), result))
        if "yolo" in self._kinds:
            # A video's labels lie in a folder with a dot in its name, which those of images have not.
            name = f"{item.output}.txt" if frame is None else f"{item.output}.frames/{frame:06d}.txt"
            self._later(partial(_label, self.place(LABEL_FOLDER, name), row))

    def place(self, kind: str, name: str) -> Path:
        """A path in the folder, whose parents are there. Raises `OSError`."""
        path = self.folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, about: dict[str, Any]) -> None:
        """Wait for what is being written, and write the files about everything.

        Args:
            about: the command, for prediction.json.

        Raises:
            OSError: something cannot be written.
        """
        self._wait(0)
        if "coco" in self._kinds:
            publish(self.folder / COCO_FILE, lambda file: write_coco(file, self.rows, self._class_names))
        if "csv" in self._kinds:
            publish(self.folder / TABLE_FILE, lambda file: write_csv(file, self.rows, self._class_names))
        found = self.counts()
        about = {**about, "pictures": len(self.rows), "objects": sum(found.values()), "found": found}
        publish_text(self.folder / PREDICTION_FILE, json.dumps(about, indent=1) + "\n")

    def counts(self) -> dict[str, int]:
        """Objects of each class that was found, in the order of the classes."""
        numbers = Counter(number for row in self.rows for number in row.classes.tolist())
        found: Counter[str] = Counter()
        for number in sorted(numbers):
            found[self._class_names[number]] += numbers[number]
        return dict(found)

    def _claim(self) -> None:
        """Mark the folder with the first result, whatever becomes of the command: what is drawn in it must not be looked at by the next
        one, and what an earlier command has left in it is no longer all of one piece."""
        path = self.folder / PREDICTION_FILE
        if self._overwrite:
            publish_text(path, BEGUN)
            return
        try:
            with path.open("x", encoding="ascii") as file:
                file.write(BEGUN)
        except FileExistsError:
            raise Refusal(f"{self.folder}: another prediction is written there by now; give another --output.") from None

    def _later(self, write: Callable[[], None]) -> None:
        self._waiting.append(self._pool.submit(write))
        self._wait(MOST_WAITING)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()


def _draw(path: Path, result: Result) -> None:
    write_image(path, result.draw())


def _label(path: Path, row: Row) -> None:
    publish_text(path, yolo_text(row))


def yolo_text(row: Row) -> str:
    """A line for each detection: class, centre x and y, width, height (parts of the picture's width or height), score."""
    sides = np.array([row.width, row.height], dtype=np.float64)
    low, high = row.boxes[:, :2] / sides, row.boxes[:, 2:] / sides
    numbers = np.concatenate([(low + high) / 2, high - low], axis=1).tolist()
    lines = zip(row.classes.tolist(), numbers, row.scores.tolist(), strict=True)
    return "".join(f"{number} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n" for number, box, score in lines)


def write_coco(file: BinaryIO, rows: Collection[Row], class_names: tuple[str, ...]) -> None:
    """COCO's json with images, categories (ids from 1) and annotations, which are its results with an id and an area; a line for each."""

    def images() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows, 1):
            one = {"id": number, "file_name": row.file, "width": row.width, "height": row.height}
            yield one if row.frame is None else {**one, "file_name": f"{row.file}#{row.frame}", "video": row.file, "frame": row.frame}

    def annotations() -> Iterator[dict[str, Any]]:
        number = 0
        for image, row in enumerate(rows, 1):
            corners = zip(_shortest(row.boxes), _shortest(row.boxes[:, 2:] - row.boxes[:, :2]), strict=True)
            for ((x, y, _, _), (width, height)), score, place in zip(corners, _shortest(row.scores), row.classes.tolist(), strict=True):
                number += 1
                box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0, "score": score}
                yield {"id": number, "image_id": image, "category_id": place + 1, **box}

    categories = ({"id": number, "name": name, "supercategory": ""} for number, name in enumerate(class_names, 1))
    for start, entries in (('{"images": [', images()), ('], "categories": [', categories), ('], "annotations": [', annotations())):
        file.write(start.encode())
        for number, entry in enumerate(entries):
            file.write(f"{',' if number else ''}\n{json.dumps(entry)}".encode())
    file.write(b"]}\n")


def write_csv(file: BinaryIO, rows: Collection[Row], class_names: tuple[str, ...]) -> None:
    """A line for each detection, under `TABLE_COLUMNS`; a picture without any has none."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(TABLE_COLUMNS)
    for row in rows:
        for box, score, number in zip(_shortest(row.boxes), _shortest(row.scores), row.classes.tolist(), strict=True):
            table.writerow((row.file, "" if row.frame is None else row.frame, number, class_names[number], score, *box))
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    file.write(text.getvalue().encode())


def _shortest(values: NDArray[np.float32]) -> list[Any]:
    """Numbers with as few digits as lead back to the same float32."""
    found: list[Any] = values.astype(str).astype(np.float64).tolist()
    return found


def _text(path: Path) -> str:
    """A name as text that every program can read: bytes that are none as `\\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")
