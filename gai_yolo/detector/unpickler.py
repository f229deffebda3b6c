"""What a pickle of `torch.save` describes: tensors, containers, and stand-ins for objects of programs that are not here.

A pickle is a list of calls, with a stack. The standard library parses it into opcodes (`pickletools.genops`, which makes numbers and
texts and nothing else); this module follows those of them that a file of `torch.save` has. Nothing is imported, no method of what was
made is ever called, and nothing is hashed or compared that could hold something else: a key of a dict is a text, a small number, or
passed over. What is made is bounded by the pickle's own length.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gai_yolo.detector.pickled import CALLS, STORAGES, Named, NotOurs, StandIn, is_plain, is_size, made

STAND_IN_PACKAGES = ("ultralytics", "torch", "numpy", "pathlib", "collections")
"""Whose classes may be named: those of released detectors, and what else their files hold. Nothing of them is imported."""
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Of modules, as PyTorch's pickles have them."""
RECONSTRUCTOR = "copyreg._reconstructor"
"""Makes an object of the class that is its first argument."""
MOST_OPCODES = 1_000_000
"""Of a pickle. The x network with an optimizer's state, or pickled as objects, has 143,000; so many are read in some 2 s."""


class Unpickler:
    """Follows one pickle.

    Args:
        data: the pickle.
        storage: gives the numbers of a storage by its key, type and length, in numbers. Raises `pickle.UnpicklingError` if there is none.

    Attributes:
        objects: how many stand-ins were made for objects of programs.
    """

    def __init__(self, data: bytes, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self._data, self._storage = data, storage
        self._budget = len(data)
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self.objects = 0

    def load(self) -> Any:
        """The one object that the pickle is of.

        Raises:
            NotOurs: it names what could be code, or tensors of another make.
            pickle.UnpicklingError, ValueError, LookupError, ...: damaged, or too large for a pickle of weights.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._data)):
            if count >= MOST_OPCODES:
                raise pickle.UnpicklingError("longer than any pickle of weights")
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            else:
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise pickle.UnpicklingError(f"{opcode.name} is not in files of torch.save")
                step(self, argument)
        return self._stack.pop()

    def _spend(self, number: int) -> None:
        """What is copied was in the pickle once: over and over it would take any memory."""
        self._budget -= number
        if self._budget < 0:
            raise pickle.UnpicklingError("copies more than there is")

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pass(self, _: Any) -> None:
        """What says how the pickle is written."""

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, place: int) -> None:
        if place > len(self._data):
            raise pickle.UnpicklingError("a place of something that there is no room for")
        self._memo[place] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _tuple(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(items)

    def _tuple_of(self, _: Any, count: int) -> None:
        if len(self._stack) < count:
            raise pickle.UnpicklingError("nothing to make a tuple of")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        """Of a list; one of another make stays empty."""
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not StandIn:
            raise pickle.UnpicklingError("not a list")

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self._stack.append({})
        self._update(items)

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, _: Any) -> None:
        self._update(self._marked())

    def _update(self, items: list[Any]) -> None:
        """Of a dict by keys and values in turn; one of another make stays empty."""
        target = self._stack[-1]
        if len(items) % 2 or type(target) not in (dict, StandIn):
            raise pickle.UnpicklingError("not a dict")
        if type(target) is dict:
            target.update((key, items[2 * at + 1]) for at, key in enumerate(items[::2]) if is_plain(key))

    def _add(self, _: Any) -> None:
        items, target = self._marked(), self._stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError("not a set")
        target.update(filter(is_plain, items))

    def _frozenset(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(set(filter(is_plain, items)))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("a name that is none")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        full = f"{OLD_NAMES.get(module, module)}.{name}"
        if full not in CALLS and full != RECONSTRUCTOR and module.partition(".")[0] not in STAND_IN_PACKAGES:
            raise NotOurs.named(full)
        self._stack.append(Named(full))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Named or type(arguments) is not tuple:
            raise pickle.UnpicklingError("a call of nothing")
        if function.name == RECONSTRUCTOR:
            self._object(*arguments[:1])
        else:
            self._spend(sum(len(argument) for argument in arguments if type(argument) in (list, tuple, set, dict)))
            self._stack.append(made(function.name, arguments))

    def _new(self, _: Any) -> None:
        _arguments, kind = self._stack.pop(), self._stack.pop()
        self._object(kind)

    def _object(self, kind: Any) -> None:
        if type(kind) is not Named or kind.name in CALLS:
            raise NotOurs.named(f"an object of {kind.name if type(kind) is Named else 'no class'}")
        self.objects += 1
        self._stack.append(StandIn())

    def _build(self, _: Any) -> None:
        """State is for stand-ins. What a dict of another make has besides its items is of no use here."""
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) not in (dict, StandIn):
            raise pickle.UnpicklingError("a state of what has none")
        for part in state if type(state) is tuple and len(state) == 2 else (state,):
            if type(target) is StandIn and type(part) is dict:
                self._spend(len(part))
                target.attributes.update((key, value) for key, value in part.items() if type(key) is str)

    def _persistent(self, _: Any) -> None:
        pid = self._stack.pop()
        if type(pid) is not tuple or len(pid) != 5:
            raise pickle.UnpicklingError("not a storage")
        word, kind, key, _place, count = pid
        if (word, type(kind), type(key)) != ("storage", Named, str) or not is_size(count):
            raise pickle.UnpicklingError("not a storage")
        package, _, name = kind.name.rpartition(".")
        if package in ("torch", "torch.storage") and name in STORAGES:
            self._stack.append(self._storage(key, STORAGES[name], count))
        else:
            raise NotOurs.of_make(kind.name)

    def _stop(self, _: Any) -> None:
        if len(self._stack) != 1 or self._below:
            raise pickle.UnpicklingError("ends in the midst")


_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
)
"""Opcodes that put their own argument on the stack."""
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_STEPS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), Unpickler._pass),
    "STOP": Unpickler._stop,
    "MARK": Unpickler._mark,
    "POP": Unpickler._pop,
    "POP_MARK": Unpickler._pop_mark,
    "DUP": Unpickler._dup,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Unpickler._put),
    "MEMOIZE": Unpickler._memoize,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Unpickler._get),
    "TUPLE": Unpickler._tuple,
    **{f"TUPLE{count}": partial(Unpickler._tuple_of, count=count) for count in (1, 2, 3)},
    "LIST": Unpickler._list,
    "APPEND": Unpickler._append,
    "APPENDS": Unpickler._appends,
    "DICT": Unpickler._dict,
    "SETITEM": Unpickler._setitem,
    "SETITEMS": Unpickler._setitems,
    "ADDITEMS": Unpickler._add,
    "FROZENSET": Unpickler._frozenset,
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._new,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
}
"""Opcodes of protocols 2 to 5. The older ones are texts, which no file of `torch.save` has."""
