"""The launcher's child: torchrun's agent. `python -m gai_yolo.launcher.agent ARGUMENTS OF TORCHRUN`, started by `supervisor.py` only.

Ends with a code of `verdict.py`: what torchrun would raise is said in one line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from gai_yolo.launcher import on_stderr
from gai_yolo.launcher.command import FORK_VARIABLE, worker_command
from gai_yolo.launcher.fork_server import ForkServer
from gai_yolo.log import showing
from gai_yolo.processes import die_with_parent
from gai_yolo.supervision.outcome import LAUNCHER_VARIABLE, leave
from gai_yolo.supervision.streams import forgive_lost_streams


def main() -> int:
    """Run torchrun, bound to the launcher's life."""
    forgive_lost_streams()
    # SIGTERM ends the workers, too, in order. Before torch is there it ends this process at once, which has none yet.
    die_with_parent(int(os.environ[LAUNCHER_VARIABLE]), signal.SIGTERM)
    server = None
    if os.environ.get(FORK_VARIABLE) != "0":
        with contextlib.suppress(OSError):  # there can be none
            server = ForkServer(worker_command(sys.argv[1:]))
    from gai_yolo.launcher.torchrun import run  # takes seconds, in which the fork server imports as well

    with showing(on_stderr):
        return run(sys.argv[1:], server)


if __name__ == "__main__":
    leave(main())  # Python's own end takes half a second, in which a machine that was told to go, or to start again, waits
