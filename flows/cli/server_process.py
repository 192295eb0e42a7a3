"""The process of Prefect's own server for one command: `python -m flows.cli.server_process SOCKET`.

flows/cli/own_server.py starts it. SOCKET is the number of a listening socket that the process inherits. The server ends
when its standard input is closed: a command that is killed runs no code of its own, but its pipe closes.

infra/prefect_server.py uses `collect_elsewhere` as well. On SQLite, Prefect 3.8.8 stands still for up to a minute now
and then. The reason: a statement that failed leaves its cursor in a reference cycle. The garbage collector needs the
lock of the cursor's connection, and another thread holds it while it waits (up to 60 s) for permission to write. If the
collector runs in the event loop, the transaction that blocks the other thread cannot end either.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from itertools import count

PAUSE_SECONDS = 1.0
ALL_EVERY = 60  # every 60th collection covers all objects, the others only the newer ones


def collect_elsewhere(pause: float = PAUSE_SECONDS) -> None:
    """Collect garbage only in a thread of its own from now on."""
    gc.disable()

    def collect() -> None:
        for number in count(1):
            time.sleep(pause)
            gc.collect(1 if number % ALL_EVERY else 2)

    threading.Thread(target=collect, name="garbage collector", daemon=True).start()


def end_with_standard_input() -> None:
    """End this process, as SIGTERM does, when nobody holds the other end of its standard input any more."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="standard input", daemon=True).start()


def serve(listening: socket.socket) -> None:
    """Run the server on a listening socket until this process is told to end."""
    import uvicorn

    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    end_with_standard_input()
    collect_elsewhere()
    serve(socket.socket(fileno=int(sys.argv[1])))
