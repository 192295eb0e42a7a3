"""The step fetch_weights: the pinned bundle is on the machine that infers; after it, the network may be off.

Called by the flows `infer` and `batch`, and only where there is something to infer.
"""

from __future__ import annotations

from tasks.errors import InputError, StorageUnavailable
from tasks.progress import progress_artifact
from tasks.settings import settings
from tasks.stage import retried, step
from tasks.weights.local import fetch, find
from tasks.weights.pins import Bundle, Weights, bundle

FETCH_RETRIES = 3


def _found_here(wanted: Weights) -> Weights | None:
    return None if find(_declared_here(wanted)) is None else wanted


@step(found=_found_here, **retried(FETCH_RETRIES, StorageUnavailable))
def fetch_weights(wanted: Weights) -> Weights:
    """Download what is missing of the pinned bundle, verified; shows its progress.

    Raises InputError if this machine's list declares other weights.
    """
    with progress_artifact("fetch_weights") as progress:
        fetch(_declared_here(wanted), progress)
    return wanted


def _declared_here(wanted: Weights) -> Bundle:
    """The bundle of this machine, if it has the wanted digest."""
    declared = bundle()
    declared.refuse_unpinned()
    if declared.digest != wanted.bundle:
        raise InputError(
            f"weights: bundle {wanted.bundle[:12]} is asked for, and the list and lock of this machine declare"
            f" {declared.digest[:12]}; the machines that hand work over and those that infer need the same list"
            f" ({settings().weights_list}) and lock ({settings().weights_lock})"
        )
    return declared
