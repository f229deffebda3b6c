"""`gai-yolo launch`: keeps torchrun, and so the job, going on this node. Run on every node alike.

torchrun's own stores are not used. A FileStore whose last record was cut short, by a kill in mid-write or by a full disk, makes every
process that opens it spin for ever, without Python's signal handlers; it grows by 1 KB/s. A TCPStore's client waits without limit for
a server that does not answer. Both were measured with PyTorch 2.15. Neither knows who writes into it: a stranger may change or delete
any key, so that signing what is kept there would still leave the job at his mercy. And torchrun closes its rendezvous, for all nodes and
for ever, when one node's agent fails.
"""

from __future__ import annotations

import logging
import sys


def on_stderr(record: logging.LogRecord) -> None:
    """Show what launchers and their agents say to people; see `log.showing`."""
    print(f"launch: {record.getMessage()}", file=sys.stderr, flush=True)
