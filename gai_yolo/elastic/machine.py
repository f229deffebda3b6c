"""What this machine gives to this process; needs no torch."""

from __future__ import annotations

import os
import sys


def available_cores() -> int:
    """Cores this process may use: containers and Slurm often give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
