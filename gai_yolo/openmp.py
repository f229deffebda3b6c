"""How long OpenMP's threads wait for work before they sleep; to be said before PyTorch is imported, because they read it once."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = 2000
"""Turns of libgomp's waiting loop, some 0.05 ms. Between two operations of a step most threads wait for less, and waking up a sleeping one
takes as long. Its own 300,000 turns keep a core busy for milliseconds, which whoever else computes there needs: with a busy neighbour the
thread that has work waits behind one that only waits for it. Figures: docs/benchmarks.md."""
SAID_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables with which a user says it."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads of this process, and of those that it starts, sleep soon, unless the user has said how they are to wait. No
    result depends on it. Other libraries than GCC's do not look at this variable."""
    if not any(name in environment for name in SAID_BY):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
