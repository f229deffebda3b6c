"""Cores and memory as control groups limit them: on trees of files as the kernel shows them, and in a real group where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gai_yolo.data import images
from gai_yolo.data.images import ImageSource
from gai_yolo.data.index import empty_record
from gai_yolo.machine import UNLIMITED, available_cores, available_memory
from gai_yolo.store import node_memory
from gai_yolo.store.lease import Lease
from gai_yolo.store.node_memory import free_memory
from gai_yolo.store.store import Store
from tests.harness import REPOSITORY

V2_MOUNT = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = """\
32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd"""
GIB = 2**30


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def tree(root: Path, groups: str, mounts: str, files: Mapping[str, str], available: int | None = 100 * GIB) -> Path:
    """What a process sees below `root`; `files` are below /sys/fs/cgroup."""
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    written |= {"proc/self/cgroup": groups, "proc/self/mountinfo": "23 1 0:5 / / rw - ext4 /dev/vda rw\n" + mounts + "\n"}
    if available is not None:
        written["proc/meminfo"] = f"MemTotal: 999999999 kB\nMemFree: 1 kB\nMemAvailable:   {available // 1024} kB\nHugePages_Total: 0\n"
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 64),
        ("max 100000", 64),
        ("", 64),
        ("none of your business", 64),
        ("100000 0", 64),
    ],
)
def test_cores_of_version_2(quota: str, cores: int, tmp_path: Path) -> None:
    """Loss: `--cpus=4` on 64 cores gives 64 threads that stop each other, recorded for the life of the run."""
    assert available_cores(tree(tmp_path, "0::/\n", V2_MOUNT.format(top="/"), {"cpu.max": f"{quota}\n"})) == cores


@pytest.mark.parametrize(("quota", "cores"), [("400000", 4), ("-1", 64), ("150000", 1), ("", 64), ("x", 64)])
def test_cores_of_version_1(quota: str, cores: int, tmp_path: Path) -> None:
    """Loss: the same on older hosts. Docker shows the host's path, and mounts the group itself."""
    files = {"cpu,cpuacct/cpu.cfs_quota_us": f"{quota}\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    root = tree(
        tmp_path, "9:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/x\n", V1_MOUNTS.format(top="/docker/abc"), files
    )
    assert available_cores(root) == cores


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    """Loss: a pod's limit is on the group above the container's, or Slurm's job on that above the step's."""
    files = {
        "pod/cpu.max": "300000 100000",
        "pod/box/cpu.max": "max 100000",
        "pod/box/job/cpu.max": "800000 100000",
        "other/cpu.max": "100000 100000",
        "pod/memory.max": f"{8 * GIB}",
        "pod/memory.current": f"{5 * GIB}",
        "pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "pod/box/memory.max": "max",
        "pod/box/memory.current": f"{2 * GIB}",
        "pod/box/job/memory.max": f"{16 * GIB}",
        "pod/box/job/memory.current": f"{GIB}",
    }
    root = tree(tmp_path, "0::/pod/box/job\n", V2_MOUNT.format(top="/"), files)
    assert available_cores(root) == 3
    assert available_memory(root) == 4 * GIB


@pytest.mark.parametrize(("group", "top"), [("/pod/box", "/pod/box"), ("/pod/box", "/else"), ("/../../box", "/")])
def test_a_container_sees_its_own_group_at_the_mount_point(group: str, top: str, tmp_path: Path) -> None:
    """Loss: the path in /proc is the host's, nothing is found there, and no limit is seen."""
    files = {"cpu.max": "200000 100000", "memory.max": f"{3 * GIB}", "memory.current": f"{GIB}"}
    root = tree(tmp_path, f"0::{group}\n", V2_MOUNT.format(top=top), files)
    assert (available_cores(root), available_memory(root)) == (2, 2 * GIB)


def test_version_1_and_an_empty_version_2_beside_it(tmp_path: Path) -> None:
    """Loss: systemd's hybrid hosts, where the controllers are in version 1."""
    files = {
        "cpu,cpuacct/a/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": f"{50 * GIB}",
        "memory/a/memory.limit_in_bytes": f"{6 * GIB}",
        "memory/a/memory.usage_in_bytes": f"{6 * GIB}",
        "memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * GIB}\n",
        "unified/cgroup.controllers": "hugetlb\n",
    }
    mounts = V1_MOUNTS.format(top="/") + "\n" + V2_MOUNT.format(top="/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    root = tree(tmp_path, "9:cpu,cpuacct:/a\n4:memory:/a\n0::/\n", mounts, files)
    assert (available_cores(root), available_memory(root)) == (2, 2 * GIB)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"memory.max": "max"}, 100 * GIB),
        ({"memory.max": f"{200 * GIB}"}, 100 * GIB),
        ({"memory.max": f"{9 * GIB}", "memory.high": f"{7 * GIB}"}, 3 * GIB),
        ({"memory.high": f"{2 * GIB}"}, 0),
        ({"memory.max": "garbage"}, 100 * GIB),
        ({}, 100 * GIB),
    ],
)
def test_memory_of_version_2(limits: dict[str, str], expected: int, tmp_path: Path) -> None:
    """Loss: a RAM cache as large as the host's memory, for which the kernel kills the container."""
    files = {**limits, "memory.current": f"{4 * GIB}", "memory.stat": "inactive_file x\nanon 7\n"}
    assert available_memory(tree(tmp_path, "0::/\n", V2_MOUNT.format(top="/"), files)) == expected


DATA_READ_TWICE = f"""\
anon {GIB}
file {6 * GIB}
shmem {2 * GIB}
inactive_anon {2 * GIB}
active_anon {GIB}
inactive_file {GIB}
active_file {3 * GIB}
"""


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_were_read_twice_are_no_used_memory_and_those_in_memory_are(version: int, tmp_path: Path) -> None:
    """Loss: after the second epoch no state in memory and no image cache, because the page cache is full; or the kernel kills the training
    for what is in /dev/shm."""
    if version == 2:
        files = {"memory.max": f"{9 * GIB}", "memory.current": f"{7 * GIB}", "memory.stat": DATA_READ_TWICE}
        root = tree(tmp_path, "0::/\n", V2_MOUNT.format(top="/"), files)
    else:
        stat = "".join(f"total_{line}\n" for line in DATA_READ_TWICE.splitlines()) + f"cache {6 * GIB}\nactive_file 7\n"
        files = {"memory.limit_in_bytes": f"{9 * GIB}", "memory.usage_in_bytes": f"{7 * GIB}", "memory.stat": stat}
        files = {f"memory/{name}": text for name, text in files.items()}
        root = tree(tmp_path, "4:memory:/\n", V1_MOUNTS.format(top="/"), files)
    assert available_memory(root) == 6 * GIB, "all but 1 GiB of the process and 2 GiB in /dev/shm"


def test_nothing_is_known_where_the_system_says_nothing(tmp_path: Path) -> None:
    """Loss: a system without /proc cannot train."""
    assert (available_cores(tmp_path), available_memory(tmp_path)) == (64, UNLIMITED)
    garbled = tree(tmp_path, "what\n0\n7:\n", "no mounts - \nx - cgroup2\n", {}, available=None)
    assert (available_cores(garbled), available_memory(garbled)) == (64, UNLIMITED)


# --- who asks ----------------------------------------------------------------------------------------------------------------


def test_the_image_cache_heeds_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: `data.cache: ram` looks at the host's free memory only."""
    monkeypatch.setattr(images, "available_memory", lambda: 100_000)
    source = ImageSource([empty_record(1, tmp_path / "a.jpg", 320, 320)], 320, "ram", tmp_path)
    assert "going on without a cache" in source.note


def test_room_in_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: what is written to /dev/shm counts towards the limit, whatever the file system says; the kernel kills the training."""
    store = Store(tmp_path, Lease(tmp_path / "lock").acquire(1.0))
    assert free_memory(store) <= store.fs.free_bytes(tmp_path)
    monkeypatch.setattr(node_memory, "available_memory", lambda: 12345)
    assert free_memory(store) == 12345


CGROUP_V1 = Path("/sys/fs/cgroup")


@pytest.fixture
def group() -> Iterator[dict[str, Path]]:
    """A control group of version 1 of this test's own, by controller."""
    made = {name: CGROUP_V1 / name / f"gai-yolo-test-{os.getpid()}" for name in ("cpu", "memory")}
    try:
        for folder in made.values():
            folder.mkdir()
    except OSError:
        for folder in made.values():
            if folder.is_dir():
                folder.rmdir()
        pytest.skip("no control group can be made here")
    yield made
    for folder in made.values():
        folder.rmdir()


def test_a_real_group_limits_what_is_available(group: dict[str, Path]) -> None:
    """Loss: files of these tests that no kernel shows."""
    (group["cpu"] / "cpu.cfs_quota_us").write_text("100000")
    (group["memory"] / "memory.limit_in_bytes").write_text(str(GIB))
    enter = [f"echo $$ > {folder}/cgroup.procs" for folder in group.values()]
    program = "from gai_yolo.machine import *; print(available_cores(), available_memory())"
    command = ["sh", "-c", "; ".join([*enter, f"exec {sys.executable} -c '{program}'"])]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) == 1
    assert GIB // 2 < int(said[1]) <= GIB


USED_BY_FILES = """
import os, sys
from pathlib import Path
from gai_yolo.machine import available_memory

def write(path):
    with open(path, "wb") as file:
        file.write(bytes(64 << 20))
        os.fsync(file.fileno())

disk, memory = map(Path, sys.argv[1:])
free = [available_memory()]
write(disk)
for _ in range(3):
    disk.read_bytes()
free.append(available_memory())
write(memory)
free.append(available_memory())
print(free[0] - free[1], free[1] - free[2])
"""


def test_a_real_group_counts_files_in_memory_as_used_and_those_on_a_disk_not(group: dict[str, Path], tmp_path: Path) -> None:
    """Loss: kernels that keep their lists in another way than these tests think."""
    if "tmpfs" in subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout:
        pytest.skip("the temporary folder is in memory")
    (group["memory"] / "memory.limit_in_bytes").write_text(str(GIB))
    in_memory = Path(f"/dev/shm/gai-yolo-test-{os.getpid()}")
    enter = f'echo $$ > {group["memory"]}/cgroup.procs; exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", USED_BY_FILES, str(tmp_path / "file"), str(in_memory)]
    try:
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    finally:
        in_memory.unlink(missing_ok=True)
    on_disk, in_shm = (int(number) / 2**20 for number in said)
    assert on_disk < 32 and 48 < in_shm < 80
