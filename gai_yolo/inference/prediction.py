"""From pictures to what is in them, by the same steps and to the same bits as evaluation, given the same batch on the same processor.

Nothing here changes anything outside of the call: no global setting of PyTorch's, no file. Threads may share a `Predictor`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gai_yolo.config import Config
from gai_yolo.data.augment import Sample, letterbox
from gai_yolo.data.header import SIDES_CHANGE
from gai_yolo.data.images import fitted_sides, resized, turned
from gai_yolo.detector.network import autocast, to_input
from gai_yolo.detector.postprocess import Detections, select_detections, to_file_pixels
from gai_yolo.errors import Refusal
from gai_yolo.inference.pictures import Picture
from gai_yolo.inference.trained import TrainedModel
from gai_yolo.machine import available_cores

T = TypeVar("T")
S = TypeVar("S")

LARGEST_STRIDE = 32
"""Sides of the network's input are multiples of it."""
LARGEST_INPUT = 16_384
"""Pixels of such a side; a few zeros too many would take all memory, and the process be killed without a word."""
MOST_BATCH_PIXELS = 100_000_000
"""A batch takes no more pictures once they have so many pixels: 16 photographs of a telephone would be half a gigabyte."""
MOST_READERS = 4
"""Threads that decode pictures while the network computes."""
BOXLESS, CLASSLESS = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Selection:
    """Which detections are given out.

    Raises:
        Refusal: a value is not in its range.
    """

    confidence: float = 0.25
    """0..1; scores at or below it are dropped."""
    iou: float = 0.7
    """0..1; of boxes of one class that overlap more, the surest stays."""
    max_detections: int = 300
    """Of a picture; the surest stay."""
    classes: tuple[int, ...] | None = None
    """Positions of the only ones that are looked for; None for all."""

    def __post_init__(self) -> None:
        for name, value in (("confidence", self.confidence), ("iou", self.iou)):
            if not _is_share(value):
                raise Refusal(f"{name}: must lie between 0 and 1, and is {value}.")
        checked_count("max_detections", self.max_detections)


class Predictor:
    """A trained network on a device.

    Args:
        trained: its network is moved there, with the number and memory formats of its training, as evaluation does.
    """

    def __init__(self, trained: TrainedModel, device: torch.device) -> None:
        training = (trained.config or Config()).training
        self.device, self._amp, self._channels_last = device, training.amp, training.channels_last
        self.class_names, self.size = tuple(trained.class_names), trained.image_size
        memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        self._network = trained.network.to(device, memory_format=memory_format)  # type: ignore[call-overload]

    def __call__(self, pictures: Sequence[Picture], selection: Selection, size: int) -> list[Detections]:
        """One batch, of at least one picture.

        Args:
            size: of the square that pictures are fitted into, as `checked_size`.

        Returns:
            Of each picture, on the CPU: boxes in pixels of the turned picture, within it, by descending score.
        """
        inputs, geometries = zip(*(_fitted(picture, size) for picture in pictures), strict=True)
        images = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).to(self.device)
        with torch.inference_mode():
            with autocast(self.device, self._amp):
                raw = self._network.raw(to_input(images, self._channels_last))
            boxes, probabilities = self._network.head.decode(raw, size, size)
            chosen = None if selection.classes is None else torch.tensor(selection.classes, device=self.device)
            wanted = probabilities if chosen is None else probabilities[..., chosen]
            found = select_detections(boxes, wanted, selection.confidence, selection.iou, selection.max_detections)
            rows = zip(pictures, geometries, found, strict=True)
            return [_in_picture(picture, geometry, one, chosen) for picture, geometry, one in rows]


def _fitted(picture: Picture, size: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], Tensor]:
    """A picture on the grey square, and scale, left and top padding. Resized before it is turned, as evaluation does."""
    height, width = fitted_sides(picture.height, picture.width, size)
    stored = (width, height) if picture.orientation >= SIDES_CHANGE else (height, width)
    sample = Sample(turned(resized(picture.stored, *stored), picture.orientation), BOXLESS, CLASSLESS)
    sample, left, top = letterbox(sample, size)
    return sample.image, torch.tensor([size / max(picture.height, picture.width), left, top], dtype=torch.float32)


def _in_picture(picture: Picture, geometry: Tensor, found: Detections, chosen: Tensor | None) -> Detections:
    boxes = to_file_pixels(found.boxes, geometry, picture.width, picture.height)
    classes = found.classes if chosen is None else chosen[found.classes]
    return Detections(boxes.cpu(), found.scores.cpu(), classes.cpu())


def choose_device(setting: str) -> torch.device:
    """`auto` takes a GPU where there is one; else as PyTorch names devices: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        Refusal: there is no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # also where the module of a device is not installed
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise Refusal(f"device {setting}: cannot be used ({said}); give auto, cpu, cuda or cuda:N.") from None
    if device.type == "meta":
        raise Refusal("device meta: computes nothing; give auto, cpu, cuda or cuda:N.")
    return device


def checked_size(size: int) -> int:
    """A side of the network's input in pixels. Raises `Refusal` if it is none."""
    if not _is_whole(size) or size < LARGEST_STRIDE or size % LARGEST_STRIDE:
        raise Refusal(f"size: must be a whole number, a multiple of {LARGEST_STRIDE}, and is {size}.")
    if size > LARGEST_INPUT:
        raise Refusal(f"size: must be at most {LARGEST_INPUT}, and is {size}.")
    return int(size)


def checked_count(name: str, value: int) -> None:
    """Raises `Refusal` if a value that is called so is no whole number from 1 on."""
    if not _is_whole(value) or value < 1:
        raise Refusal(f"{name}: must be at least 1, a whole number, and is {value}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer)


def _is_share(value: float) -> bool:
    """Whether it lies between 0 and 1, which what is no number does not."""
    try:
        return bool(0 <= value <= 1)
    except (TypeError, ValueError, RuntimeError):  # a text, or many numbers, of NumPy or PyTorch
        return False


def class_positions(wanted: Iterable[str | int], class_names: Sequence[str]) -> tuple[int, ...]:
    """Classes by name, or by number from 0, as positions in ascending order; a name that is a number counts as a name.

    Raises:
        Refusal: there is no such class, or none is given.
    """
    found: set[int] = set()
    for one in wanted:
        named = [position for position, name in enumerate(class_names) if name == one]
        number = int(one) if not named and str(one).isdecimal() else -1
        if not named and not 0 <= number < len(class_names):
            known = ", ".join(class_names[:20]) + (f" and {len(class_names) - 20} more" if len(class_names) > 20 else "")
            raise Refusal(f"classes: there is no {one!r}; there are {known}, or give numbers from 0 to {len(class_names) - 1}.")
        found.update(named or [number])
    if not found:
        raise Refusal("classes: none is given; leave it out to look for all.")
    return tuple(sorted(found))


def batches(items: Iterable[T], batch_size: int, pixels: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of `batch_size`, the last one of what is left; shorter ones where pictures are large, see `MOST_BATCH_PIXELS`."""
    batch: list[T] = []
    held = 0
    for item in items:
        batch.append(item)
        held += pixels(item)
        if len(batch) == batch_size or held >= MOST_BATCH_PIXELS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def read_ahead(read: Callable[[S], T], items: Iterable[S], readers: int | None = None, ahead: int | None = None) -> Generator[T]:
    """`map`, with threads that are ahead of who takes the results; in order. What `read` raises is raised in its place.

    Args:
        readers: threads; None for as many as there are cores, and at most `MOST_READERS`.
        ahead: results that wait at most; None for as many as threads.
    """
    readers = readers or min(MOST_READERS, available_cores())
    pool = ThreadPoolExecutor(readers, "gai-yolo-read")
    waiting: deque[Future[T]] = deque()
    rest = iter(items)
    try:
        waiting.extend(pool.submit(read, item) for item in itertools.islice(rest, ahead or readers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, item) for item in itertools.islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
