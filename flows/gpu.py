"""A slot on a GPU: one inference at a time on each, whichever flow asks.

Slots are of a global concurrency limit of the Prefect server, beside the limits of pools and workers. The flows `infer`
and `batch` take them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.concurrency.sync import concurrency

from tasks.inference.registry import ENGINES, EngineChoice

LIMIT = "gpu"  # `make stack` creates it with as many slots as there are GPUs; without it, only pools and workers limit
LEASE_SECONDS = 60  # so long a process that was killed still holds its slot; Prefect takes no shorter time

log = logging.getLogger(__name__)


@contextmanager
def gpu_slot(engine: EngineChoice) -> Iterator[None]:
    """Within the block the engine may use the GPU; waits for a slot if it needs one."""
    if not ENGINES[engine.name].shares_model:
        yield
        return
    worked = False
    try:
        with concurrency(LIMIT, lease_duration=LEASE_SECONDS):
            yield
            worked = True
    except httpx.TransportError as error:
        if not worked:
            raise
        log.warning("the slot of %s could not be given back: %s; it is free when its lease ends", LIMIT, error)
