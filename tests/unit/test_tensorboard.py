"""TensorBoard files show one unbroken run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gai_yolo.reporting.tensorboard import TensorBoard

LOSSES = {"total": 3.21, "box": 1.2, "cls": 1.1, "dfl": 0.91}
STATS = {"mAP50-95": 0.4123, "mAP_small": -1.0, "AR_100": 0.5}
PER_CLASS = {"[red]cell[/red]": (0.25, 0.5), "empty": (-1.0, -1.0)}
EPOCH = 5
"""Steps of an epoch."""


def log(board: TensorBoard, first: int, last: int) -> None:
    """What a run logs in steps first..last; values tell which step they belong to."""
    for step in range(first, last + 1):
        board.batch(step, {name: value + step for name, value in LOSSES.items()}, step / 1000)
        if step % EPOCH == 0:
            board.epoch(step, LOSSES)
            board.evaluation(step, LOSSES, STATS, {"a": (0.5, 0.7), "empty": (-1.0, -1.0)})
            board.image(step, "Predictions/0", np.full((40, 60, 3), step, dtype=np.uint8))
            board.config_text(step, f"step: {step}")


def shown(folder: Path) -> dict[str, list[int]]:
    """Steps of every tag, as a reader of the folder sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0))
    accumulator.Reload()
    steps = {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    steps.update({tag: [event.step for event in accumulator.Images(tag)] for tag in accumulator.Tags()["images"]})
    steps.update({tag: [event.step for event in accumulator.Tensors(tag)] for tag in accumulator.Tags()["tensors"]})
    return steps


def check_every_step_once(folder: Path, last: int) -> None:
    steps = shown(folder)
    every, epochs = list(range(1, last + 1)), list(range(EPOCH, last + 1, EPOCH))
    parts = ("", "_box", "_cls", "_dfl")
    expected = {f"Loss/Train_Batch{part}": every for part in parts} | {"Learning_Rate": every}
    expected |= {f"Loss/{kind}{part}": epochs for kind in ("Train", "Validation") for part in parts}
    expected |= dict.fromkeys(["COCO/mAP50-95", "COCO/AR_100", "COCO_AP/a", "Predictions/0", "Config/text_summary"], epochs)
    assert steps == expected, "and nothing undefined (-1) is logged"


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def test_killed_run_leaves_no_step_twice(tmp_path: Path) -> None:
    """Loss: curves that jump back and forth after every restart."""
    killed = TensorBoard(tmp_path, 0)
    log(killed, 1, 20)
    killed.flush()
    resumed = TensorBoard(tmp_path, 13)
    log(resumed, 14, 30)
    resumed.close()
    check_every_step_once(tmp_path, 30)


@pytest.mark.parametrize("cut", [1, 5, 30, 400])
def test_event_file_cut_in_a_record_is_mended(cut: int, tmp_path: Path) -> None:
    """Loss: a reader stops at the torn record of a killed writer, or shows its steps twice."""
    killed = TensorBoard(tmp_path, 0)
    log(killed, 1, 20)
    killed.flush()
    (path,) = event_files(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    resumed = TensorBoard(tmp_path, 13)
    log(resumed, 14, 30)
    resumed.close()
    check_every_step_once(tmp_path, 30)


def test_last_record_of_zeros_is_mended(tmp_path: Path) -> None:
    """Loss: after a power cut, when a file system leaves zeros at a file's end, a later step hides behind them."""
    killed = TensorBoard(tmp_path, 0)
    log(killed, 1, 13)
    killed.flush()
    (path,) = event_files(tmp_path)  # renamed by the next start in the same second
    whole = path.stat().st_size
    for zeros in (8, 4096):
        os.truncate(path, whole + zeros)
        TensorBoard(tmp_path, 13).close()
        (path, _) = event_files(tmp_path)
        assert path.stat().st_size == whole
    os.truncate(path, whole - 20)
    os.truncate(path, whole)  # the last record has its length, but not its end
    resumed = TensorBoard(tmp_path, 12)
    log(resumed, 13, 30)
    resumed.close()
    check_every_step_once(tmp_path, 30)


def test_many_restarts_forward_and_back_show_one_run(tmp_path: Path) -> None:
    """Loss: an older checkpoint than last time is the newest good one, and steps of two earlier lives stay in the curves."""
    for start, last in [(0, 20), (13, 18), (13, 17), (15, 27), (25, 26), (5, 9), (9, 9), (9, 22), (20, 21)]:
        board = TensorBoard(tmp_path, start)
        log(board, start + 1, last)
        board.flush()
    final = TensorBoard(tmp_path, 20)
    log(final, 21, 30)
    final.close()
    check_every_step_once(tmp_path, 30)


def test_files_of_a_machine_whose_clock_is_ahead_come_first(tmp_path: Path) -> None:
    """Loss: the run moves to a machine whose clock is behind, readers take its file for the older one, and purge the wrong steps."""
    for start, last in [(0, 20), (13, 18)]:
        board = TensorBoard(tmp_path, start)
        log(board, start + 1, last)
        board.close()
    for path in event_files(tmp_path):
        number = path.name.split(".")[3]
        path.rename(path.with_name(path.name.replace(number, f"{int(number) + 3600}")))
    old = {path.stat().st_ino for path in event_files(tmp_path)}
    resumed = TensorBoard(tmp_path, 16)
    log(resumed, 17, 30)
    resumed.close()
    assert [path.stat().st_ino in old for path in event_files(tmp_path)] == [True, True, False]
    check_every_step_once(tmp_path, 30)


def test_evaluation_repeated_at_the_step_resumed_from_is_shown_once(tmp_path: Path) -> None:
    """Loss: killed between evaluation and checkpoint, a run evaluates again and shows two points at one step."""
    for start, first in [(0, 1), (10, 10), (10, 10), (12, 13)]:
        board = TensorBoard(tmp_path, start)
        log(board, first, 12 if start < 12 else 30)
        board.flush()
    check_every_step_once(tmp_path, 30)


def test_running_viewer_forgets_steps_of_the_killed_run(tmp_path: Path) -> None:
    """Loss: a TensorBoard that is open during the restart keeps the steps it has read from the file before it was cut."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(killed := TensorBoard(tmp_path, 0), 1, 20)
    killed.flush()
    viewer = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    viewer.Reload()
    time.sleep(1.0 - time.time() % 1.0)  # as in real life, the new file is named after a later second
    log(resumed := TensorBoard(tmp_path, 13), 14, 30)
    resumed.close()
    viewer.Reload()
    assert Counter(event.step for event in viewer.Scalars("Learning_Rate")) == Counter(range(1, 31))


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from gai_yolo.reporting.tensorboard import TensorBoard
from gai_yolo.log import showing
told = []
said = showing(lambda record: told.append(record.getMessage()))
said.__enter__()
board = TensorBoard(Path(sys.argv[1]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # writing beyond it fails like a full disk
noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
for step in range(1, 500):
    board.batch(step, dict(total=1.0, box=1.0, cls=1.0, dfl=1.0), 0.1)
    board.image(step, "noise", noise)
board.flush()
board.close()
print(len(told), told)
"""


def test_full_disk_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    """Loss: the run dies, or hangs on a full queue, because its curves cannot be written."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ")
    assert "TensorBoard logging stopped" in done.stdout
    board = TensorBoard(tmp_path, 1)
    board.batch(2, LOSSES, 0.1)
    board.close()
    assert shown(tmp_path)["Learning_Rate"] == [1, 2], "the next start mends the torn file"


def test_folder_that_cannot_be_made_is_told(tmp_path: Path, told: list[str]) -> None:
    """Loss: a file in the way of the log folder ends the run at its start."""
    (tmp_path / "file").write_text("")
    board = TensorBoard(tmp_path / "file" / "log", 0)
    log(board, 1, 5)
    board.close()
    assert len(told) == 1
    assert "TensorBoard logging stopped" in told[0]
