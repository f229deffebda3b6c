"""What the job refuses, and the exit code the launcher sees.

Every refusal is written for the person who has to mend something: one sentence that names the file, the field or the
record and says what to do. The scripts print it without a traceback. Bugs of our own are `assert`s and stay loud.
"""


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
