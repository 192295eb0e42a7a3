"""What should go wrong in the stand-in, by environment variables `STAND_IN_...`."""

from __future__ import annotations

import os
from pathlib import Path

_left: dict[str, int] = {}


def asked(name: str) -> str:
    """The value of a fault; empty: not asked for. With ONCE=FILE, faults happen only until one has made that file."""
    value = os.environ.get(f"STAND_IN_{name}", "")
    once = os.environ.get("STAND_IN_ONCE")
    if value and once:
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return ""
    return value


def times(name: str) -> bool:
    """Whether a fault that is asked for so many times happens now."""
    left = _left.setdefault(name, int(os.environ.get(f"STAND_IN_{name}") or 0))
    _left[name] = left - 1
    return left > 0


def setting(name: str, default: str) -> str:
    """What is no fault: VARIANT, FREE_GIB, STEP_SECONDS."""
    return os.environ.get(f"STAND_IN_{name}", default)


def note(line: str) -> None:
    """Tell the test what was loaded: a line in the file LOG."""
    if log := os.environ.get("STAND_IN_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{line}\n")
