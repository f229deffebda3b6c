"""`gai-yolo launch`: keeps torchrun, and so the job, going on this node. Run on every node alike.

    supervisor.py   the loop: start the agent, wait, judge its end, start it again
    verdict.py      what an end means and what follows from it; exit codes
    arguments.py    the command line, refused in sentences before anything starts
    command.py      the agent's command line and environment
    processes.py    children that neither outlive this process nor are left behind by the agent
    agent.py        the child: torchrun without tracebacks          -- loads torch, as does the next
    torchrun.py     what that runs
    fork_server.py  a process whose forks become workers, so that nothing is imported after a fault
    rendezvous/
        client.py       which file or endpoint this node's agent goes by
        election.py     which of several endpoints, as pure decisions
        key_values.py   key-value stores: what may be asked of one
        file_store.py   one in a file that all nodes share
        tcp_store.py    the same over TCP
        channel.py      a connection between two who know the job's secret
        secret.py       that secret: where it comes from, and who else could read it
        run_name.py     which run of a job this is
        handler.py      torchrun's rendezvous, on such a store               -- loads torch
        state.py        its state as JSON, because a pickle could run code   -- loads torch

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
