"""fetch_weights: the pinned bundle is on the machine that infers; after it, the network may be off."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict

from tasks.errors import StorageUnavailable
from tasks.report import progress_artifact
from tasks.stage import UNCACHED, retried, timed
from tasks.weights.local import fetch, find
from tasks.weights.pins import Bundle, bundle

FETCH_RETRIES = 3


class Weights(BaseModel):
    """Which weights: the digest of the pin list and the revisions in it. Where they lie is each machine's affair."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    revisions: dict[str, str]

    @staticmethod
    def of(bundle: Bundle) -> Weights:
        """Known before any download."""
        return Weights(bundle=bundle.digest, revisions={source.repository: source.pin for source in bundle.sources})


def fetch_weights(masks: bool = False) -> Weights:
    """Run as a task of the current flow run; `masks` adds the network that makes them."""
    with timed("fetch_weights") as hit:
        state: State[Weights] = _fetch_weights(masks, return_state=True)
        if state.name == "Cached":
            hit()
        result = state.result()
    return result


@task(
    name="fetch_weights",
    task_run_name="fetch_weights",
    **UNCACHED,
    **retried(FETCH_RETRIES, StorageUnavailable),
)
def _fetch_weights(masks: bool) -> Any:
    """Download what is missing of the pinned bundle, verified; shows its progress."""
    wanted = bundle(masks)
    weights = Weights.of(wanted)
    if find(wanted) is not None:
        return Completed(name="Cached", message="found on this machine", data=weights)
    with progress_artifact("fetch_weights") as progress:
        fetch(wanted, progress)
    return weights
