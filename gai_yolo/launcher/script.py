"""The program that a launcher's workers run, and what can be imported for it beforehand."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

LATE_IMPORTS = b"import torch._dynamo\nimport torchvision.ops"
"""What a training imports as it goes: PyTorch's optimizers and DistributedDataParallel bring in its compiler, whatever is compiled."""


class Script:
    """What to run: what follows `python`, `PATH ARGUMENTS` or `-m MODULE ARGUMENTS`."""

    def __init__(self, words: Sequence[str]) -> None:
        self.is_module = words[0] == "-m"
        self.name, *self.arguments = words[1:] if self.is_module else words

    def prepare(self) -> None:
        """Let modules be found where Python looks when it runs this."""
        if not self.is_module and not sys.flags.safe_path:
            sys.path[0] = str(Path(self.name).resolve().parent)

    def preload(self) -> None:
        """Import what it imports before it does anything else, and, where that is PyTorch, what PyTorch imports with the first step."""
        with contextlib.suppress(OSError, SyntaxError, ImportError, ValueError):  # the worker will say it
            preload(self._source())
        if "torch" in sys.modules:
            preload(LATE_IMPORTS)

    def _source(self) -> bytes:
        if self.is_module and self.name == "gai_yolo":
            return b"import gai_yolo.job.run"  # which `train` does when its command line is parsed
        spec = importlib.util.find_spec(self.name) if self.is_module else None
        return Path((spec.origin if spec else None) or self.name).read_bytes()

    def run(self) -> None:
        """Run it as the main program of this process."""
        sys.argv = [self.name, *self.arguments]
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(self.name).absolute()), run_name="__main__")


def preload(source: bytes) -> None:
    """Do a program's first import statements, before it does anything that could matter to the others. What fails will fail in the worker,
    where it is seen."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            with contextlib.suppress(Exception):
                exec(compile(ast.Module([statement], []), "imports", "exec"), {})
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
            break
