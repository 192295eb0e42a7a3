"""Conventions of all commands: exit codes, errors on stderr, tables, the option `--set`, Prefect's defaults."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tasks.settings import Parameters

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
PLAIN_WIDTH = 140
"""Columns of a table that is not shown on a terminal."""

# Prefect's own console log would say everything twice; a configured server gets the log all the same
PREFECT_DEFAULTS = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

# typer reads the annotations of commands: types that it has to know are spelled out, without importing tasks.settings
EngineOption = Annotated[
    Literal["auto", "fusion", "trellis"], typer.Option("--engine", help="The engine that makes the geometry.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, e.g. export.texture_px=2048.")
]


def use_prefect_defaults() -> None:
    """Set PREFECT_DEFAULTS for this process, except variables that are set already."""
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def errors_told() -> Iterator[None]:
    """Within the block, an error of this project becomes a message on stderr and an exit code."""
    from tasks.errors import Capture2MeshError, InputError

    try:
        yield
    except Capture2MeshError as error:
        tell_error(error)
        raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED) from None


def tell_error(error: object) -> None:
    """Print an error to stderr."""
    typer.echo(f"error: {error}", err=True)


def print_table(table: Table) -> None:
    """Print a table to stdout, as wide as the terminal or PLAIN_WIDTH."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def parameters_of(assignments: Sequence[str]) -> Parameters:
    """The parameters of `--set` options such as `export.faces=5000`; raises InputError with every wrong value."""
    from pydantic import ValidationError

    from tasks.errors import InputError
    from tasks.settings import Parameters

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: write NAME=VALUE, for example export.texture_px=2048")
        *groups, leaf = name.split(".")
        group = values
        for part in groups:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise InputError(f"--set {assignment}: {part} is a value already")
        group[leaf] = _value(text)
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        reasons = "\n".join(f"  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"--set has wrong values:\n{reasons}") from error


def _value(text: str) -> Any:
    """A value of `--set`: JSON if it is valid JSON, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
