"""Arrays in a mapped file come back as they were, or the file is refused; and the index that is made of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from gai_yolo.data import columns
from gai_yolo.data.columns import ALIGNMENT, map_columns, write_columns
from gai_yolo.data.index import Category, ImageRecord, Index, Records, make_record
from gai_yolo.data.index_cache import DAMAGE
from gai_yolo.machine import is_on_this_machine

ARRAYS = {
    "boxes": np.arange(12, dtype=np.float32).reshape(3, 4),
    "none": np.zeros((0, 4), np.float32),
    "crowd": np.array([True, False, True]),
    "ids": np.array([2**62, -1], dtype=np.int64),
}
MOUNTS = """\
22 1 252:1 / / rw,relatime - ext4 /dev/vda1 rw
40 22 0:50 / /mnt/home rw,relatime shared:7 - nfs4 server:/home rw
41 40 0:51 / /mnt/home/scratch\\040disk rw - xfs /dev/vdb rw
42 22 0:52 / /mnt/strange rw - fuse.something x rw
43 22 0:53 / /mnt/covered rw - ext4 /dev/vdc rw
44 22 0:54 / /mnt/covered rw - nfs server:/x rw
45 22 0:55 / /mnt/größer rw - nfs server:/x rw
"""


def written(path: Path, described: dict[str, object] | None = None) -> Path:
    with path.open("wb") as file:
        write_columns(file, described or {"name": "a\udcff"}, ARRAYS)
    return path


@pytest.mark.parametrize("mapped", [True, False])
def test_arrays_come_back_as_they_were(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a start from the cache trains on other boxes."""
    monkeypatch.setattr(columns, "is_on_this_machine", lambda _: mapped)
    described, found = map_columns(written(tmp_path / "file"))
    assert described == {"name": "a\udcff"} and list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape and np.array_equal(found[name], array)
        assert found[name].size == 0 or (not found[name].flags.writeable and found[name].ctypes.data % (ALIGNMENT if mapped else 1) == 0)


def test_any_changed_byte_and_any_other_length_is_refused(tmp_path: Path) -> None:
    """Loss: boxes that a torn or rotten file has in place of the right ones."""
    whole = written(tmp_path / "file").read_bytes()
    changed = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    for data in [*changed, *(whole[:size] for size in range(0, len(whole), 7)), whole + b"\0", b"", b"PK\3\4" + bytes(500)]:
        (tmp_path / "file").unlink()
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(DAMAGE):
            map_columns(tmp_path / "file")


def test_another_length_of_the_header_is_refused(tmp_path: Path) -> None:
    """Loss: arrays that begin some bytes too early, because a header ends in spaces, and of which the checksum is right."""
    whole = next(data for size in range(ALIGNMENT) if b" " * 40 in (data := written(tmp_path / "file", {"x": "y" * size}).read_bytes()))
    (length,) = struct.unpack_from("<I", whole, 8)
    for other in range(length + 80):
        if other != length:
            (tmp_path / "other").unlink(missing_ok=True)
            (tmp_path / "other").write_bytes(whole[:8] + struct.pack("<I", other) + whole[12:])
            with pytest.raises(DAMAGE):
                map_columns(tmp_path / "other")


def test_what_is_mapped_stays_when_the_file_is_replaced_or_removed(tmp_path: Path) -> None:
    """Loss: a running job ends, or trains on other boxes, because the next start has written a new cache."""
    _, found = map_columns(written(tmp_path / "file"))
    (tmp_path / "new").write_bytes(os.urandom(10_000))
    (tmp_path / "new").replace(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert np.array_equal(found["boxes"], ARRAYS["boxes"])


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("/mnt", True),
        ("/mnt/home/me/cache", False),
        ("/mnt/homely", True),
        ("/mnt/home/scratch disk/x", True),
        ("/mnt/strange/x", False),
        ("/mnt/covered/x", False),
        ("/mnt/größer/x", False),
    ],
)
def test_files_of_other_machines_are_not_mapped(path: str, own: bool, tmp_path: Path) -> None:
    """Loss: SIGBUS, when a server has a file no more."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTS)
    assert is_on_this_machine(Path(path), tmp_path) == own


def test_a_system_that_does_not_say_is_not_trusted(tmp_path: Path) -> None:
    """Loss: the same, on systems without /proc."""
    assert not is_on_this_machine(tmp_path, tmp_path)


def test_records_are_what_they_were_made_of() -> None:
    """Loss: boxes of another image, a name that cannot be opened, or an image that is turned no more."""
    boxes = [[0, 0, 5, 5], [1, 2, 3, 4]]
    images = [
        make_record(7, Path("a/b.jpg"), 10, 20, boxes, [1, 0], [False, True], [3.5, 4.5]),
        make_record(-3, Path("/c d/St\udcfcck.jpg"), 5, 6, [], [], orientation=6),
        make_record(2**62, Path("x.jpg"), 8, 9, boxes[:1], [0]),
    ]
    records = Records.of(images)
    assert len(records) == 3 and list(records.paths()) == ["a/b.jpg", "/c d/St\udcfcck.jpg", "./x.jpg"]
    for made, image in zip(records, images, strict=True):
        assert_equal(made, image)
    assert_equal(records[-1], images[-1])
    assert [image.image_id for image in records[1:]] == [-3, 2**62] and records[3:] == []
    with pytest.raises(IndexError):
        records[3]
    assert [image.image_id for image in records.without({-3, 5})] == [7, 2**62]
    assert records.class_counts(4).tolist() == [1, 1, 0, 0], "crowd regions are not learned"
    assert len(Records.of([])) == 0 and Records.of([]).class_counts(2).tolist() == [0, 0]


def test_digest_is_that_of_checkpoints_before_the_index_was_arrays() -> None:
    """Loss: no run of yesterday can be gone on from, because its data seem to be others."""
    images = [
        make_record(1, Path("a.jpg"), 10, 20, [[0, 1, 2, 3], [4, 5, 6, 7]], [1, 0], [False, True]),
        make_record(2, Path("b.jpg"), 3, 4, [], []),
    ]
    images.append(make_record(3, Path("\udcff.jpg"), 3, 4, [[0, 0, 1, 2]], [0], orientation=8))
    index = Index("here", (Category(1, "a"), Category(5, "b")), Records.of(images))
    assert index.digest() == "e10411cb591cac22ff6ba1ed11e20f9b699fcb0e0bbd78af0b0c7a01d8ba8470"


def assert_equal(one: ImageRecord, other: ImageRecord) -> None:
    for name in ("image_id", "path", "width", "height", "orientation"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("boxes", "classes", "crowd", "areas"):
        x, y = getattr(one, name), getattr(other, name)
        assert x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y), name
