"""The faults that a test asks the stand-in for, by environment variables `STAND_IN_...`."""

from __future__ import annotations

import os
from pathlib import Path


def asked(name: str) -> str:
    """Return a fault's value; empty: not asked for. With ONCE=FILE only the first fault happens: it makes the file."""
    value = os.environ.get(f"STAND_IN_{name}", "")
    once = os.environ.get("STAND_IN_ONCE")
    if value and once:
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return ""
    return value


def setting(name: str, default: str) -> str:
    """Return a setting that is not a fault: VARIANT, FREE_GIB or STEP_SECONDS."""
    return os.environ.get(f"STAND_IN_{name}", default)


def note(line: str) -> None:
    """Tell the test what has happened: a line in the file LOG."""
    if log := os.environ.get("STAND_IN_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{line}\n")
