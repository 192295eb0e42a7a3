"""The reference of all settings, made from their definitions: `python -m infra.settings_reference > infra/settings.md`.

Run it after a change in `tasks/settings.py` or of `infra.stack.StackSettings`; `tests/unit/test_docs.py` fails when
`infra/settings.md` is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from infra.stack import StackSettings
from tasks.settings import Parameters, Settings

INTRODUCTION = """\
# All settings

This page is made from the code by `python -m infra.settings_reference > infra/settings.md`; do not edit it by hand.

- **Parameters** change the result. On the command line: `--set NAME=VALUE`, as often as needed; in the Prefect UI: the
  form of the run; from Python: `tasks.settings.Parameters`.
- **Environment variables** say where and how a process works. An empty variable counts as not set.
"""
# Their defaults depend on the machine
WORDS = {
    "CAPTURE2MESH_STORE": "`store` in the user's cache folder for `capture2mesh`",
    "CAPTURE2MESH_SCRATCH": "`scratch` in the same folder",
    "CAPTURE2MESH_WEIGHTS": "`weights` in the same folder",
    "CAPTURE2MESH_WEIGHTS_LIST": "`tasks/weights/weights.json`",
    "CAPTURE2MESH_WEIGHTS_LOCK": "`infra/weights.lock.json`",
    "CAPTURE2MESH_TRELLIS_PYTHON": "the Python that runs",
    "CAPTURE2MESH_BATCH_PROCESSES": "number of cores",
    "CAPTURE2MESH_STACK_FOLDER": "`stack` in the user's data folder for `capture2mesh`",
    "CAPTURE2MESH_STACK_CPU_RUNS": "half the number of cores, 2 or more",
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def reference() -> str:
    """The page as Markdown text."""
    parts = [INTRODUCTION, "## Parameters\n", *_parameter_tables("", Parameters)]
    parts += ["## Environment variables\n", *_environment_table(Settings)]
    parts += ["## Environment variables of `make stack`\n", *_environment_table(StackSettings)]
    return "\n".join(parts)


def _parameter_tables(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """The values of a group, then a heading, the docstring and the values of each group in it."""
    groups = {name: group for name, field in model.model_fields.items() if (group := _group(field)) is not None}
    values = {f"{prefix}{name}": field for name, field in model.model_fields.items() if name not in groups}
    if values:
        yield _table("parameter", {name: (field, _text(field.default)) for name, field in values.items()})
    for name, group in groups.items():
        yield f"### `{prefix}{name}`\n\n{group.__doc__}\n"
        yield from _parameter_tables(f"{prefix}{name}.", group)


def _environment_table(model: type[BaseSettings]) -> Iterator[str]:
    yield f"{model.__doc__}\n"
    named = {f"{model.model_config['env_prefix']}{name.upper()}": field for name, field in model.model_fields.items()}
    yield _table("variable", {name: (field, WORDS.get(name) or _text(field.default)) for name, field in named.items()})


def _table(kind: str, rows: dict[str, tuple[FieldInfo, str]]) -> str:
    lines = [
        f"| `{name}` | {default} | {_allowed(field)} | {_meaning(field)} |" for name, (field, default) in rows.items()
    ]
    return "\n".join([f"| {kind} | default | allowed | meaning |", "|---|---|---|---|", *lines, ""])


def _group(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds; None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _meaning(field: FieldInfo) -> str:
    return " ".join(f"{part.rstrip('.')}." for part in (field.title, field.description) if part)


def _text(default: Any) -> str:
    """A default as it is written on the command line or in a variable."""
    match default:
        case None:
            return "none"
        case "":
            return "empty"
        case bool():
            return f"`{int(default)}`"
        case float():
            return f"`{default:g}`"
        case tuple():
            return f"`{','.join(default)}`"
        case _:
            return f"`{default}`"


def _allowed(field: FieldInfo) -> str:
    """The choices of a value, else its bounds."""
    if choices := list(_choices(field.annotation)):
        return ", ".join(f"`{choice}`" for choice in choices)
    limits = [(BOUNDS[name], getattr(each, name)) for each in field.metadata for name in BOUNDS if hasattr(each, name)]
    return ", ".join(f"{sign} {limit}" for sign, limit in limits)


def _choices(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from (0, 1)
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)


if __name__ == "__main__":
    sys.stdout.write(reference())
