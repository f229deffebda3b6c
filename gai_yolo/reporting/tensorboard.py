"""TensorBoard files that show one unbroken run, however often it was killed.

Every value stands at the number of completed optimizer steps. A run that was killed at step 20 and goes on from step 13 has
logged seven steps that never happened; they are cut off its event files before the first new value is written. SummaryWriter's
own `purge_step` is set as well, for a TensorBoard that already shows them, but does not suffice: readers forget to purge texts,
and read files in the order of their names, which start with a clock.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gai_yolo.checkpointing.state import LOSSES

PATTERN = "events.out.tfevents.*"
LOGGED_QUALITY = 90
QUEUE = 10_000
"""Events waiting for the writer thread before a step has to wait for the disk."""

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes into one folder; used by one process at a time (the run folder's lease sees to that).

    Not guaranteed: values of the last moments before a kill or a power cut may be missing. A failing disk never ends the
    training: the failure is told once, and nothing is logged after it until the next start.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        """Open a new event file, for a run that has completed `start_step` steps."""
        # These load 0.2 s of protocol buffers, and only the first rank with logging switched on needs them.
        from tensorboard.compat import tf
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._start_step, self._summary = folder, start_step, Summary
        self._failures: tuple[type[Exception], ...] = (OSError, tf.errors.OpError)
        self._writer: SummaryWriter | None = None
        self._present: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._present = cut_history(folder, start_step)
            _rename_files_from_the_future(folder)
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, max_queue=QUEUE)
        except self._failures as error:
            self._give_up(error)

    def batch(self, step: int, losses: Mapping[str, float], learning_rate: float) -> None:
        """Log the losses (total, box, cls, dfl) and the learning rate of an optimizer step."""
        self.scalars(step, {**_loss_tags("Loss/Train_Batch", losses), "Learning_Rate": learning_rate})

    def epoch(self, step: int, train_losses: Mapping[str, float]) -> None:
        """Log the mean training losses of the epoch that ended with `step`."""
        self.scalars(step, _loss_tags("Loss/Train", train_losses))

    def evaluation(
        self, step: int, losses: Mapping[str, float], stats: Mapping[str, float], per_class: Mapping[str, tuple[float, float]]
    ) -> None:
        """Log an evaluation; numbers that are undefined (-1: nothing to find) are left out."""
        numbers = {f"COCO/{name}": value for name, value in stats.items()}
        numbers.update({f"COCO_AP/{name}": ap for name, (ap, _) in per_class.items()})
        defined = {tag: value for tag, value in numbers.items() if value >= 0}
        self.scalars(step, {**_loss_tags("Loss/Validation", losses), **defined})

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Log a picture, (H, W, 3) RGB."""
        # JPEG in place of add_image's PNG: a tenth of the bytes, and TensorBoard's checksum of them is slow pure Python.
        import cv2

        if self._writer is None:
            return
        done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, LOGGED_QUALITY])
        assert done, "OpenCV cannot encode JPEG"
        height, width = image.shape[:2]
        encoded = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data.tobytes())
        self._add(step, [self._summary.Value(tag=name, image=encoded)])

    def config_text(self, step: int, yaml_text: str) -> None:
        """Log the configuration; `step` is the first one it holds for, that is, `start_step + 1` when a run starts."""
        from torch.utils.tensorboard.summary import text

        # Indented by four spaces, Markdown shows it as it is.
        block = "".join(f"    {line}\n" for line in yaml_text.splitlines())
        self._add(step, list(text("Config", block).value))  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Wait until everything logged so far is written (not fsynced); not for the training loop."""
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        """Write what is left and stop the writer thread. May be called twice."""
        self._try(lambda writer: writer.close())
        self._writer = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers under their tags."""
        self._add(step, [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def _add(self, step: int, values: list[Any]) -> None:
        """Write values of one step as one record: a kill leaves all of them or none."""
        # A run killed between evaluating and saving evaluates again, with the same result, at the step it starts from.
        if step == self._start_step:
            values = [value for value in values if value.tag not in self._present]
        if values:
            self._try(lambda writer: writer.file_writer.add_summary(self._summary(value=values), step))

    def _try(self, action: Callable[[Any], None]) -> None:
        """SummaryWriter's thread dies at the first failing write, and every later call here raises what it died of."""
        if self._writer is None:
            return
        try:
            action(self._writer)
        except self._failures as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        logger.warning(f"{self._folder}: TensorBoard logging stopped ({error}); training goes on, and logs again after a restart.")


def cut_history(folder: Path, step: int) -> set[str]:
    """Cut everything after `step`, and a torn last record, off the event files of a folder.

    An earlier start has cut its history already, so only files from starts after `step`, and the one before them, are read.
    Files in which nothing is left are removed.

    Returns:
        Tags that have a value at exactly `step`.

    Raises:
        OSError: a file cannot be read or changed.
    """
    present: set[str] = set()
    for path in sorted(folder.glob(PATTERN), reverse=True):
        first, end, empty = None, 0, True
        for record_step, tags, record_end in _records(path, step):
            first = record_step if first is None and record_step > 0 else first
            if record_step > step:
                break
            present.update(tags)
            empty = empty and record_step == 0
            end = record_end
        if empty and first is not None:
            path.unlink()
        elif end < path.stat().st_size:
            os.truncate(path, end)
        if first is not None and first <= step:
            break
    return present


def _records(path: Path, wanted: int) -> Iterator[tuple[int, list[str], int]]:
    """Step, tags (only read at step `wanted`) and end offset of each whole record, up to the first damaged one.

    A record is: length (uint64), masked CRC-32C of the length, an Event, masked CRC-32C of the Event
    (https://www.tensorflow.org/tutorials/load_data/tfrecord).
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    size = path.stat().st_size
    with path.open("rb") as stream:
        end = 0
        while len(header := stream.read(12)) == 12:
            length, checksum = struct.unpack("<QI", header)
            end += length + 16
            if end > size or checksum != masked_crc32c(header[:8]):
                return
            data = stream.read(length + 4)
            # The last record may be the remains of a power cut; summing all of them would take minutes in a long run.
            if end == size and struct.unpack("<I", data[-4:])[0] != masked_crc32c(data[:-4]):
                return
            step = _step(data)
            yield step, [value.tag for value in Event.FromString(data[:-4]).summary.value] if step == wanted else [], end


def _step(event: bytes) -> int:
    """The step of a serialized Event, without parsing the picture it may hold: field 1 is the time, field 2 the step."""
    if event[:1] != b"\x09" or event[9:10] != b"\x10":
        return 0  # protocol buffers leave out a step of 0
    value, shift = 0, 0
    for byte in event[10:20]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value


def _rename_files_from_the_future(folder: Path) -> None:
    """Make sure that a file named after this second sorts behind all others, whatever the clocks of earlier machines said.

    Names are `events.out.tfevents.<seconds>.<host>.<process>.<number>`. Renumbering keeps the order among the old files.
    """
    paths, now = sorted(folder.glob(PATTERN)), int(time.time())
    numbers = [path.name.split(".")[3] for path in paths]
    if not paths or not numbers[-1].isdigit() or int(numbers[-1]) < now:
        return
    for place, (path, number) in enumerate(zip(paths, numbers, strict=True)):
        latest = now - (len(paths) - place)
        if number.isdigit() and int(number) > latest:
            path.rename(path.with_name(path.name.replace(f".{number}.", f".{latest:010d}.", 1)))


def _loss_tags(prefix: str, losses: Mapping[str, float]) -> dict[str, float]:
    return {prefix if name == "total" else f"{prefix}_{name}": losses[name] for name in LOSSES}
