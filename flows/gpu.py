"""Slots on GPUs: one inference at a time on each, whichever flow asks.

Slots are of a global concurrency limit of the Prefect server, beside the limits of pools and workers. The flows `infer`
and `batch` take them: an inference one, a batch one for each GPU that it sees.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency

from tasks.errors import EngineUnavailable
from tasks.inference.registry import ENGINES, EngineChoice

LIMIT = "gpu"  # `make stack` creates it with as many slots as there are GPUs; without it, only pools and workers limit
LEASE_SECONDS = 60  # so long a process that was killed still holds its slot; Prefect takes no shorter time

log = logging.getLogger(__name__)


@contextmanager
def gpu_slots(engine: EngineChoice, count: int = 1) -> Iterator[None]:
    """Within the block the engine may use so many GPUs; waits until that many slots are free at once, if it needs any.

    Raises EngineUnavailable if the limit has fewer slots.
    """
    if not ENGINES[engine.name].shares_model:
        yield
        return
    worked = False
    try:
        with concurrency(LIMIT, occupy=count, lease_duration=LEASE_SECONDS):
            yield
            worked = True
    except ConcurrencySlotAcquisitionError as error:
        if worked or count == 1:
            raise
        raise EngineUnavailable(
            f"the limit {LIMIT} of the Prefect server has fewer slots than this process sees GPUs ({count}): raise it"
            f" with `prefect global-concurrency-limit update {LIMIT}`, or name fewer GPUs in CUDA_VISIBLE_DEVICES"
        ) from error
    except httpx.TransportError as error:
        if not worked:
            raise
        log.warning("the slot of %s could not be given back: %s; it is free when its lease ends", LIMIT, error)
