"""What the job refuses, why it may end early, and the exit code the launcher sees.

Every refusal is written for the person who has to mend something: one sentence that names the file, the field or the
record and says what to do. The scripts print it without a traceback. Bugs of our own are `assert`s and stay loud.
"""

NO_PROGRESS, LEFT, RESTART, INTERRUPTED = 4, 75, 76, 130
"""Exit codes: nothing is gained by starting again; left after a notice, state saved; to be started again; Ctrl-C."""


class Refusal(ValueError):
    """The user asked for something that cannot be done; nothing was lost or overwritten."""

    exit_code = 2
    told = False
    """Whether it was printed already."""


class ConfigError(Refusal):
    """A configuration file or a `--set` value that makes no sense."""


class DataError(Refusal):
    """A data set that cannot be trained or evaluated on."""


class CheckpointError(Refusal):
    """A checkpoint or weight file that is damaged, foreign, or belongs to another run."""


class RunFolderBusy(Refusal):
    """Another job is writing to the same run folder."""


class Stop(Refusal):
    """Training cannot go on; raised on all ranks alike, at the same place."""


class NoProgress(Stop):
    """The job was started again and again and has not made a step."""

    exit_code = NO_PROGRESS


class Departure(Exception):
    """This process ends before the training does, and nothing is wrong with it: the next start goes on.

    Args:
        reason: one sentence for people.
        exit_code: `LEFT`, `RESTART` or `INTERRUPTED`; never 0, because Kubernetes takes a worker's 0 for the job's success.
        launcher_knows: whether the launcher has got the notice too, and does not start this process again.
    """

    def __init__(self, reason: str, exit_code: int, launcher_knows: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.exit_code, self.launcher_knows = reason, exit_code, launcher_knows
