"""The store against a model of what it promises, under any order of publishing, crashing, pruning, damage and rival starts."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from gai_yolo.errors import RunFolderBusy
from gai_yolo.store.best import BestCopy
from gai_yolo.store.lease import raise_fence
from gai_yolo.store.manifest import Kind, Manifest, Position
from gai_yolo.store.retention import Policy, decide
from gai_yolo.store.store import Store
from tests.faults.disk import MemoryDisk, states_now

RUN = Path("/runs/a")
FENCE = Path("/runs/.a.fence")
POLICIES = st.builds(Policy, st.integers(1, 3), st.one_of(st.just("all"), st.integers(1, 2)), st.one_of(st.none(), st.just(2)))
STEPS_PER_EPOCH = 4
FEWEST_STEPS = 3000


class Tripping(MemoryDisk):
    """Does something, or fails, right before one of its next calls that change anything."""

    def __init__(self, files: dict[Path, bytes] | None = None) -> None:
        super().__init__(files)
        self.countdown, self.trip = -1, self._nothing

    def _nothing(self) -> None: ...

    def _step(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            self.trip()

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._step()
        return super().write(descriptor, data[:3000])

    def fsync(self, descriptor: int) -> None:
        self._step()
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def sync_folder(self, folder: Path) -> None:
        self._step()
        super().sync_folder(folder)


class StoreMachine(RuleBasedStateMachine):
    """One run over many starts. `promised` is what must be found; `written` all that may be found under a name."""

    steps_run = 0
    fired: dict[str, int] = {}  # noqa: RUF012 - counted over all examples

    @initialize(policy=POLICIES)
    def begin(self, policy: Policy) -> None:
        self.policy = policy
        self.disk = Tripping()
        self.promised: dict[str, Manifest] = {}
        self.written: dict[str, set[bytes]] = {}
        self.maybe: set[str] = set()
        """Names that may hold something complete though it was not acknowledged."""
        self.damaged: set[str] = set()
        self.step, self.serial = 0, 0
        self.start()

    def start(self) -> None:
        self.store = Store(RUN, raise_fence(FENCE, self.disk), self.disk)
        self.store.sweep()

    def _next(self, kind: Kind, metric: float | None = None) -> tuple[Manifest, bytes]:
        self.step += 1 if kind == "step" else STEPS_PER_EPOCH - self.step % STEPS_PER_EPOCH
        self.serial += 1
        position = Position(self.step, self.step // STEPS_PER_EPOCH, 16 * self.step)
        one = Manifest(kind, position, 0, "", 0, "f", "2", "2026-01-01T00:00:00Z", metric)
        return one, random.Random(self.serial).randbytes(5000)

    def _publish(self, store: Store, one: Manifest, content: bytes) -> None:
        self.written.setdefault(one.stem, set()).add(content)
        self.maybe.add(one.stem)
        store.publish(one, lambda file: file.write(content))
        self._acknowledge(one)

    def _acknowledge(self, one: Manifest) -> None:
        self.promised[one.stem] = one
        self.maybe.discard(one.stem)
        self.damaged.discard(one.stem)

    def _count(self, what: str) -> None:
        self.fired[what] = self.fired.get(what, 0) + 1

    # --- what a job does ---------------------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(["step", "epoch"]), metric=st.one_of(st.none(), st.integers(0, 9)))
    def publish(self, kind: Kind, metric: int | None) -> None:
        one, content = self._next(kind, None if metric is None or kind == "step" else metric / 10)
        self._publish(self.store, one, content)
        BestCopy(self.store).renew()

    @rule()
    def prune(self) -> None:
        good = [one for one in self.store.listing().present if self.store.defect_of(one) is None]
        expected = {d.manifest.stem for d in decide(good, self.policy) if not d.keep}
        removed = {decision.manifest.stem for decision in self.store.prune(self.policy)}
        assert removed == expected, "exactly what the pure function says of what is verified"
        for stem in removed:
            self.promised.pop(stem, None)
            self.maybe.discard(stem)
        if removed:
            self._count("pruned")

    @rule()
    def orderly_restart(self) -> None:
        self.start()

    # --- what the world does -----------------------------------------------------------------------------------------------

    @rule(seed=st.integers(0, 10**6))
    def crash(self, seed: int) -> None:
        """Lose an arbitrary part of what is not synced, and start on the rest."""
        self.disk = Tripping(random.Random(seed).choice(list(states_now(self.disk, seed))))
        self.start()
        found, _ = self.store.newest(self._parse)
        self.step = 0 if found is None else found[0].position.step  # trains the same positions again
        self._count("crashed")

    @rule(kind=st.sampled_from(["step", "epoch"]), calls=st.integers(1, 14), seed=st.integers(0, 10**6))
    def crash_while_publishing(self, kind: Kind, calls: int, seed: int) -> None:
        one, content = self._next(kind)

        def die() -> None:
            raise KeyboardInterrupt

        self.disk.countdown, self.disk.trip = calls, die
        try:
            self._publish(self.store, one, content)
        except KeyboardInterrupt:
            self._count("crashed while publishing")
        self.disk.countdown = -1
        self.crash(seed)

    @rule(kind=st.sampled_from(["step", "epoch"]), calls=st.integers(1, 14))
    def fail_while_publishing(self, kind: Kind, calls: int) -> None:
        """One call fails; the same store tries again, as the writer does."""
        one, content = self._next(kind)

        def refuse() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.disk.countdown, self.disk.trip = calls, refuse
        try:
            self._publish(self.store, one, content)
        except OSError:
            self._count("failed while publishing")
            self._publish(self.store, one, content)
        self.disk.countdown = -1

    @rule(kind=st.sampled_from(["step", "epoch"]), calls=st.integers(1, 14))
    def rival_starts_while_publishing(self, kind: Kind, calls: int) -> None:
        """The writer is stopped in the middle; another start takes over and publishes the same position; the writer goes on."""
        one, old = self._next(kind)
        new = random.Random(-self.serial).randbytes(4000)
        stopped = self.store

        def take_over() -> None:
            self.start()
            self._publish(self.store, one, new)
            self._count("taken over while publishing")

        self.disk.countdown, self.disk.trip = calls, take_over
        if self._goes_on(stopped, one, old) and self.store is not stopped:
            # It had given both names before; its successor found a complete checkpoint and left it.
            assert self._content_of(one) == old
        elif self.store is not stopped:
            assert self._content_of(one) in (old, new)
        self.disk.countdown = -1

    def _goes_on(self, stopped: Store, one: Manifest, content: bytes) -> bool:
        self.written.setdefault(one.stem, set()).add(content)
        self.maybe.add(one.stem)
        try:
            stopped.publish(one, lambda file: file.write(content))
        except (RunFolderBusy, FileNotFoundError):
            return False
        self._acknowledge(one)
        return True

    @precondition(lambda self: len(self.promised) > 1)
    @rule(place=st.integers(0, 4999), bit=st.integers(0, 7), suffix=st.sampled_from([".pt", ".json"]))
    def damage_the_newest(self, place: int, bit: int, suffix: str) -> None:
        one = max(self.promised.values(), key=lambda manifest: manifest.position)
        path = self.store.data_path(one).with_suffix(suffix)
        files = self.disk.files()
        content = bytearray(files[path])
        content[place % len(content)] ^= 1 << bit
        # A hard link to the same file is damaged with it.
        self.disk = Tripping({**files, path: bytes(content)})
        self.store = Store(RUN, self.store.fence, self.disk)
        del self.promised[one.stem]
        self.damaged.add(one.stem)
        self._count("damaged")

    # --- what must hold ----------------------------------------------------------------------------------------------------

    @invariant()
    def newest_is_found_with_its_bytes(self) -> None:
        type(self).steps_run += 1
        found, _ = self.store.newest(self._parse)
        newest = max(self.promised.values(), key=lambda one: one.position, default=None)
        if found is None:
            assert newest is None
            return
        one, content = found
        assert content in self.written[one.stem] and one.stem not in self.damaged
        assert newest is None or one.stem == newest.stem or (one.position > newest.position and one.stem in self.maybe)

    @invariant()
    def nothing_complete_is_lost(self) -> None:
        complete = {one.stem for one in self.store.listing().present if self.store.defect_of(one) is None}
        assert self.promised.keys() <= complete <= self.promised.keys() | self.maybe

    def _content_of(self, one: Manifest) -> bytes:
        return self.disk.files()[self.store.data_path(one)]

    @staticmethod
    def _parse(_path: Path, file: BinaryIO, _one: Manifest) -> bytes:
        return file.read()


@pytest.mark.usefixtures("manifests_read_once")
def test_store_keeps_its_promises_whatever_happens_in_whatever_order(figure: Callable[[str], None]) -> None:
    """Loss: the sequence of harmless events that nobody has thought of."""
    StoreMachine.steps_run, StoreMachine.fired = 0, {}
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    how = settings(max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=health, derandomize=True, database=None)
    run_state_machine_as_test(StoreMachine, settings=how)
    figure(f"stateful test of the store: {StoreMachine.steps_run} steps, {StoreMachine.fired}")
    assert StoreMachine.steps_run >= FEWEST_STEPS
    kinds = {"pruned", "crashed", "crashed while publishing", "failed while publishing", "taken over while publishing", "damaged"}
    assert kinds <= StoreMachine.fired.keys()
