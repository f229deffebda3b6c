"""The end of a start: the one place where what was raised becomes an outcome, a record, words for people and an exit code."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from gai_yolo.distributed.world import is_lost_peer, lost_peer_line
from gai_yolo.errors import Departure, Ending, Refusal
from gai_yolo.goodput.recorder import Recorder
from gai_yolo.log import OF_NODE
from gai_yolo.reporting.console import NullConsole
from gai_yolo.supervision import outcome
from gai_yolo.supervision.notices import Notice
from gai_yolo.supervision.outcome import Outcome

PAUSE = 10.0
"""Seconds before torchrun tries again what time can mend."""

logger = logging.getLogger(__name__)


class JobEnd:
    """How one start ends.

    What people read of it is said once on each node, by its first process: refusals and what nobody had foreseen on standard error, the
    rest as warnings. Where a launcher waits for what time can mend, it says so itself.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.console = NullConsole()
        self.speaks = True
        """Whether this process speaks for its node; every one does while it is not known which is the first."""
        self.run_folder: Path | None = None
        """Where the next start goes on, once that is known."""
        self._error: BaseException | None = None

    def show(self, record: logging.LogRecord) -> None:
        """Show what a module says, from any thread."""
        self.console.show(record)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever ends the block, record, launcher and the person in front know of it, and the process goes on to `leave`. Of two ends the
        first one counts, which is the nearest to the cause."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self._error is not None:
                if not isinstance(error, KeyboardInterrupt):
                    traceback.print_exception(error)  # closing has failed, too
                return
            self._error = error
            found = outcome_of(error)
            is_refused = isinstance(error, Refusal)
            self.recorder.ended(found.ending, f"{found.ending}: {found.reason}" if is_refused else found.reason)
            outcome.report(found)
            self._say(error, found)

    def finished(self) -> None:
        """Nothing is left to do."""
        self.recorder.ended(Ending.FINISHED)
        outcome.report(Outcome(Ending.FINISHED, Ending.FINISHED))

    def farewell(self, ending: Ending, reason: str, launcher_knows: bool) -> None:
        """The same from another thread, just before it ends the process, while the training thread may hold any lock."""
        self.recorder.ended(ending, reason)
        outcome.report(Outcome(ending, reason))
        if not launcher_knows:
            outcome.end_agent()
        print(f"warning: {socket.gethostname()}: {reason}", file=sys.stderr, flush=True)
        self.console.close()  # last, because the training thread may hold the terminal's lock

    def close(self) -> None:
        """Make the last entries."""
        self.recorder.close()
        self.console.close()

    def leave(self) -> int:
        """Returns the exit code, for a process that has closed everything."""
        error = self._error
        if error is None:
            return 0
        if isinstance(error, Refusal) and not self._is_tried_again(error):
            outcome.end_agent()
            return error.exit_code
        if isinstance(error, Refusal) and not outcome.has_launcher():
            time.sleep(PAUSE)  # torchrun has no pause between two starts; all processes of a node are here, and none ends the others
        if isinstance(error, Departure) and not error.launcher_knows:
            outcome.end_agent()
        return outcome_of(error).ending.exit_code

    def _say(self, error: BaseException, found: Outcome) -> None:
        if isinstance(error, Refusal):
            again = self._is_tried_again(error)
            if self.speaks and not (again and outcome.has_launcher()):
                logger.error(f"{'waiting' if again else 'error'}: {error}")
        elif found.ending == Ending.FAILED:
            logger.error(f"error: {unforeseen(error)}")
            traceback.print_exception(error)
        elif self.run_folder is not None:
            words = "interrupted" if isinstance(error, KeyboardInterrupt) else found.reason
            # Who looks at this node sees no other's words, unless a launcher says them.
            of_node = OF_NODE if self.speaks and not outcome.has_launcher() else None
            logger.warning(f"{words}; the same command goes on from the newest complete state in {self.run_folder}", extra=of_node)

    def _is_tried_again(self, refusal: Refusal) -> bool:
        """What time can mend is no refusal where somebody starts this process again."""
        return refusal.is_transient and outcome.is_started_again()


def outcome_of(error: BaseException) -> Outcome:
    """What an exception means."""
    if isinstance(error, Departure):
        return Outcome(error.ending, error.reason)
    if isinstance(error, Refusal):
        return Outcome(error.ending, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Outcome(Ending.INTERRUPTED, "Ctrl-C")
    if isinstance(error, RuntimeError) and is_lost_peer(error):
        return Outcome(Ending.PEER_LOST, lost_peer_line(error))
    said = first_line(error)
    return Outcome(Ending.FAILED, f"failed: {type(error).__name__}{': ' if said else ''}{said}")


def lost_peer(error: RuntimeError, failures: list[str], notice: Notice | None = None) -> Departure:
    """What to raise when another process, or a loader, does not answer any more, and the state was saved.

    Args:
        failures: of saving it.
        notice: that had come before: the others may have had it too, and have gone first.
    """
    line = "; ".join([lost_peer_line(error), *failures])
    if notice is None:
        return Departure(line, Ending.PEER_LOST)
    return Departure(f"{notice.cause}: left, {line}", notice.ending, notice.launcher_knows)


def unforeseen(error: BaseException) -> str:
    """For people, an exception that no part of this program has an answer to: what, where, and what is left."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "gai_yolo" in frame.filename]
    where = f" in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    said = first_line(error)
    what = f"{type(error).__name__}{where}{': ' if said else ''}{said}"
    return f"{what}; what is saved is complete, and the same command goes on from it. The traceback follows."


def first_line(error: BaseException) -> str:
    """Of what an exception says; empty if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")
