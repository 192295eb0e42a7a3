"""One inference per GPU, whoever asks: a slot of the server's global concurrency limit, beside the limits of pools."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.concurrency.sync import concurrency

from tasks.inference.registry import ENGINES, EngineChoice

LIMIT = "gpu"  # as many slots as there are GPUs; `make stack` makes it, and without it only pools and workers limit
LEASE_SECONDS = 60  # for so long a process that was killed still holds its slot; the least that Prefect takes

log = logging.getLogger(__name__)


@contextmanager
def gpu_slot(engine: EngineChoice) -> Iterator[None]:
    """Within the block the engine may use the GPU; waits for a slot where it needs one."""
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
        log.warning("the slot of %s could not be given back: %s; its lease ends by itself", LIMIT, error)
