"""What tests share: one thread, small images, a small training state."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from gai_yolo.checkpointing import writer_start
from gai_yolo.checkpointing.state import TrainingState
from gai_yolo.data import shapes
from gai_yolo.data.dataset import Batch
from gai_yolo.data.index import ImageRecord, make_record
from gai_yolo.detector import YOLO12
from gai_yolo.detector.ema import EMA
from gai_yolo.distributed.world import World
from gai_yolo.log import showing
from gai_yolo.sections import TrainingConfig
from gai_yolo.training.optimizer import make_optimizer, make_schedule
from tests.harness import NUM_IMAGES, NUM_VALIDATION_IMAGES
from tests.zygote import zygote

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        # In the background, or under nohup. What a test starts would inherit that, but not a handler, and this process ignores them still.
        signal.signal(number, lambda *_: None)

MakeState = Callable[..., TrainingState]
MakeBatch = Callable[[int, Sequence[int]], Batch]
WriteImages = Callable[[int], list[ImageRecord]]


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says a figure that the end of the test run is to show, whichever worker ran the test."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    figures = [text for report in reports if report.when == "call" for name, text in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for text in figures:
            terminalreporter.write_line(str(text))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share the machine, and a sum over threads may round differently."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(scope="session", autouse=True)
def writers_are_forked() -> Iterator[None]:
    """Those of jobs that are run in this process, which has threads, so that it makes none itself: they need not import PyTorch."""
    forks = zygote()
    with pytest.MonkeyPatch.context() as patch:
        if forks is not None:
            patch.setattr(writer_start, "fork_writer", forks.fork_writer)
        yield


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """A job that is run in this process sets variables, and the next test's jobs would not be forked from one that has them not."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the package says to people meanwhile, as a process would show it."""
    said: list[str] = []
    with showing(lambda record: said.append(record.getMessage())):
        yield said


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """This process alone, whatever launcher the tests themselves were started by."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return World("cpu", 1)


@pytest.fixture
def make_state() -> MakeState:
    """Makes a training state of a network as small as can be; the seed decides the weights."""

    def make(optimizer: str = "sgd", seed: int = 0, num_classes: int = 3, size: str = "debug", **settings: Any) -> TrainingState:
        config = TrainingConfig.model_validate({"optimizer": optimizer, "epochs": 10, **settings})
        torch.manual_seed(seed)
        model = YOLO12(size, num_classes)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        ema = EMA(model, config.ema_decay, config.ema_tau)
        return TrainingState(model, ema, make_optimizer(model, make_schedule(config, num_classes, 10)), scaler)

    return make


@pytest.fixture
def make_batch() -> MakeBatch:
    """Makes a batch of 64 px noise with boxes; a sample's content depends on (seed, sample), not on the batch it is in."""

    def make(seed: int, samples: Sequence[int]) -> Batch:
        images, owners, boxes, classes = [], [], [], []
        for place, sample in enumerate(samples):
            rng = np.random.default_rng((seed, sample))
            images.append(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8))
            for _ in range(sample % 3):  # some samples have no boxes
                x, y, width, height = rng.uniform((0, 0, 8, 8), (32, 32, 32, 32))
                owners.append(place)
                boxes.append([x, y, x + width, y + height])
                classes.append(int(rng.integers(3)))
        return Batch(
            images=torch.from_numpy(np.stack(images)),
            box_image=torch.tensor(owners, dtype=torch.int64),
            classes=torch.tensor(classes, dtype=torch.int64),
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            image_ids=torch.tensor(list(samples)),
            letterbox=torch.zeros(len(samples), 3),
            unreadable=torch.zeros(0, dtype=torch.int64),
        )

    return make


@pytest.fixture
def write_images(tmp_path: Path) -> WriteImages:
    """Writes JPEGs of several shapes with 0 to 2 boxes each; ids are 100, 101, ... and positions 0, 1, ..."""

    def write(count: int) -> list[ImageRecord]:
        folder = tmp_path / "jpegs"
        folder.mkdir()
        records = []
        for number in range(count):
            rng = np.random.default_rng(number)
            height, width = [(48, 64), (96, 80), (64, 64), (30, 20)][number % 4]
            image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 2)
            path = folder / f"{number}.jpg"
            assert cv2.imwrite(str(path), image)
            boxes = [[1.0 + i, 2.0, width - 3.0, height - 2.0 - i] for i in range(number % 3)]
            records.append(make_record(100 + number, path, width, height, boxes, [i % 3 for i in range(len(boxes))]))
        return records

    return write


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the built-in data set in its place, written once for all tests, with few images to evaluate."""
    return make_cache(tmp_path_factory.mktemp("cache"), NUM_IMAGES)


def make_cache(folder: Path, images: int) -> Path:
    """A cache folder with so many images to train on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "NUM_IMAGES", {"train": images, "val": NUM_VALIDATION_IMAGES})
        shapes.ensure_shapes(folder)
    return folder
