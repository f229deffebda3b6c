"""Writes docs/configuration.md from the configuration's own definition: `python -m tests.config_reference`."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from gai_yolo.config import Config, fields_of
from gai_yolo.sections import FIXED, LOCAL

HEADER = """# Configuration

Made by `uv run python -m tests.config_reference > docs/configuration.md`; a test compares the two.

Every key can be set in the YAML file or with `--set key.path=value ...`. Keys marked with * define the run: a run that has
checkpoints is not continued with another value. A change of any other key is told and accepted.

All nodes of a job must have the same values, which they compare at every start. Keys marked with † are each machine's own affair; whether
the files that they lead to are the same is compared by their content.
"""


def configuration_reference() -> str:
    """All keys with type, default and meaning, as Markdown."""
    return HEADER + "".join(_section(name, field) for name, field in Config.model_fields.items())


def _section(name: str, field: FieldInfo) -> str:
    rows = "".join(_row(key, one) for key, one in fields_of(field.annotation))
    return f"\n## {name}\n{field.description}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}"


def _row(key: str, field: FieldInfo) -> str:
    default = "none" if field.default is None else f"`{field.default}`"
    mark = " *" if field.json_schema_extra == FIXED else " †" if field.json_schema_extra == LOCAL else ""
    text = " ".join((field.description or "").split())
    return f"| `{key}`{mark} | {_kind(field.annotation)} | {default} | {text} |\n"


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(member) for member in typing.get_args(annotation) if member is not type(None))
    if origin is list:
        return f"list of {_kind(typing.get_args(annotation)[0])}s"
    if origin is dict:
        return " to ".join(_kind(member) for member in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _kind(typing.get_args(annotation)[0])
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false", "Path": "path"}[annotation.__name__]


if __name__ == "__main__":
    print(configuration_reference(), end="")
