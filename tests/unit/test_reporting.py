"""What people see: terminal, pictures, TensorBoard's server."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gai_yolo.log import OF_NODE
from gai_yolo.reporting.console import Console, NullConsole
from gai_yolo.reporting.drawing import class_colour, draw_comparison, write_image

LOSSES = {"total": 3.21, "box": 1.2, "cls": 1.1, "dfl": 0.91}
STATS = {"mAP50-95": 0.4123, "mAP_small": -1.0, "AR_100": 0.5}
PER_CLASS = {"[red]cell[/red]": (0.25, 0.5), "empty": (-1.0, -1.0)}


class Clock:
    """Time that only passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def said(text: str, level: int = logging.INFO, **more: object) -> logging.LogRecord:
    """What a module says."""
    return logging.makeLogRecord({"msg": text, "levelno": level, **more})


# --- console ---------------------------------------------------------------------------------------------------------------


def test_plain_lines_come_at_the_interval_with_speed_and_time_left() -> None:
    """Loss: a log file full of bar characters, or silent for hours; an ETA that counts only this epoch."""
    stream, clock = io.StringIO(), Clock()
    console = Console(3, 2, stream, clock)
    console.start_epoch(1, 5)
    for step in range(1, 6):
        clock.now += 30.0 if step == 1 else 2.0  # a slow first step must not spoil the estimate
        console.step(step, LOSSES, 0.01, 16)
    console.end_epoch(LOSSES, 38.0, 80)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3, "steps 2 and 4, and the end of the epoch"
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  epoch 1/3  step 2/5  loss 3.21 \(box 1.2 cls 1.1 dfl 0.91\)  8 images/s  ", lines[0])
    assert "ETA 00:00:26" in lines[0], "13 steps of 2 s are left in three epochs"
    assert "ETA 00:00:22" in lines[1]
    assert "epoch 1/3 done" in lines[2]
    assert "2 images/s" in lines[2]
    assert "took 00:00:38" in lines[2]
    assert "ETA 00:00:20" in lines[2]


def test_time_left_of_a_resumed_run_counts_from_its_first_step_here() -> None:
    """Loss: after a restart in the middle of an epoch the ETA divides the past of another machine by the steps of this one."""
    stream, clock = io.StringIO(), Clock()
    console = Console(2, 1, stream, clock)
    console.start_epoch(2, 10)
    clock.now += 3.0
    console.step(8, LOSSES, 0.01, 4)
    assert "step 8/10" in stream.getvalue()
    assert "ETA 00:00:06" in stream.getvalue()


def test_evaluation_table_is_aligned_and_shows_undefined_as_a_dash() -> None:
    """Loss: a -1 read as a result, and a class name in brackets taken for a colour and swallowed."""
    stream = io.StringIO()
    Console(3, 1, stream).evaluation(2, STATS, PER_CLASS, 2.5)
    text = stream.getvalue()
    assert "evaluation after epoch 2/3  loss 2.5" in text
    assert re.search(r"AP  IoU 0.50:0.95  all sizes +0.4123\n", text)
    assert re.search(r"small +-\n", text)
    assert re.search(r"\[red\]cell\[/red\] +0.2500 +0.5000\n", text)
    assert re.search(r"empty +- +-\n", text)
    rows = text.splitlines()[-3:]
    assert len({len(row) for row in rows}) == 1


class Terminal:
    """A pseudo-terminal whose output is collected."""

    def __init__(self) -> None:
        self._main, side = pty.openpty()
        self.stream = os.fdopen(side, "w", encoding="utf-8")
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._main, 65536)
            except OSError:  # Linux's way to say that the other side is closed
                return
            self._chunks.append(chunk)

    def text(self) -> str:
        self.stream.close()
        self._reader.join(10)
        os.close(self._main)
        return b"".join(self._chunks).decode()


def test_terminal_shows_a_bar_and_keeps_every_message_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: warnings overwritten by the progress bar, just when something goes wrong."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    console = Console(2, 1000, terminal.stream)
    console.start_epoch(1, 40)
    others = [threading.Thread(target=console.show, args=(said(f"[bold]from a thread {i}", logging.WARNING),)) for i in range(20)]
    for step in range(1, 41):
        console.step(step, LOSSES, 0.01, 16)
        if step % 2:
            others[step // 2].start()
        time.sleep(0.005)
    for other in others:
        other.join()
    console.end_epoch(LOSSES, 1.0, 640)
    console.evaluation(1, STATS, PER_CLASS, 2.5)
    console.close()
    console.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text())
    assert re.search(r"epoch 1/2 [━╸╺ ]+ *\d+/40 loss 3.21 \(box 1.2 cls 1.1 dfl 0.91\)", plain), "no bar was drawn"
    for i in range(20):
        assert re.search(rf"warning: \[bold\]from a thread {i}\r?\n", plain)
    assert "epoch 1/2 done" in plain
    assert re.search(r"\[red\]cell\[/red\] +0.2500", plain)


def test_broken_output_does_not_end_the_training() -> None:
    """Loss: a training of days ends because the disk under its log file is full, or its terminal hung up."""
    full = Path("/dev/full").open("w", encoding="ascii")  # noqa: SIM115 - closing it fails as well
    console = Console(1, 1, full)
    console.show(said("Größe 白"))  # nor does a stream that cannot hold the letters
    console.start_epoch(1, 1)
    console.step(1, LOSSES, 0.1, 1)
    console.close()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_what_a_node_alone_may_know_and_what_ends_a_process_is_shown_on_any_rank(capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: a node that cannot keep its state in memory, and nobody learns of it; or a process that ends without a word."""
    silent = NullConsole()
    silent.show(said("no room", logging.WARNING, **OF_NODE))
    silent.show(said("error: no such key.", logging.ERROR))
    assert capfd.readouterr() == (f"warning: {socket.gethostname()}: no room\n", "error: no such key.\n")


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: eight copies of every line, and an interface that the quiet ranks do not have."""
    public = {name for name in vars(Console) if not name.startswith("_")}
    assert public == {name for name in vars(NullConsole) if not name.startswith("_")}
    silent = NullConsole()
    silent.show(said("x"))
    silent.show(said("x", logging.WARNING))
    silent.start_epoch(1, 1)
    silent.step(1, LOSSES, 0.1, 1)
    silent.end_epoch(LOSSES, 1.0, 1)
    silent.evaluation(1, STATS, PER_CLASS, 1.0)
    silent.close()
    assert capfd.readouterr() == ("", "")


# --- drawing ---------------------------------------------------------------------------------------------------------------


def arrays(boxes: list[list[float]], classes: list[int]) -> tuple[Any, Any]:
    return np.asarray(boxes, dtype=np.float32).reshape(-1, 4), np.asarray(classes, dtype=np.int64)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (96, 128), (640, 480), (2000, 3000), (300, 20)])
def test_pictures_are_readable_at_any_size(height: int, width: int) -> None:
    """Loss: labels larger than a thumbnail's objects, or a log of full-size photographs."""
    image = np.full((height, width, 3), 90, dtype=np.uint8)
    before = image.copy()
    truth = arrays([[0, 0, width / 2, height / 2]], [0])
    guess = arrays([[width / 4, height / 4, width, height], [np.nan, 0, np.inf, 5], [-1e9, -5, 1e9, height * 9]], [1, 0, 2])
    picture = draw_comparison(image, *truth, guess[0], np.array([0.9, 0.8, 0.7], np.float32), guess[1], ["Zellkörper", "白血球", ""])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert 480 <= max(picture.shape[0], picture.shape[1] // 2) <= 1000
    assert np.array_equal(image, before), "the caller's image must not be drawn on"


def test_truth_is_left_and_sure_predictions_right() -> None:
    """Loss: pictures that praise a model for the annotator's boxes, or hide what it found behind noise."""
    image = np.zeros((640, 640, 3), dtype=np.uint8)
    guess = arrays([[300, 300, 500, 500], [100, 100, 200, 200]], [1, 2])
    scores = np.array([0.5, 0.1], np.float32)
    picture = draw_comparison(image, *arrays([[50, 50, 250, 250]], [0]), guess[0], scores, guess[1], ["a", "b", "c"])
    middle = picture.shape[1] // 2

    def holds(part: Any, position: int) -> bool:
        return bool((np.abs(part.astype(int) - class_colour(position)).sum(axis=2) < 6).any())

    left, right = picture[:, :middle], picture[:, middle:]
    assert [holds(left, i) for i in range(3)] == [True, False, False]
    assert [holds(right, i) for i in range(3)] == [False, True, False], "a score below 0.25 is not drawn"


def test_classes_have_their_own_colours() -> None:
    """Loss: two classes that look the same, so that a mix-up cannot be seen."""
    assert len({class_colour(i) for i in range(80)}) == 80


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_written_pictures_are_whole_and_in_rgb(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loss: red and blue exchanged in every report; half a file under the final name."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[..., 0] = 250
    write_image(tmp_path / name, image)
    blue_green_red = cv2.imread(str(tmp_path / name))
    assert blue_green_red is not None
    assert np.abs(blue_green_red[16, 16].astype(int) - [0, 0, 250]).max() < 6
    assert [path.name for path in tmp_path.iterdir()] == [name], "no temporary file is left"
    assert capfd.readouterr().err == ""


# --- server ----------------------------------------------------------------------------------------------------------------


def answers(url: str, seconds: float) -> bool:
    """Whether TensorBoard answers within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return b"TensorBoard" in response.read()
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    return False


def gone(url: str, seconds: float) -> bool:
    """Whether nobody listens any more within so many seconds."""
    port, until = int(url.rstrip("/").rsplit(":", 1)[1]), time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            return True
        time.sleep(0.2)
    return False


PARENT = """
import sys
from pathlib import Path
from gai_yolo.reporting.serve import serve_tensorboard
print(serve_tensorboard(Path(sys.argv[1]), int(sys.argv[2])), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("ending", ["returns", "killed"])
def test_tensorboard_is_served_and_ends_with_the_training(ending: str, tmp_path: Path) -> None:
    """Loss: the address shown is dead, or a forgotten server holds the port and the memory after every kill."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", PARENT, str(tmp_path), str(port)]
        parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert parent.stdin is not None
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert url != f"http://localhost:{port}/", "a taken port is replaced"
        assert answers(url, 45)
        if ending == "killed":
            parent.send_signal(signal.SIGKILL)
        parent.stdin.close()
        assert parent.wait(15) == (0 if ending == "returns" else -signal.SIGKILL)
        parent.stdout.close()
        assert gone(url, 15)
