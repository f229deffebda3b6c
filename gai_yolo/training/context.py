"""Where a training process runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gai_yolo.checkpointing.writer_start import SpareWriter
from gai_yolo.distributed.world import World
from gai_yolo.goodput.record import Phase
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.reporting.console import NullConsole
from gai_yolo.store.run_folder import RunFolder
from gai_yolo.supervision.notices import Notices
from gai_yolo.supervision.watchdog import Watchdog


@dataclass(frozen=True)
class JobContext:
    """Where a job runs: its processes, its folder, its terminal, and who looks after this process."""

    world: World
    folder: RunFolder
    console: NullConsole
    """`Console` on rank 0."""
    notices: Notices
    watchdog: Watchdog
    recorder: Recorder
    spare_writer: SpareWriter | None = None
    """On rank 0, where forks are made."""

    def enter(self, phase: Phase) -> None:
        """What this process does from now on, for its record and its watchdog."""
        self.recorder.enter(phase)
        self.watchdog.enter(phase)

    def step_done(self, step: int, epoch: int) -> None:
        """A step is completed, in this epoch (from 1)."""
        self.recorder.step_done(step, epoch)
        self.watchdog.step_done()

    def on_each_node(self, write: Callable[[], None]) -> None:
        """Write something into each node's run folder. A collective; the first node alone at first, because the folder may be shared."""
        self.world.from_first(write)
        if self.world.is_first_on_node and not self.world.is_first:
            write()
