"""What launchers may ask of a key-value store that one of them serves, and what they are answered; JSON, checked before anything is done.

The names of the fields are what is sent, and stay as they are: nodes of two versions may meet.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Asked(BaseModel):
    """Anything else than one of these is not answered."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Read(Asked):
    """The values of some keys."""

    do: Literal["read"]
    names: list[str]


class Write(Asked):
    """Set values by key."""

    do: Literal["write"]
    notes: dict[str, str]


class Add(Asked):
    """Add to a value that is a number."""

    do: Literal["add"]
    name: str
    amount: int


class Swap(Asked):
    """Change a value if it is what is expected."""

    do: Literal["swap"]
    name: str
    expected: str
    value: str


class Count(Asked):
    """Sign of life of a launcher, or its farewell."""

    do: Literal["beat", "leave"]
    job: str
    launcher: str


Request = Read | Write | Add | Swap | Count
REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="do")])
ANSWERS: TypeAdapter[int | str | list[str | None] | None] = TypeAdapter(int | str | list[str | None] | None)
