"""Where the time goes: a stop-watch with one hand for each phase, whose position survives the death of the process.

The first process of each node writes its record at every step boundary and once a second, so after `kill -9` the time of death
is known within a second, and the last completed step exactly.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gai_yolo.errors import OWN_REASONS, Ending
from gai_yolo.goodput.record import Phase, Record, pack, plain
from gai_yolo.log import OF_NODE, ONCE, told_if_refused

BEAT = 1.0
"""Seconds between two entries when nobody asks for one."""
GOES_ON = "the account of the time may miss this start, training goes on"
STEP_PATIENCE = 0.1
"""Seconds that a step waits for its entry. A disk that takes longer..."""
SPARED = 60.0
"""...is not waited for at all for so many seconds."""
ENTRY_PATIENCE = 1.0
"""Seconds that the first and the last words wait for their entries."""
RECENT = 50
"""Steps over which the pace is taken."""

logger = logging.getLogger(__name__)


class RecordFile:
    """A record on the disk, kept up to date by a thread of its own, once a second and whenever it is asked to: a disk that hangs holds up
    neither training nor its watchdog. Nothing here raises because of a disk: its refusal is told once, and every second it is given
    another chance.

    Not guaranteed: there is no fsync, so a power cut may tear the file, and a reader on another host of a network file system may
    see an entry half a minute late.
    """

    def __init__(self, path: Path, content: Callable[[], Record]) -> None:
        self._path, self._content = path, content
        self._turn = threading.Condition()
        self._asked = self._written = 0
        self._closing = False
        self._descriptor: int | None = None
        self._size = 0
        threading.Thread(target=self._work, name="goodput", daemon=True).start()

    def update(self, patience: float) -> bool:
        """Ask for an entry and wait for it for at most `patience` seconds; returns whether it was tried within that time."""
        with self._turn:
            self._asked += 1
            mine = self._asked
            self._turn.notify_all()
            return self._turn.wait_for(lambda: self._written >= mine, patience)

    def close(self, patience: float) -> None:
        """Make the last entry."""
        with self._turn:
            self._closing = True
        self.update(patience)

    def _work(self) -> None:
        last = False
        while not last:
            with self._turn:
                self._turn.wait_for(lambda: self._asked > self._written, BEAT)
                asked, last = self._asked, self._closing
            with told_if_refused(logger, self._path, then=GOES_ON, extra={**OF_NODE, **ONCE}):
                self._write()
                if last and self._descriptor is not None:
                    os.close(self._descriptor)
            with self._turn:
                self._written = asked
                self._turn.notify_all()

    def _write(self) -> None:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        data = pack(plain(self._content())).ljust(self._size)
        if os.pwrite(self._descriptor, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size = len(data)


class Recorder:
    """Counts the seconds of one process. Every method may be called from any thread, and none raises because of a disk.

    It begins in memory, in the phase `import` and at the time the process was started; `open` gives it a file. The other processes of a
    node write theirs only if they end for a reason of their own.

    Args:
        process_started: seconds since 1970; see `process_started`.
        clock: counts seconds also while the machine sleeps.
    """

    def __init__(
        self, process_started: float, clock: Callable[[], float] | None = None, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._wall_clock = clock or _uptime, wall_clock
        self._record = Record(began=process_started, id=os.urandom(6).hex())
        self._since = self._clock() - max(0.0, wall_clock() - process_started)
        self._boundaries: deque[float] = deque(maxlen=RECENT + 1)
        self._state = threading.Lock()
        self._file: RecordFile | None = None
        self._make_file: Callable[[], RecordFile] | None = None
        self._spared_until = 0.0

    def open(self, folder: Path, number: int, start: str, node: str, rank: int, world_size: int, local_rank: int = 0) -> None:
        """Keep a file in `folder` from now on, or on another process than its node's first from a word on that may be the cause of the
        others' ends. Whose record it is stands in it (`Record`)."""
        with self._state:
            record = self._record = replace(
                self._record, number=number, start=start, node=node, rank=rank, world_size=world_size, local_rank=local_rank
            )
            self._make_file = lambda: RecordFile(folder / record.name, self.record)
        if local_rank == 0:
            self._file = self._make_file()
        self._note(ENTRY_PATIENCE)

    def begin_at(self, moment: float) -> None:
        """Count from an earlier moment, in seconds since 1970: what was before the process is start-up, as its imports are."""
        with self._state:
            record = self._record
            earlier = max(0.0, record.began - moment)
            record.began -= earlier
            record.seconds[Phase.IMPORT] = record.seconds.get(Phase.IMPORT, 0.0) + earlier

    def enter(self, phase: Phase) -> None:
        """The next phase begins."""
        with self._state:
            self._count()
            if phase != self._record.phase:
                self._record.phase, self._record.stretch = phase, 0.0

    def started_from(
        self, step: int, epoch: int, source: str, known: int = 0, total_steps: int | None = None, epochs: int | None = None
    ) -> None:
        """Training goes on here, after `step` completed steps. The rest is as in `Record`; up to `known` (`high_water` of the earlier
        starts' records) steps are replays."""
        with self._state:
            record = self._record
            record.origin, record.source, record.known = step, source, known
            record.step, record.highest, record.epoch = step, step, epoch
            record.total_steps, record.epochs = total_steps, epochs
        self._note(ENTRY_PATIENCE)

    def step_done(self, step: int, epoch: int) -> None:
        """Optimizer step `step` (from 1), of epoch `epoch` (from 1), is complete. Steps that this or an earlier start had completed
        before are replays."""
        with self._state:
            now = self._count()
            record = self._record
            if step <= max(record.known, record.highest):
                record.replayed_seconds += record.pending_seconds
                record.replayed_steps += 1
            else:
                record.useful_seconds += record.pending_seconds
                record.useful_steps += 1
            record.pending_seconds = record.stretch = 0.0
            record.step, record.epoch, record.highest = step, epoch, max(step, record.highest)
            self._boundaries.append(now - record.seconds.get(Phase.EVALUATION, 0.0))
            if len(self._boundaries) > 1:
                record.pace = max(0.0, self._boundaries[-1] - self._boundaries[0]) / (len(self._boundaries) - 1)
        spared = now < self._spared_until
        if not self._note(0.0 if spared else STEP_PATIENCE) and not spared:
            self._spared_until = now + SPARED

    def ended(self, ending: Ending, words: str | None = None) -> None:
        """Say how this start ends, in words for people, too. The first word stands: it is the nearest to the cause. What follows up to the
        death of the process is still counted."""
        with self._state:
            self._count()
            record = self._record
            if record.ending is None:
                record.ending, record.outcome, record.ended = ending, words or str(ending), record.end
                if self._file is None and self._make_file is not None and ending in OWN_REASONS:
                    self._file = self._make_file()
        self._note(ENTRY_PATIENCE)

    def close(self) -> None:
        """Make the last entry."""
        if self._file is not None:
            self._file.close(ENTRY_PATIENCE)
            self._file = None

    def record(self) -> Record:
        """What is known up to now."""
        with self._state:
            self._count()
            self._record.beat = self._wall_clock()
            return replace(self._record, seconds={**self._record.seconds})

    def _note(self, patience: float) -> bool:
        """Bring the file up to date; returns whether that was done within `patience` seconds."""
        return self._file is None or self._file.update(patience)

    def _count(self) -> float:
        """Give the time since the last call to the present phase; returns the clock's time."""
        now = self._clock()
        passed, self._since = max(0.0, now - self._since), now
        record = self._record
        record.stretch += passed
        if record.phase == Phase.STEP:
            record.pending_seconds += passed
        else:
            record.seconds[record.phase] = record.seconds.get(record.phase, 0.0) + passed
        return now


def process_started(process: int | str = "self") -> float:
    """When a process was started, in seconds since 1970 to about 0.01 s, so that its imports are counted; now where the system does
    not say."""
    now = time.time()
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        age = _uptime() - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, LookupError):
        return now
    return now - max(0.0, age)


def _uptime() -> float:
    """Seconds since the machine was booted, on Linux its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()
