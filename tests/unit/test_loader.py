"""Loader processes: what they need of a machine, and that they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gai_yolo.data.augment import Sample
from gai_yolo.data.dataset import EvaluationSet, Item, SampleSet, TrainingSet
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import ImageRecord
from gai_yolo.data.loader import EvaluationLoader, TrainingLoader
from gai_yolo.data.order import BatchPlan, Key
from gai_yolo.errors import DataError
from gai_yolo.sections import AugmentConfig

WriteImages = Callable[[int], list[ImageRecord]]
SIZE = 32
PLAN = BatchPlan(num_samples=64, batch_size=64, micro_batch_size=1, seed=3)


class Samples(SampleSet):
    """As many as wanted; each has its number as its colour."""

    def __init__(self) -> None:
        super().__init__(ImageSource([], SIZE, "none", Path()))

    def __getitem__(self, key: Key) -> Item:
        image = np.full((SIZE, SIZE, 3), key.position, np.uint8)
        return Item(Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), key.position, (0.0, 0.0, 0.0), ())


class Hanging(Samples):
    """A disk that does not answer."""

    def __getitem__(self, key: Key) -> Item:
        while True:
            time.sleep(1)


def children() -> set[int]:
    return {one.pid for one in multiprocessing.active_children() if one.pid is not None}


@contextlib.contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """A process that may have only so many more files open than now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def all_taken() -> Iterator[None]:
    """Not one more file can be opened."""
    with contextlib.ExitStack() as files:
        with contextlib.suppress(OSError):
            while True:
                files.enter_context(Path(os.devnull).open())
        yield


@pytest.mark.timeout(60)
@pytest.mark.parametrize("busy", [True, False])
def test_closing_ends_the_processes_whatever_they_do(busy: bool) -> None:
    """Loss: a job that was refused hangs for ever, because its loaders heed no SIGTERM."""
    before = children()
    training = TrainingLoader(Hanging() if busy else Samples(), PLAN, 0, 1, 2, pin_memory=False)
    training.start(1, 0)
    assert len(children() - before) == 2
    training.close()
    assert children() == before
    training.close()


def test_a_process_that_is_killed_by_others_is_still_noticed() -> None:
    """Loss: after a set of loaders was closed, the death of one of the next is waited for in vain."""
    first = TrainingLoader(Samples(), PLAN, 0, 1, 1, pin_memory=False)
    first.start(1, 0)
    first.close()
    before = children()
    second = TrainingLoader(Hanging(), PLAN, 0, 1, 1, pin_memory=False)
    with contextlib.closing(second):
        steps = second.epoch(1)
        second.start(1, 0)
        (worker,) = children() - before
        threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            next(steps)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_batches_that_wait_need_no_descriptors() -> None:
    """Loss: a batch of 64 in micro-batches of 1 ends with "too many open files"."""
    loader = TrainingLoader(Samples(), PLAN, 0, 1, 2, pin_memory=False)
    with contextlib.closing(loader), few_descriptors(40):
        (batches,) = loader.epoch(1)
        assert sorted(int(batch.images[0, 0, 0, 0]) for batch in batches) == list(range(64))
        assert all(int(batch.images.min()) == int(batch.images.max()) == int(batch.image_ids) for batch in batches)


def test_what_there_is_no_room_for_is_refused_until_there_is() -> None:
    """Loss: a limit that a moment's crowd has used up ends the job for good, with half a loader's traceback."""
    loader = TrainingLoader(Samples(), PLAN, 0, 1, 2, pin_memory=False)
    with contextlib.closing(loader):
        with (
            few_descriptors(3),
            all_taken(),
            pytest.raises(DataError, match=r"data.workers: 2 loader .* \(Too many open files\); .* 0\.$") as refused,
        ):
            loader.start(1, 0)
        assert refused.value.is_transient and not children()
        assert len(next(loader.epoch(1))) == 64


def test_a_temporary_folder_of_a_long_name_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: sockets for sharing memory, whose names may have 107 bytes; the loader's thread fails, and the step hangs."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    loader = TrainingLoader(Samples(), PLAN, 0, 1, 1, pin_memory=False)
    with contextlib.closing(loader):
        assert len(next(loader.epoch(1))) == 64
    assert list(folder.iterdir()) == []


def test_batches_stay_what_they_are_while_others_come(write_images: WriteImages) -> None:
    """Loss: the memory of a batch that somebody still holds is written over by a later one."""
    records = write_images(12)
    evaluation = EvaluationSet(ImageSource(records, SIZE, "none", Path()))
    loader = EvaluationLoader(evaluation, 1, 0, 1, 2, pin_memory=False)
    with contextlib.closing(loader):
        for _ in range(2):
            batches = list(loader)
            assert [int(batch.image_ids) for batch in batches] == [record.image_id for record in records]
            for position, batch in enumerate(batches):
                wanted = evaluation[Key(0, position)].sample.image
                assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), wanted)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_epoch_that_is_begun_anew_has_all_its_memory(write_images: WriteImages) -> None:
    """Loss: what an abandoned epoch was still to bring is missing later, and the loader runs out of room for batches."""
    records, plan = write_images(6), BatchPlan(num_samples=6, batch_size=2, micro_batch_size=1, seed=5)
    loader = TrainingLoader(TrainingSet(ImageSource(records, SIZE, "none", Path()), AugmentConfig(), 1, 9), plan, 0, 1, 3, False)
    with contextlib.closing(loader):
        for epoch in range(1, 8):
            loader.start(epoch, 0)
            next(loader.epoch(epoch + 1))
        assert len(list(loader.epoch(9))) == 3
