"""Which run of a job this is.

Nodes that meet under one job id belong to one run until it has succeeded; who comes after that begins the next. So a rendezvous file may
be used again, and a node that was away learns that the others have finished.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from gai_yolo.launcher.rendezvous.key_values import KeyValueStore

UNNAMED = "gai-yolo"
"""Job id where none was given."""


class JobDone(Exception):
    """The run of this launcher has succeeded, on other nodes."""


def agree_on_run(store: KeyValueStore, job: str, known: str | None, next_name: Callable[[str | None], str]) -> str:
    """The run that this node takes part in.

    Args:
        known: the run that this launcher has been in. A store that was lost is told of it, so that workers see one run.
        next_name: the name of the run after another, or of the first.

    Raises:
        JobDone: `known` has succeeded.
        OSError: the store cannot be reached.
    """
    while True:
        current = store.swap(_current(job), b"", (known or next_name(None)).encode()).decode()
        done, known_done = store.read([_done(job, current), _done(job, known or "")])
        if known_done is not None:
            raise JobDone
        if done is None:
            return current
        store.swap(_current(job), current.encode(), (known or next_name(current)).encode())


def claim_run(store: KeyValueStore, job: str, known: str) -> None:
    """Tell a new store which run goes on, before a newcomer begins another one there."""
    store.swap(_current(job), b"", known.encode())


def close_run(store: KeyValueStore, job: str, run: str) -> None:
    """Leave word that a run has succeeded."""
    store.write({_done(job, run): b"1"})


def numbered(job: str) -> Callable[[str | None], str]:
    """Names for who gave a job id: `JOB-1`, `JOB-2`, ... A store that is lost does not begin another run."""

    def name(before: str | None) -> str:
        match = re.search(r"-(\d+)$", before or "")
        return f"{job}-{int(match[1]) + 1 if match else 1}"

    return name


def random_name(_before: str | None) -> str:
    """Names for who did not."""
    return f"{UNNAMED}-{secrets.token_hex(4)}"


def _current(job: str) -> str:
    return f"{job}/run"


def _done(job: str, run: str) -> str:
    return f"{job}/done/{run}"
