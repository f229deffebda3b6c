"""Every state that a crash may leave of a run that publishes, replaces and prunes checkpoints.

The run's calls are recorded on a disk in memory (tests/faults/disk.py). For every prefix of them, every state that a crash may
leave is built, and a new start recovers from it.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pytest

from gai_yolo.store.aside import move_beyond
from gai_yolo.store.atomic import is_temporary
from gai_yolo.store.best import BestCopy
from gai_yolo.store.catalogue import NO_MANIFEST, Catalogue
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import Kind, Manifest, Position
from gai_yolo.store.retention import Policy, best_of
from gai_yolo.store.store import Store
from tests.faults.disk import Files, MemoryDisk, Operation, crash_states

pytestmark = pytest.mark.usefixtures("manifests_read_once")
RUN = Path("/runs/a")
FENCE = Path("/runs/.a.fence")
METRICS = RUN / "checkpoints" / "training_metrics.json"
BEST = RUN / "checkpoints" / "best.pt"
POLICY = Policy(keep_steps=2, keep_epochs=2)
FEWEST_STATES = 4000
LAST_EPOCH, LAST_EPOCH_OF_MANY = 8, 18


def manifest(kind: Kind, step: int, epoch: int, metric: float | None = None, due: bool = True) -> Manifest:
    return Manifest(kind, Position(step, epoch, 16 * step), 0, "", 0, "f", "2", "2026-01-01T00:00:00Z", metric, due)


def content_of(stem: str, start: int = 1) -> bytes:
    """Of a data file: a little more than two blocks."""
    return random.Random(f"{stem} {start}").randbytes(9000)


@dataclass
class Promises:
    """What the run may rely on after so many calls, and what may or may not be there because it is under way."""

    fence: int = 0
    complete: dict[str, Manifest] = field(default_factory=dict)
    contents: dict[str, set[bytes]] = field(default_factory=dict)
    """Every content that was ever written under a name."""
    under_way: set[str] = field(default_factory=set)
    going: set[str] = field(default_factory=set)
    metrics: list[bytes] = field(default_factory=lambda: [b""])
    """Acknowledged, and then maybe the one under way."""


class Run:
    """Does what a job's writer does, and writes down what is promised when."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        self.starts = 0
        self.store = self.start()

    def start(self) -> Store:
        fence = raise_fence(FENCE, self.disk)
        self.disk.mark(("fence", fence.number))
        self.starts += 1
        self.store = Store(RUN, fence, self.disk)
        self.store.sweep()
        return self.store

    def publish(self, one: Manifest, prune: bool = True) -> None:
        content = content_of(one.stem, self.starts)
        self.disk.mark(("publishing", one, content))
        self.store.publish(one, lambda file: file.write(content))
        self.disk.mark(("published", one))
        if prune:
            going = [decision.manifest for decision in self.store.plan_pruning(POLICY) if not decision.keep]
            self.disk.mark(("pruning", going))
            self.store.prune(POLICY)
        BestCopy(self.store).renew()

    def write_metrics(self, text: str) -> None:
        self.disk.mark(("writing metrics", text.encode()))
        self.store.publish_text(METRICS, text)
        self.disk.mark(("metrics written", text.encode()))


def a_life(disk: MemoryDisk, last_epoch: int = LAST_EPOCH) -> MemoryDisk:
    """Two starts with everything that happens to a store: firsts, replacing, pruning, a failed last fsync, a re-training over
    what is damaged, the adoption of a file without manifest."""
    run = Run(disk)
    run.publish(manifest("step", 5, 0))
    run.publish(manifest("epoch", 10, 1, 0.3))
    run.write_metrics("one row\n")
    run.publish(manifest("step", 15, 1))
    run.publish(manifest("epoch", 20, 2, 0.5, due=False))
    run.write_metrics("two rows\n")
    run.publish(manifest("step", 25, 2))
    run.publish(manifest("epoch", 30, 3, 0.6))
    _publish_with_a_failing_last_sync(run, manifest("epoch", 40, 4, 0.7))
    damaged = RUN / "checkpoints" / "epoch_004.pt"
    disk.mark(("damaged", manifest("epoch", 40, 4)))
    disk.contents[disk.entries[damaged]][100] ^= 1
    disk.log.append(Operation("write", damaged, inode=disk.entries[damaged], offset=0, data=bytes(disk.contents[disk.entries[damaged]])))
    disk.log.append(Operation("fsync", damaged, inode=disk.entries[damaged]))
    run.start()
    run.publish(manifest("epoch", 40, 4, 0.7))
    _adopt_a_copy(run, manifest("epoch", 50, 5, 0.2))
    for epoch in range(6, last_epoch + 1):
        run.publish(manifest("step", 10 * epoch - 5, epoch - 1))
        run.publish(manifest("epoch", 10 * epoch, epoch, 0.8 + 0.01 * (epoch % 4), due=epoch % 3 > 0))
        run.write_metrics(f"{epoch} rows\n")
    return disk


def _publish_with_a_failing_last_sync(run: Run, one: Manifest) -> None:
    """The disk refuses the fsync after the manifest got its name; trying again finds a complete checkpoint and has to sync."""
    disk, content = run.disk, content_of(one.stem, run.starts)
    disk.mark(("publishing", one, content))
    original, renamed = disk.sync_folder, disk.rename

    def rename(source: Path, target: Path) -> None:
        renamed(source, target)
        if target.suffix == ".json":
            disk.sync_folder = fail  # type: ignore[method-assign,assignment]

    def fail(_folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    disk.rename = rename  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Input/output"):
        run.store.publish(one, lambda file: file.write(content))
    disk.sync_folder, disk.rename = original, renamed  # type: ignore[method-assign]
    run.publish(one)


def _adopt_a_copy(run: Run, one: Manifest) -> None:
    """Somebody has copied a file there, without fsync of the file."""
    path, content = RUN / "checkpoints" / f"{one.stem}.pt", content_of(one.stem, run.starts)
    descriptor = run.disk.create(path)
    run.disk.write(descriptor, memoryview(content))
    run.disk.mark(("publishing", one, content))
    run.disk.close(descriptor)
    run.store.adopt(one)
    run.disk.mark(("published", one))


def promises_after(log: list[Operation]) -> Iterator[Promises]:
    """For each prefix of a log, the empty one first."""
    now = Promises()
    yield now
    for operation in log:
        match operation.note:
            case ("fence", int(number)):
                now.fence = number
            case ("publishing", Manifest() as one, bytes(content)):
                now.under_way.add(one.stem)
                now.contents.setdefault(one.stem, set()).add(content)
            case ("published", Manifest() as one):
                now.under_way.discard(one.stem)
                now.complete[one.stem] = one
            case ("damaged", Manifest() as one):
                del now.complete[one.stem]
                now.under_way.add(one.stem)  # until the damage is on the disk
            case ("pruning", list(manifests)):
                for one in manifests:
                    now.going.add(one.stem)
                    now.complete.pop(one.stem)
            case ("writing metrics", bytes(text)):
                now.metrics = [now.metrics[-1], text]
            case ("metrics written", bytes(text)):
                now.metrics = [text]
        yield now


class Violated(Exception):
    """A promise was broken by a crash."""


def recover(files: Files, promised: Promises) -> str:
    """Start on what a crash has left, and check every promise; returns the name of what was gone on from."""
    disk = MemoryDisk(files)
    fence = raise_fence(FENCE, disk)
    if fence.number <= promised.fence:
        raise Violated(f"fence {fence.number} was given twice")
    store = Store(RUN, fence, disk)
    store.sweep()
    if any(is_temporary(path.name) for path in disk.files() if path.parent != FENCE.parent):
        raise Violated("drafts of a dead writer were not swept")
    found, told = _find(store)
    _check_found(found, promised)
    listed = {one.stem for one in store.listing().present if store.defect_of(one) is None}
    if missing := promised.complete.keys() - listed:
        raise Violated(f"{missing} were complete and are not any more")
    if bad := [text for text in told if NO_MANIFEST not in text and "epoch_004" not in text]:
        raise Violated(f"a crash has made a bad checkpoint: {bad}")
    if files.get(METRICS, b"") not in promised.metrics:
        raise Violated("the metrics are neither old nor new")
    if BEST in files and files[BEST] not in set().union(*promised.contents.values()):
        raise Violated("best.pt is torn")
    _check_best(store, disk)
    again = manifest("epoch", 990, 99)
    store.publish(again, lambda file: file.write(b"again"))
    if _find(store)[0] != ("epoch_099", b"again"):
        raise Violated("the next checkpoint is not found")
    return "nothing" if found is None else found[0]


def _check_best(store: Store, disk: MemoryDisk) -> None:
    BestCopy(store).renew()
    listing = store.listing()
    best = best_of([one for one in listing.present if store.defect_of(one) is None])
    # Then best.pt is all that is left of it, perhaps, and stays.
    is_damaged = best is not best_of(listing.present) or any(defect.reason != NO_MANIFEST for defect in listing.defects)
    if best is not None and not is_damaged and disk.files()[BEST] != disk.files()[store.data_path(best)]:
        raise Violated("best.pt is not the best")
    if best is not None and BEST in disk.entries and disk.entries[BEST] == disk.entries[store.data_path(best)]:
        raise Violated("best.pt and the checkpoint are one file")
    if not is_damaged and (aside := [path.name for path in disk.entries if path.name.startswith("best.pt.aside")]):
        raise Violated(f"an older best.pt is taken for a person's own: {aside}")


def _find(store: Store) -> tuple[tuple[str, bytes] | None, list[str]]:
    def parse(_path: Path, file: BinaryIO, _one: Manifest) -> bytes:
        return file.read()

    found, told = store.newest(parse)
    return (None if found is None else (found[0].stem, found[1])), told


def _check_found(found: tuple[str, bytes] | None, promised: Promises) -> None:
    """The newest complete one, or a newer one that was under way; its bytes are those that were written under its name."""
    newest = max(promised.complete.values(), key=lambda one: one.position, default=None)
    if found is None:
        if newest is not None:
            raise Violated(f"nothing is found, and {newest.stem} was complete")
        return
    stem, content = found
    if content not in promised.contents.get(stem, set()):
        raise Violated(f"{stem} holds other bytes than were written")
    if newest is not None and stem != newest.stem and stem not in promised.under_way:
        raise Violated(f"{stem} is found, and {newest.stem} was complete and newer")


def check_all(disk: MemoryDisk) -> Counter[str]:
    """Recover from every state, once while the same is promised; returns how many ended with which checkpoint."""
    outcomes: Counter[str] = Counter()
    states = crash_states(disk)
    state = next(states, None)
    for length, promised in enumerate(promises_after(disk.log)):
        if length == 0 or disk.log[length - 1].kind == "mark":
            recovered: dict[int, str] = {}
        here: set[int] = set()
        while state is not None and state[0] == length:
            key = hash(frozenset(state[1].items()))
            if key not in recovered:
                try:
                    recovered[key] = recover(state[1], promised)
                except Violated as violated:
                    raise Violated(f"after call {length} ({disk.log[length - 1].kind}): {violated}") from None
            if key not in here:
                here.add(key)
                outcomes[recovered[key]] += 1
            state = next(states, None)
    return outcomes


@pytest.mark.parametrize("last_epoch", [LAST_EPOCH, pytest.param(LAST_EPOCH_OF_MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("hard_links", [True, False])
def test_every_state_that_a_crash_leaves_recovers_to_the_old_or_the_new_checkpoint(
    hard_links: bool, last_epoch: int, figure: Callable[[str], None]
) -> None:
    """Loss: the one unlucky moment in which a power cut takes the old checkpoint and the new one."""
    disk = a_life(MemoryDisk(hard_links=hard_links), last_epoch)
    outcomes = check_all(disk)
    calls = sum(operation.kind != "mark" for operation in disk.log)
    figure(f"crash states: {outcomes.total()} after {calls} calls, all recovered, {outcomes['nothing']} with nothing yet")
    assert outcomes.total() >= FEWEST_STATES
    assert {"nothing", "step_00000005", "epoch_001", "epoch_002", "epoch_003", "epoch_004", f"epoch_{last_epoch:03d}"} <= outcomes.keys()


def label(operation: Operation, log: list[Operation]) -> str:
    """Which of the protocol's syncs this is: by the file, or by what was last done in the folder."""
    if operation.kind == "fsync":
        name = operation.path.name
        return f"fsync of {'a draft' if is_temporary(name) else 'a file'} of {_what(name)}"
    last = next(one for one in reversed(log) if one.kind in ("create", "rename", "unlink") and operation.path == one.path.parent)
    gone = {"rename": "got its name", "unlink": "lost its name", "create": "was begun"}[last.kind]
    return f"sync after {_what((last.target if last.kind == 'rename' else last.path).name)} {gone}"


def _what(name: str) -> str:
    parts = {"best.pt": "best", ".best": "record", ".pt": "data", "metrics.json": "metrics", ".json": "manifest", ".fence": "fence"}
    for part, what in parts.items():
        if part in name:
            return what
    raise AssertionError(name)


class Forgetful(MemoryDisk):
    """Leaves out all syncs of one label."""

    def __init__(self, left_out: str, hard_links: bool) -> None:
        super().__init__(hard_links=hard_links)
        self.left_out, self.count = left_out, 0

    def syncs(self, operation: Operation) -> bool:
        left_out = label(operation, self.log) == self.left_out
        self.count += left_out
        return not left_out


def all_labels() -> list[tuple[str, bool]]:
    """Every sync of the protocol, with and without hard links."""
    found: dict[tuple[str, bool], None] = {}
    for hard_links in (True, False):
        disk = a_life(MemoryDisk(hard_links=hard_links))
        for place, operation in enumerate(disk.log):
            if operation.kind in ("fsync", "sync") and not (operation.kind == "fsync" and operation.path.name == "epoch_004.pt"):
                one = label(operation, disk.log[:place])
                if hard_links or (one, True) not in found:
                    found[one, hard_links] = None
    return list(found)


@pytest.mark.parametrize(("left_out", "hard_links"), all_labels())
def test_every_single_sync_is_needed_and_its_absence_is_found(left_out: str, hard_links: bool) -> None:
    """Loss: a test that would not notice if the protocol were wrong; or an fsync that costs and does nothing."""
    disk = a_life(Forgetful(left_out, hard_links))
    assert isinstance(disk, Forgetful) and disk.count > 0
    with pytest.raises(Violated):
        check_all(disk)


# --- what is moved aside -----------------------------------------------------------------------------------------------------------

ASIDE = RUN / "aside" / "1"


def complete_under(files: Files, run: Path) -> set[str]:
    """Stems of the checkpoints in a folder laid out like a run folder that are whole."""
    catalogue = Catalogue(run, MemoryDisk(files))
    return {one.stem for one in catalogue.listing().present if catalogue.defect_of(one) is None}


def moved_aside(disk: MemoryDisk) -> tuple[set[str], int]:
    """Two epochs and a snapshot, the later two of which are moved; returns their stems, and the number of calls before."""
    run = Run(disk)
    for one in (manifest("epoch", 10, 1, 0.3), manifest("epoch", 20, 2, 0.5), manifest("step", 25, 2)):
        run.publish(one, prune=False)
    before = len(disk.log)
    move_beyond(RUN, Position(10, 1, 160), ASIDE, disk)
    disk.mark("moved")
    return {"epoch_002", "step_00000025"}, before


def violations_of_moving(disk: MemoryDisk) -> set[str]:
    """What states of a crash show that must not be."""
    going, before = moved_aside(disk)
    found = set()
    for length, files in crash_states(disk):
        if length < before:
            continue
        here, there = complete_under(files, RUN), complete_under(files, ASIDE)
        if "epoch_001" not in here:
            found.add("what stays is lost")
        if going - here - there:
            found.add("what goes is lost")
        if length == len(disk.log) - 1 and (here & going or not going <= there):
            found.add("what was moved is back")
    return found


def test_a_crash_while_states_are_moved_aside_loses_none() -> None:
    """Loss: somebody goes back, the power fails, and what was moved aside is neither here nor there."""
    assert violations_of_moving(MemoryDisk()) == set()


@pytest.mark.parametrize("left_out", ["aside", "1", "checkpoints"], ids="names in {} left out".format)
def test_the_names_of_new_folders_are_synced_too(left_out: str) -> None:
    """Loss: a test that would not notice if the folders above were forgotten."""

    class Forgetful(MemoryDisk):
        def syncs(self, operation: Operation) -> bool:
            return (
                operation.kind != "sync" or operation.path.name != left_out or ASIDE.parent not in (operation.path, *operation.path.parents)
            )

    assert violations_of_moving(Forgetful())
