"""The training process's side of writing in the background: what waits, what is on its way, what is tried again.

Nothing here waits for a disk, except `drain`, which is for the end, and `submit` where a disk that works is slower than the
epochs. All of it runs in the training thread, at step boundaries.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from gai_yolo.checkpointing.capture import StateBuffer
from gai_yolo.checkpointing.writer_process import Answer, BestRenewed, Job, WriterProcess
from gai_yolo.errors import RunFolderBusy
from gai_yolo.log import ONCE

logger = logging.getLogger(__name__)

FIRST_RETRY, LONGEST_RETRY = 1.0, 60.0
"""Seconds before a failed write is tried again; doubled with each failure."""
HANGING = 60.0
"""Seconds after which a write that has not ended is told (or 20 times the last one's)."""
SLOWEST_DISK = 1e6
"""Bytes a second that a disk takes which works: nobody sees a sync move."""
GIVEN_UP = 10
"""A writer in which nothing has moved for so many times what makes it stuck is replaced by another."""
MOST_WAITING_EPOCHS = 4
"""Epoch checkpoints that may wait in memory."""


class BackgroundWriter:
    """Brings checkpoints to the disk, one at a time.

    A newer snapshot takes the place of one that waits or has failed. An epoch checkpoint is never dropped while the disk
    works; while it does not, at most `MOST_WAITING_EPOCHS` are kept in memory for it, and the oldest is given up, told.

    When something goes wrong, once for each outage, and when it works again, people are told.

    Args:
        start: makes a `WriterProcess`.
        written: is told of each checkpoint that is complete.
        alive: is called while the training thread waits here for the disk.
    """

    def __init__(
        self,
        start: Callable[[], WriterProcess],
        written: Callable[[Job, Answer], None],
        clock: Callable[[], float] = time.monotonic,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._start, self._written, self._clock, self._alive = start, written, clock, alive
        self.spare: list[StateBuffer] = []
        """Buffers that are free."""
        self._process: WriterProcess | None = None
        self._sent: Job | None = None
        self._best_follows = False
        self._waiting: deque[Job] = deque()
        self._failures = 0
        self._not_before = 0.0
        self._sent_at, self._last_seconds = 0.0, 0.0
        self._moved, self._moved_at = 0, 0.0
        """What the writer's progress was, and since when."""
        self._told_hanging, self._is_killed = False, False

    @property
    def is_idle(self) -> bool:
        """Whether everything that was submitted is on the disk (or was given up)."""
        return self._sent is None and not self._waiting

    @property
    def accepts_snapshots(self) -> bool:
        """A snapshot would have to wait behind an epoch checkpoint that waits itself: not worth its capture."""
        return not any(job.manifest.kind == "epoch" for job in self._waiting)

    def submit(self, job: Job) -> None:
        """Take over a captured checkpoint."""
        for old in [old for old in self._waiting if old.manifest.kind == "step"]:
            self._drop(old)
        self._waiting.append(job)
        while len(self._waiting) > MOST_WAITING_EPOCHS and not self._is_stuck and job.manifest.kind == "epoch":
            self.poll(0.05)
            self._alive()
        while len(self._waiting) > MOST_WAITING_EPOCHS:
            logger.warning(f"{self._waiting[0].name} is given up: the disk has not worked for too long; newer ones wait for it")
            self._drop(self._waiting[0])
        self.poll()

    def poll(self, timeout: float = 0.0) -> None:
        """Take note of what the writer has done, and hand it what is next; to be called at every step boundary.

        Raises:
            RunFolderBusy: another job has taken the run over.
        """
        if self._sent is not None or self._best_follows:
            self._receive(timeout)
        elif timeout:
            time.sleep(timeout)
        if self._sent is None and self._clock() >= self._not_before:
            self._send_next()

    def drain(self, patience: float, first_try: float = 0.0, while_moving: bool = False) -> bool:
        """Wait until everything is on the disk, `best.pt` too; returns whether all checkpoints are. Gives up when nothing was written for
        so many seconds.

        Args:
            first_try: seconds that it waits in any case while no try has failed: the writer itself may be starting.
            while_moving: gives up only when nothing has moved in the writer for so long.
        """
        now = self._clock()
        in_any_case = now + first_try
        left, deadline = self._num_left, now + patience
        while self._num_left and (now < deadline or (self._failures == 0 and now < in_any_case)):
            self.poll(0.05)
            now = self._clock()
            if while_moving and (self._sent is not None or self._best_follows):
                deadline = max(deadline, self._moved_at + patience)
            if self._num_left < left:
                left, deadline = self._num_left, now + patience
        return self.is_idle

    def close(self, patience: float) -> None:
        """End the writer; what is on its way is waited for as long as told, and finished by it in any case."""
        if self._process is not None:
            self._process.close(patience)
            self._process = None

    @property
    def unwritten(self) -> list[str]:
        """Names of what is not on the disk yet."""
        return [job.name for job in ([self._sent] if self._sent else []) + list(self._waiting)]

    @property
    def _num_left(self) -> int:
        return len(self._waiting) + (self._sent is not None) + self._best_follows

    @property
    def _is_stuck(self) -> bool:
        return self._failures > 0 or (self._sent is not None and self._clock() - self._moved_at > self._stuck_after)

    @property
    def _stuck_after(self) -> float:
        """Seconds without any progress."""
        assert self._sent is not None
        return max(self._told_after, self._sent.buffer.content.size / SLOWEST_DISK)

    @property
    def _told_after(self) -> float:
        return max(HANGING, 20 * self._last_seconds)

    def _send_next(self) -> None:
        job = self._waiting[0] if self._waiting and self._waiting[0].buffer.ready() else None
        try:
            # Also without a job: it takes seconds to come up, and the first checkpoint is not to wait for that.
            self._process = self._process or self._start()
            if job is not None:
                self._process.send(job)
        except OSError as error:
            self._lose_process(f"the writer cannot be reached ({error.strerror or error})")
            return
        if job is not None:
            self._waiting.remove(job)
            self._sent, self._sent_at, self._told_hanging = job, self._clock(), False
            self._moved_at, self._is_killed = self._sent_at, False

    def _receive(self, timeout: float) -> None:
        assert self._process is not None
        try:
            answer = self._process.answer(timeout)
        except (OSError, EOFError):
            if self._sent is not None:
                self._fail("the writer process has died")
            self._lose_process(None)
            return
        for note in answer.notes if answer is not None else []:
            logger.warning(note, extra=ONCE)
        if answer is None:
            self._watch()
        elif answer.taken_over is not None:
            self._sent, self._best_follows = None, False
            self._waiting.clear()
            raise RunFolderBusy(answer.taken_over)
        elif isinstance(answer, BestRenewed):
            self._best_follows = False
        else:
            self._best_follows = answer.best_follows
            if answer.failure is not None:
                self._fail(answer.failure)
            else:
                self._succeed(answer)

    def _succeed(self, answer: Answer) -> None:
        job, self._sent = self._sent, None
        assert job is not None
        if self._failures:
            logger.warning(f"{job.name} was written, after {self._failures} failed tries")
        self._failures, self._not_before, self._told_hanging, self._last_seconds = 0, 0.0, False, answer.seconds
        self.spare.append(job.buffer)
        self._written(job, answer)

    def _fail(self, reason: str) -> None:
        job, self._sent = self._sent, None
        assert job is not None
        if self._failures == 0:
            logger.warning(
                f"{job.name} could not be written: {reason}; needed {_megabytes(job.buffer.content.size)}, free {self._free()}; "
                "training goes on, older checkpoints stay, and it is tried again until it works"
            )
        self._pause()
        if job.manifest.kind == "step" and self._waiting:
            self.spare.append(job.buffer)  # what waits is newer
        else:
            self._waiting.appendleft(job)

    def _pause(self) -> None:
        self._not_before = self._clock() + min(FIRST_RETRY * 2**self._failures, LONGEST_RETRY)
        self._failures += 1

    def _lose_process(self, reason: str | None) -> None:
        """Forget a dead writer; the next try starts another."""
        if reason is not None:
            if self._failures == 0:
                logger.warning(f"{reason}; training goes on, and it is tried again until it works")
            self._pause()
        self._best_follows = False  # the next writer looks after it first
        self.close(0.0)

    def _watch(self) -> None:
        assert self._process is not None
        now, moved = self._clock(), self._process.progress
        if moved != self._moved:
            self._moved, self._moved_at = moved, now
        if self._sent is None:
            return  # best.pt, which nobody waits for but the end
        still = now - self._moved_at
        if not self._told_hanging and now - self._sent_at > self._told_after:
            self._told_hanging = True
            state = "and is being written" if still < HANGING / 2 else f"and nothing has moved for {still:.0f} s"
            logger.warning(
                f"{self._sent.name} has been on its way to the disk for {now - self._sent_at:.0f} s, {state} "
                f"({_megabytes(self._sent.buffer.content.size)}, free {self._free()}; the last one took {self._last_seconds:.1f} s); "
                "training goes on"
            )
        if not self._is_killed and still > GIVEN_UP * self._stuck_after:
            # Should the disk hold it, it cannot be ended, and another one would be held as well: then it is waited for.
            self._is_killed = True
            self._process.kill()

    def _drop(self, job: Job) -> None:
        self._waiting.remove(job)
        self.spare.append(job.buffer)

    def _free(self) -> str:
        try:
            assert self._process is not None
            return _megabytes(self._process.free_bytes())
        except OSError as error:
            return f"unknown ({error.strerror})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
