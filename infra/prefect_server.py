"""Prefect's server with garbage collected beside its event loop: `python -m infra.prefect_server server start ...`.

On SQLite the server stands still for a minute otherwise, now and then (seen with Prefect 3.8.8). A statement that
failed leaves its cursor in a reference cycle. To collect it, its connection is locked, which another thread has locked
for as long as it waits for the lock to write: up to 60 s. If it is the event loop that collects, then the
transaction that has the lock cannot end, and all wait until that time is over.
"""

from __future__ import annotations

import gc
import runpy
import threading
import time
from itertools import count

PAUSE_SECONDS = 1.0
ALL_EVERY = 60  # collections; those between leave out what is old


def collect_elsewhere(pause: float = PAUSE_SECONDS) -> None:
    """From now on only a thread of its own collects garbage."""
    gc.disable()

    def collect() -> None:
        for number in count(1):
            time.sleep(pause)
            gc.collect(1 if number % ALL_EVERY else 2)

    threading.Thread(target=collect, name="garbage collector", daemon=True).start()


if __name__ == "__main__":
    collect_elsewhere()
    runpy.run_module("prefect", run_name="__main__")
