"""fetch_weights: the pinned bundle is on the machine that infers; after it, the network may be off."""

from __future__ import annotations

from typing import Any, cast

from prefect import task
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.errors import InputError, StorageUnavailable
from tasks.progress import in_flow, progress_artifact, timed
from tasks.settings import settings
from tasks.stage import UNCACHED, retried
from tasks.weights.local import fetch, find
from tasks.weights.pins import Bundle, Weights, bundle

FETCH_RETRIES = 3


def fetch_weights(wanted: Weights) -> Weights:
    """Run as a task of the current flow run, plainly outside of one; raises InputError where this machine's list
    declares other weights."""
    with timed("fetch_weights") as hit:
        found = _fetch_weights(wanted, return_state=True) if in_flow() else _fetch_weights.fn(wanted)
        if isinstance(found, State):
            if found.name == "Cached":
                hit()
            found = found.result()
    return cast(Weights, found)


@task(
    name="fetch_weights",
    task_run_name="fetch_weights",
    **UNCACHED,
    **retried(FETCH_RETRIES, StorageUnavailable),
)
def _fetch_weights(wanted: Weights) -> Any:
    """Download what is missing of the pinned bundle, verified; shows its progress."""
    declared = _declared_here(wanted)
    if find(declared) is not None:
        return Completed(name="Cached", message="found on this machine", data=wanted)
    with progress_artifact("fetch_weights") as progress:
        fetch(declared, progress)
    return wanted


def _declared_here(wanted: Weights) -> Bundle:
    for masks in (False, True):
        if (declared := bundle(masks)).digest == wanted.bundle:
            return declared
    raise InputError(
        f"weights: bundle {wanted.bundle[:12]} is asked for, and {settings().weights_list} declares others; the"
        " machines that hand work over and those that infer need the same list"
    )
