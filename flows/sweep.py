"""The flow `sweep`: submits the complete uploads of a bucket that are not published yet, notified or not.

A schedule runs it every minute; `capture2mesh sweep` runs it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_table_artifact

from flows.uploads.submit import Submission, Submitter
from tasks.artifacts import artifact_key
from tasks.capture.completeness import StorageState
from tasks.capture.listing import Listing, list_captures
from tasks.errors import ServerUnavailable
from tasks.settings import EngineName, Parameters, settings
from tasks.store.location import Location

PARALLEL = 16
TOO_LONG = timedelta(hours=1)  # an upload that is incomplete for longer is shown
ROWS_SHOWN = 500  # the table lies in Prefect's database


def _run_name() -> str:
    return runtime.flow_run.parameters["watched"] or settings().watched or "nothing"


@flow(name="sweep", flow_run_name=_run_name)
def sweep(
    watched: str = "", output: str = "", engine: EngineName = "auto", parameters: Parameters = Parameters()
) -> dict[str, int]:
    """Submit the uploads that are complete and not published; gives the number of captures in each state.

    Args:
        watched: Folder or URL above the captures; empty: CAPTURE2MESH_WATCHED of the worker
        output: Folder or URL below which the assets are published; empty: CAPTURE2MESH_OUTPUT of the worker
        engine: auto takes the setting of the deployment infer/cuda
        parameters: Parameters of the results; notifications use the defaults
    """
    watched, output = watched or settings().watched, output or settings().output
    if not watched:
        get_run_logger().warning("nothing is watched: set CAPTURE2MESH_WATCHED and CAPTURE2MESH_OUTPUT of the workers")
        return {}
    submitter = Submitter(watched, output, engine, parameters, root=_root(watched))
    # in this order, an upload that ends or begins meanwhile is seen as not complete yet
    state = StorageState.of(submitter.watched)
    listings = _listings(submitter)
    submissions = submit_all(submitter, listings, state)
    _show(submitter.watched.name, submissions, state.now)
    return dict(Counter(each.state for each in submissions))


def submit_all(submitter: Submitter, listings: Sequence[Listing], state: StorageState) -> list[Submission]:
    """Submit each of these captures, unless it is submitted already or there is nothing to do."""
    if not listings:
        return []
    runs = submitter.unended()
    submitted = {str(run.idempotency_key).rpartition("/")[0] for run in runs}
    at_work = {run.parameters.get("capture") for run in runs}

    def one(listing: Listing) -> Submission:
        try:
            if submitter.upload(listing).key in submitted:
                return Submission(id=listing.id, uri=listing.uri, state="submitted", uploaded_at=listing.uploaded_at)
            found = submitter.submit_listed(listing, state)
        except ServerUnavailable as error:  # the other captures need not wait for the next sweep
            found = Submission(id=listing.id, uri=listing.uri, state="waiting", reason=str(error))
        return found.model_copy(update={"changed": listing.uri in at_work and found.state != "published"})

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, listings))


def _root(watched: str) -> str:
    """The root that ids are relative to: all that is watched, if only a part of it is swept."""
    whole = settings().watched
    below = whole and f"{Location.of(watched).url}/".startswith(f"{Location.of(whole).url}/")
    return whole if below else watched


def _listings(submitter: Submitter) -> list[Listing]:
    """The captures in the folder that is swept, with ids relative to the root."""
    part = submitter.watched.url[len(submitter.root.url) + 1 :]
    found = list_captures(submitter.watched.url)
    if not part:
        return found
    return [each.model_copy(update={"id": each.uri[len(submitter.root.url) + 1 :]}) for each in found]


def _show(watched: str, submissions: Sequence[Submission], now: datetime) -> None:
    """An artifact with a table of the captures that a person may want to look at."""
    rows = [
        {
            "capture": each.id,
            "state": f"{each.state}, was changed while a run is at work" if each.changed else each.state,
            "since": f"{each.uploaded_at:%Y-%m-%d %H:%M:%S}" if each.uploaded_at else "",
            "reason": each.reason,
        }
        for each in submissions
        if each.state != "published" and not (each.state == "incomplete" and not _too_long(each, now))
    ]
    if rows:
        create_table_artifact(
            rows[:ROWS_SHOWN],
            key=artifact_key("sweep", watched),
            description=f"{len(rows)} of {len(submissions)} captures are not published"
            + (f"; the first {ROWS_SHOWN}" if len(rows) > ROWS_SHOWN else ""),
        )


def _too_long(submission: Submission, now: datetime) -> bool:
    return submission.uploaded_at is not None and now - submission.uploaded_at > TOO_LONG
