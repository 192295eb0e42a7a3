"""The processes that belong to a stack, found by their environment (Linux), whichever process started them.

infra/stack.py ends them, infra/supervisor.py marks them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path

# variables of every process of a stack: the stack's folder; the name of the part that it is, or that started it
MEMBER, PART = "CAPTURE2MESH_STACK_MEMBER", "CAPTURE2MESH_STACK_PART"
STOP_SECONDS, POLL_SECONDS = 15, 0.2


def environments(folder: Path, part: str = "") -> Iterator[tuple[int, list[bytes]]]:
    """Id and environment of each process of a folder's stack, or of one part of it."""
    marks = {f"{MEMBER}={folder}".encode(), *([f"{PART}={part}".encode()] if part else [])}
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            environment = file.read_bytes().split(b"\0")
            if marks <= set(environment):
                yield int(file.parent.name), environment


def members(folder: Path, but: Container[int] = (), part: str = "") -> list[int]:
    """Ids of the processes of a folder's stack, or of one part of it.

    Processes of the sessions `but` are left out; each run has a session of its own.
    """
    found = []
    for pid, _ in environments(folder, part):
        with suppress(OSError):
            if os.getsid(pid) not in but:
                found.append(pid)
    return found


def runs_of(folder: Path, part: str = "") -> set[str]:
    """Ids of the flow runs that processes of a folder's stack are executing."""
    name = b"PREFECT__FLOW_RUN_ID="
    entries = [entry for _, environment in environments(folder, part) for entry in environment]
    return {entry.removeprefix(name).decode() for entry in entries if entry.startswith(name)}


def end(folder: Path, but: Container[int] = (), part: str = "") -> None:
    """End processes of a folder's stack, by force if need be; parameters as in `members`."""
    for number in signal.SIGTERM, signal.SIGKILL:
        for pid in members(folder, but, part):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while members(folder, but, part) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
