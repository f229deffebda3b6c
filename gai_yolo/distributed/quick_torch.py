"""Keeps PyTorch's compiler out of a start that compiles nothing.

Optimizers, DistributedDataParallel and torchvision import `torch._dynamo`, and with it sympy and the whole compiler, only to ask it
things that have one answer where nothing is compiled. That takes longer than importing the rest of PyTorch, after every crash, before the
first step. A stand-in gives these answers; whatever else is asked of it brings in the real one, and it is as if it had never been.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

NAME = "torch._dynamo"


def install() -> None:
    """Put the stand-in where PyTorch looks for the compiler, unless that is loaded already."""
    if NAME not in sys.modules:
        sys.meta_path.insert(0, _Finder())
        sys.modules[NAME] = stand_in = _StandIn()
        sys.modules[f"{NAME}.utils"] = stand_in.utils
        vars(torch)["_dynamo"] = stand_in


def real() -> ModuleType:
    """The compiler itself, loaded if need be."""
    if isinstance(sys.modules.get(NAME), _StandIn):
        for name in (NAME, f"{NAME}.utils"):
            del sys.modules[name]
        vars(torch).pop("_dynamo", None)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    return importlib.import_module(NAME)


def _ignore(*_: Any, **__: Any) -> None:
    """What these functions do outside of a compilation."""


def _disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return function if function is not None else _disable


class _Part(ModuleType):
    """A module that knows a few names and gets the others from the real one."""

    def __init__(self, name: str, find: Callable[[], Any], **known: Any) -> None:
        super().__init__(name)
        self._find = find
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._find(), name)


class _StandIn(_Part):
    def __init__(self) -> None:
        rules = _Part(
            f"{NAME}.trace_rules",
            lambda: real().trace_rules,
            clear_lru_cache=_ignore,
            get_legacy_mod_inlinelist=SimpleNamespace(cache_clear=_ignore),
        )
        super().__init__(NAME, real, graph_break=_ignore, disable=_disable, trace_rules=rules)
        self.utils = _Part(
            f"{NAME}.utils",
            lambda: real().utils,
            get_optimize_ddp_mode=lambda: "ddp_optimizer",
            # torchvision imports it, and asks it when it aligns regions on a GPU.
            is_compile_supported=lambda *arguments: real().utils.is_compile_supported(*arguments),
        )
        self.__path__: list[str] = []  # a package, whose modules `_Finder` finds


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the real compiler when one of its modules is imported by name."""

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{NAME}."):
            return None
        real()
        importlib.import_module(name)
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It is loaded already."""
