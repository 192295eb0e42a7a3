"""Work that tests give to the processes of a batch. It imports little, because each process imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tasks.errors import CaptureRefused, Problem

PROBLEM = Problem(where="views/", what="has none", todo="add some")
NEVER = 600


def pid() -> int:
    return os.getpid()


def product(a: int, b: int) -> int:
    return a * b


def refuse() -> None:
    raise CaptureRefused("mug", [PROBLEM])


def die_once(marker: Path) -> str:
    """Ends its process as the kernel does when memory is short; the next time it works."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return "done"
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def poison(tries: Path) -> None:
    with tries.open("a") as stream:
        stream.write("tried\n")
    os.kill(os.getpid(), signal.SIGKILL)


def slowly(seconds: float, word: str) -> str:
    time.sleep(seconds)
    return word


def note_and_wait(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(NEVER)
