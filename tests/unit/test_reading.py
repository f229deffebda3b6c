"""A disk or network that fails for a while changes nothing of what is learned."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import pytest

from gai_yolo.data.dataset import EvaluationSet
from gai_yolo.data.formats import reading
from gai_yolo.data.formats.reading import DOUBT_PATIENCE, CannotRead, Doubt, patiently, read_file
from gai_yolo.data.header import UNOPENED, UNREADABLE, image_size
from gai_yolo.data.images import ImageSource, decode
from gai_yolo.data.index import ImageRecord, make_record
from gai_yolo.data.loader import EvaluationLoader
from gai_yolo.errors import RESTART

SIZE = 64
WriteImages = Callable[[int], list[ImageRecord]]


class Clock:
    """Moves by what is slept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Failing:
    """An action that fails with one error until the clock says so."""

    def __init__(self, error: int, clock: Clock, until: float) -> None:
        self.error, self.clock, self.until = error, clock, until

    def __call__(self) -> str:
        if self.clock.now < self.until:
            raise OSError(self.error, os.strerror(self.error))
        return "done"


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ENOENT, errno.EACCES], ids=errno.errorcode.get)
def test_an_outage_is_waited_out(error: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: five seconds without the share, and a hundred images are grey."""
    clock = Clock()
    assert patiently(Failing(error, clock, 5.0), Path("a.jpg"), patience=40.0, clock=clock, sleep=clock.sleep) == "done"
    assert 5.0 <= clock.now < 11.0 and clock.pauses[:3] == [0.1, 0.2, 0.4] and max(clock.pauses) <= reading.LONGEST_PAUSE
    assert capsys.readouterr().err == f"warning: a.jpg: cannot be read ({os.strerror(error)}); trying again\n", "told once"


def test_an_outage_that_stays_ends_the_process_to_be_started_again() -> None:
    """Loss: training on grey; or a job that waits for ever for a share that another node has."""
    clock = Clock()
    with pytest.raises(CannotRead) as caught:
        patiently(Failing(errno.EIO, clock, 1e9), Path("/data/a.jpg"), patience=40.0, clock=clock, sleep=clock.sleep)
    assert caught.value.exit_code == RESTART
    assert caught.value.reason == "/data/a.jpg: cannot be read (Input/output error), for 40 s now"


def test_what_the_data_set_is_to_blame_for_is_not_waited_for() -> None:
    """Loss: 40 s for each broken link of a data set."""
    clock = Clock()
    with pytest.raises(FileNotFoundError):
        patiently(Failing(errno.ENOENT, clock, 1e9), Path("a"), Doubt(), clock=clock, sleep=clock.sleep)
    assert clock.pauses == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_what_the_data_set_may_be_to_blame_for_is_waited_for_a_moment(error: int) -> None:
    """Loss: a share that is exported anew says of every file that it may not be opened, and the data set is another one."""
    clock, doubt = Clock(), Doubt()
    for until in (5.0, 12.0, 19.0):
        assert patiently(Failing(error, clock, until), Path("a"), doubt, clock=clock, sleep=clock.sleep) == "done", "each hiccup anew"


def test_files_that_nobody_may_open_are_waited_for_once_for_all_of_them() -> None:
    """Loss: hours until a data set with a thousand of them is read, at every start."""
    clock, doubt = Clock(), Doubt()
    for _ in range(1000):
        with pytest.raises(PermissionError):
            patiently(Failing(errno.EACCES, clock, 1e9), Path("a"), doubt, clock=clock, sleep=clock.sleep)
    assert DOUBT_PATIENCE <= clock.now < DOUBT_PATIENCE + reading.LONGEST_PAUSE


def test_threads_that_wait_at_the_same_time_do_not_use_up_the_patience_of_each_other() -> None:
    """Loss: 32 threads open images; each hiccup is waited out for a thirtieth of the time only."""
    doubt, error = Doubt(), OSError(errno.EACCES, "")
    assert not any(doubt.blames_data(error, now, 1.0) for now in (1.0, 1.2, 1.4, 1.9) for _ in range(32)), "1.9 s were waited"
    assert not any(doubt.blames_data(error, 5.0 + second, 1.0) for second in range(8)), "8 s more, and a rest"
    assert not doubt.blames_data(error, 50.0, 1.0) and doubt.blames_data(error, 51.0, 1.0)


def test_images_whose_folder_is_gone_for_a_moment_are_decoded_as_ever(write_images: WriteImages, tmp_path: Path) -> None:
    """Loss: a remounted share changes the weights: the images of that moment are grey."""
    records = write_images(2)
    expected = [decode(record, SIZE) for record in records]
    folder = records[0].path.parent
    folder.rename(tmp_path / "away")
    threading.Timer(0.3, lambda: (tmp_path / "away").rename(folder)).start()
    for cache in ("none", "ram"):
        images = ImageSource(records, SIZE, cache, tmp_path / "cache")
        found = [images.load(position) for position in (0, 1)]
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True) if one is not None and other is not None)
        assert not any(one is None for one in found), "none is grey"


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_image_that_stays_away_is_an_error_and_not_grey(
    cache: str, write_images: WriteImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss: the same with every cache, for the rest of the run."""
    monkeypatch.setattr(reading, "PATIENCE", 0.2)
    (record,) = write_images(1)
    record.path.unlink()
    with pytest.raises(CannotRead, match=record.path.name):
        ImageSource([record], SIZE, cache, tmp_path / "cache").load(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_processes_say_which_file_it_is(workers: int, write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a traceback of torch in place of the file's name, and an exit code for bugs."""
    monkeypatch.setattr(reading, "PATIENCE", 0.2)
    records = write_images(2)
    loader = EvaluationLoader(EvaluationSet(ImageSource(records, SIZE, "none", Path())), 2, 0, 1, workers, pin_memory=False)
    records[1].path.unlink()
    with contextlib.closing(loader), pytest.raises(CannotRead) as error:
        list(loader)
    reason = error.value.reason
    assert reason.startswith(f"{records[1].path}: cannot be read (No such file or directory), for")
    assert "\n" not in reason and error.value.exit_code == RESTART


def test_half_of_a_file_is_not_decoded(write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a server that is lost in the middle of a file leaves an image with a grey rest."""
    (record,) = write_images(1)
    whole, opened = record.path.read_bytes(), list[Path]()

    class Half(io.BufferedReader):
        """Ends in the middle."""

        def read(self, _size: int | None = -1, /) -> bytes:
            return b"" if self.tell() else super().read(len(whole) // 2)

    def open_file(path: Path) -> BinaryIO:
        opened.append(path)
        file = path.open("rb", buffering=0)
        return Half(file) if len(opened) == 1 else file

    monkeypatch.setattr(reading, "open_file", open_file)
    assert read_file(record.path) == whole and len(opened) == 2, "read again"


def test_bytes_that_were_read_and_do_not_decode_are_no_error(tmp_path: Path) -> None:
    """Loss: one broken file of a million ends the run."""
    for content in (b"", b"no image"):
        path = tmp_path / "a.jpg"
        path.write_bytes(content)
        assert decode(make_record(1, path, 8, 8, [], []), SIZE) is None


def test_memory_that_ran_out_is_no_broken_image(write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a full memory makes images grey."""

    def imdecode(*_: object) -> None:
        error = cv2.error("Insufficient memory")
        error.code = -4
        raise error

    (record,) = write_images(1)
    monkeypatch.setattr(cv2, "imdecode", imdecode)
    with pytest.raises(MemoryError, match=record.path.name):
        decode(record, SIZE)


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ENXIO], ids=errno.errorcode.get)
def test_index_waits_for_the_disk_and_skips_no_image(error: int, write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a share that hiccups while the index is read makes another data set of it."""
    (record,) = write_images(1)
    failures = [error, error]

    def open_file(path: Path) -> BinaryIO:
        if failures:
            raise OSError(error, os.strerror(failures.pop()))
        return path.open("rb")

    monkeypatch.setattr(reading, "open_file", open_file)
    assert image_size(record.path, Doubt()) == (record.width, record.height, 1) and failures == []
    monkeypatch.setattr(reading, "PATIENCE", 0.2)
    failures += [error] * 100
    with pytest.raises(CannotRead):
        image_size(record.path, Doubt())


def test_index_tells_files_that_are_no_images_from_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """Loss: what is said of them is wrong, or the index of a data set with a wrong right is kept after that was mended."""
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    assert image_size(tmp_path / "text.jpg", Doubt()) == UNREADABLE
    assert image_size(tmp_path / "link.jpg", Doubt()) == UNOPENED
