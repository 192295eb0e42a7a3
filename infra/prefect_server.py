"""Prefect's server with a garbage collector of its own: `python -m infra.prefect_server server start ...`.

infra/stack.py uses it instead of `prefect`. On SQLite, Prefect 3.8.8 stands still for up to a
minute now and then. The reason: a statement that failed leaves its cursor in a reference cycle. The garbage collector
needs the lock of the cursor's connection, and another thread holds it while it waits (up to 60 s) for permission to
write. If the collector runs in the event loop, the transaction that blocks the other thread cannot end either.
"""

from __future__ import annotations

import gc
import runpy
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


if __name__ == "__main__":
    collect_elsewhere()
    runpy.run_module("prefect", run_name="__main__")
