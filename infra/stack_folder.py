"""The folder of a stack: it is told from other folders, and one stack at a time uses it (infra/stack.py)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.supervisor import StackError

PID_FILE = "capture2mesh-stack.pid"  # locked while the stack runs; a folder that has it is a stack's


def check_folder(folder: Path) -> None:
    """Raise StackError if the folder holds something other than a stack."""
    if folder.exists() and not (folder / PID_FILE).exists() and any(folder.iterdir()):
        raise StackError(f"{folder}: holds something else than a stack; set CAPTURE2MESH_STACK_FOLDER to a new folder")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Within the block no other stack can use the folder; raises StackError if one runs there already."""
    pid_file = folder / PID_FILE
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with pid_file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"{folder}: its stack is running already; make stack-down stops it") from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
