"""What the job refuses, why it may end early, and the exit code the launcher sees.

Every refusal is written for the person who has to mend something: one sentence that names the file, the field or the
record and says what to do. The scripts print it without a traceback. Bugs of our own are `assert`s and stay loud.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import TypeVar

REFUSED, HARDWARE, NO_PROGRESS, LEFT, RESTART, INTERRUPTED = 2, 3, 4, 75, 76, 130
"""Exit codes: a person has to mend something; another state than the others; nothing is gained by starting again; left after a notice,
state saved; to be started again; Ctrl-C."""


class Ending(StrEnum):
    """How a process of the job ended, as far as it could say: in its record, and to its launcher. One that was killed says nothing."""

    FINISHED = "finished"
    """Nothing is left to do."""
    REFUSED = "refused"
    """A person has to mend something."""
    WAITING = "waiting"
    """Something stands in the way that time or another node can mend: a disk, another job in the run folder."""
    INTERRUPTED = "interrupted"
    """Ctrl-C."""
    LEFT = "left"
    """Told to go, by a signal or a cloud."""
    PEER_LEFT = "peer left"
    """Other nodes were told to go; to be started again without them."""
    PEER_LOST = "peer lost"
    """Another process cannot be reached any more."""
    AGENT_GONE = "agent gone"
    """torchrun's agent has died."""
    HUNG = "hung"
    """The process waited too long for itself: a step, an evaluation."""
    FAILED = "failed"
    """An exception that nobody had foreseen."""
    DIVERGED = "diverged"
    """Losses or gradients went bad again and again."""
    HARDWARE = "hardware"
    """A rank has another state than the others."""
    NO_PROGRESS = "no progress"
    """Started again and again without a new step."""
    UNKNOWN = "unknown"
    """It said something that this version does not know."""

    @property
    def exit_code(self) -> int:
        """With which the process ends, if there is somebody who starts it again."""
        return _EXIT_CODES.get(self, RESTART)


_EXIT_CODES = {
    Ending.FINISHED: 0,
    Ending.FAILED: 1,
    Ending.REFUSED: REFUSED,
    Ending.DIVERGED: REFUSED,
    Ending.HARDWARE: HARDWARE,
    Ending.NO_PROGRESS: NO_PROGRESS,
    Ending.LEFT: LEFT,
    Ending.INTERRUPTED: INTERRUPTED,
}
LAST_WORDS = frozenset({Ending.FINISHED, Ending.REFUSED, Ending.DIVERGED, Ending.HARDWARE, Ending.NO_PROGRESS, Ending.INTERRUPTED})
"""Endings of workers that must not be started again by their agent. `LEFT` is not among them: workers also leave when the agent ends
them because a node has come or gone."""
OF_ANOTHER = frozenset({Ending.PEER_LEFT, Ending.PEER_LOST})
"""Endings that tell of something that happened to another process."""
OWN_REASONS = frozenset({Ending.FAILED, Ending.HUNG, Ending.WAITING})
"""Endings of one process by itself, because of which the others end. What all of them decide alike the first one says."""
OWN_FAULTS = frozenset({Ending.FAILED, Ending.HUNG, Ending.HARDWARE})
"""Endings after which another start is likely to end so, too."""

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ENOLCK", "EREMOTEIO", "ENODEV", "ENXIO", "EBUSY", "EAGAIN"),
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENOLINK", "ECOMM"),
        *("ENOMEM", "ENFILE", "EMFILE", "EINTR"),
    )
    if hasattr(errno, name)
)
"""Error numbers of disks and networks that may be well again in a while, or on another node. Not among them: what is not there, what may
not be written to, and a file system that is mounted for reading only; a person has to see to those."""


class Refusal(ValueError):
    """The user asked for something that cannot be done; nothing was lost or overwritten."""

    ending = Ending.REFUSED

    @property
    def exit_code(self) -> int:
        """With which the process ends that nobody starts again."""
        return REFUSED if self.is_transient else self.ending.exit_code

    @property
    def is_transient(self) -> bool:
        """Whether time or another node can mend it: then it is a refusal to somebody at a terminal only, and a launcher tries again."""
        return self.ending is Ending.WAITING


R = TypeVar("R", bound=Refusal)


def is_transient(error: OSError) -> bool:
    """Whether what the operating system refuses now it may not refuse in a while."""
    return error.errno in TRANSIENT


def transient(refusal: R) -> R:
    """The same refusal, as one that time or another node can mend."""
    refusal.ending = Ending.WAITING
    return refusal


def refused_by(error: OSError, refusal: R) -> R:
    """The same refusal, transient if the operating system's error behind it is."""
    return transient(refusal) if is_transient(error) else refusal


class ConfigError(Refusal):
    """A configuration file or a `--set` value that makes no sense."""


class DataError(Refusal):
    """A data set that cannot be trained or evaluated on."""


class CheckpointError(Refusal):
    """A checkpoint or weight file that is damaged, foreign, or belongs to another run."""


class ExportError(Refusal):
    """A file for other programs that cannot be made here, or that would say something else than the network."""


class RunFolderBusy(Refusal):
    """Another job is writing to the same run folder. It ends some time, or is dead already and its lock goes with it."""

    ending = Ending.WAITING


class Stop(Refusal):
    """Training cannot go on; raised on all ranks alike, at the same place."""

    ending = Ending.DIVERGED


class NoProgress(Stop):
    """The job was started again and again and has not made a step."""

    ending = Ending.NO_PROGRESS


class Departure(Exception):
    """This process ends before the training does, and nothing is wrong with it: the next start goes on.

    Args:
        reason: one sentence for people.
        ending: whose exit code is never 0, because Kubernetes takes a worker's 0 for the job's success.
        launcher_knows: whether the launcher has got the notice too, and does not start this process again.
    """

    def __init__(self, reason: str, ending: Ending, launcher_knows: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.ending, self.launcher_knows = reason, ending, launcher_knows

    @property
    def exit_code(self) -> int:
        """`LEFT`, `RESTART` or `INTERRUPTED`."""
        return self.ending.exit_code


def escaped(text: str) -> str:
    """A text out of somebody's files without what would steer a terminal, all of it."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def printable(text: str, most: int = 300) -> str:
    """A text out of somebody's files or file names in one line, without what would steer a terminal; of a longer one the middle is left
    out."""
    shown = escaped(text[: 4 * most])
    return shown if len(shown) <= most else f"{shown[: most // 3]}...{shown[len(shown) - 2 * most // 3 :]}"
