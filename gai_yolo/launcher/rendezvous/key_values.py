"""Key-value stores in which the nodes of a job write for each other, changed by one node at a time; here what may be asked of one, and one
in memory.

A store is asked by requests, which also travel as JSON and are checked before anything is done. The names of the fields are what is sent,
and stay as they are: nodes of two versions may meet.
"""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

T = TypeVar("T")

ROUND = re.compile(r"(torch\.rendezvous(?:\.[^/]*)?)\.(\d+)/")
"""Torchrun's keys are `torch.rendezvous.RUN.ROUND/...`."""
MOST_STORE_BYTES = 64 << 20
"""Of all keys and values of a store in memory."""

Value = Annotated[str, Field(pattern=r"^[\x00-\xff]*$")]
"""Bytes as JSON can hold them: in Latin-1."""
Answer = int | str | list[str | None] | None


class Asked(BaseModel):
    """Anything else than one of these is not answered."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Read(Asked):
    """The values of some keys."""

    do: Literal["read"] = "read"
    names: list[str]


class Write(Asked):
    """Set values by key."""

    do: Literal["write"] = "write"
    notes: dict[str, Value]


class Add(Asked):
    """Add to a value that is a number."""

    do: Literal["add"] = "add"
    name: str
    amount: int


class Swap(Asked):
    """Change a value if it is what is expected."""

    do: Literal["swap"] = "swap"
    name: str
    expected: Value
    value: Value


class Count(Asked):
    """Sign of life of a launcher, or its farewell; for a store that a launcher serves."""

    do: Literal["beat", "leave"]
    job: str
    launcher: str


Request = Read | Write | Add | Swap | Count
REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="do")])
ANSWERS: TypeAdapter[Answer] = TypeAdapter(Answer)


class KeyValueStore(ABC):
    """Every call is atomic: no other node's call comes in between.

    Raises:
        OSError: from every call: the store cannot be reached, or not in time. What was asked for may have been done.
    """

    @abstractmethod
    def answer(self, asked: Request) -> Answer:
        """Do what is asked."""

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of these keys; None where there is none."""
        values = self._ask(list, Read(names=list(keys)))
        return [None if value is None else value.encode("latin-1") for value in values]

    def write(self, values: Mapping[str, bytes]) -> None:
        """Set values by key."""
        self.answer(Write(notes={key: value.decode("latin-1") for key, value in values.items()}))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first; returns the sum."""
        return self._ask(int, Add(name=key, amount=amount))

    def swap(self, key: str, expected: bytes, value: bytes) -> bytes:
        """Set a value if `expected` stands there (empty: nothing); returns what stands there afterwards."""
        asked = Swap(name=key, expected=expected.decode("latin-1"), value=value.decode("latin-1"))
        return self._ask(str, asked).encode("latin-1")

    def _ask(self, kind: type[T], asked: Request) -> T:
        answer = self.answer(asked)
        if not isinstance(answer, kind):
            raise ValueError("an answer of another kind")
        return answer


class InMemoryKeyValueStore(KeyValueStore):
    """A store of one process."""

    def __init__(self, content: dict[str, str] | None = None) -> None:
        self.content = {} if content is None else content
        self._size = sum(map(_size_of, self.content.items()))

    def answer(self, asked: Request) -> Answer:
        match asked:
            case Read():
                return [self.content.get(name) for name in asked.names]
            case Write():
                for name, value in asked.notes.items():
                    self._set(name, value)
                return None
            case Add():
                total = int(self.content.get(asked.name, "0")) + asked.amount
                self._set(asked.name, str(total))
                return total
            case Swap():
                if self.content.get(asked.name, "") == asked.expected:
                    self._set(asked.name, asked.value)
                return self.content.get(asked.name, "")
            case Count():
                raise ValueError("launchers are counted where they are served")

    def _set(self, key: str, value: str) -> None:
        if key not in self.content:
            forget_old_rounds(self.content, key)
            self._size = sum(map(_size_of, self.content.items()))
        self._size += _size_of((key, value)) - (_size_of((key, self.content[key])) if key in self.content else 0)
        if self._size > MOST_STORE_BYTES:
            raise OSError(errno.EFBIG, "too many keys")
        self.content[key] = value


def _size_of(item: tuple[str, str]) -> int:
    return len(item[0]) + len(item[1])


def forget_old_rounds(content: dict[str, str], key: str) -> None:
    """Drop what belongs to rendezvous rounds before the last one: torchrun leaves its keys."""
    if (latest := ROUND.match(key)) is None:
        return
    for other in list(content):
        its = ROUND.match(other)
        if its and its[1] == latest[1] and int(its[2]) < int(latest[2]) - 1:
            del content[other]
