"""From an upload to a run, exactly once. The receiver, the poller and the sweep call it.

Their calls are only hints: the bucket says what is there. Prefect starts one run for an idempotency key,
`<upload key>/<attempt>`, however often it is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, ConfigDict

from flows.infer import engine_set_in
from tasks.capture.completeness import StorageState, awaited
from tasks.capture.layout import is_id
from tasks.capture.listing import Listing, list_capture
from tasks.dataset.upload import Upload
from tasks.errors import Capture2MeshError, InferenceInterrupted, InputError, ServerUnavailable
from tasks.inference.registry import ENGINES, EngineChoice, resolve_engine
from tasks.settings import EngineName, Parameters, settings
from tasks.store.claims import Claims, Failure
from tasks.store.location import Location

SINGLE, BATCH, INFER = "reconstruct/default", "batch/cuda", "infer/cuda"
QUEUE = "default"  # after the runs that a person waits for
DEPLOYMENT_SECONDS = 10.0  # a deployment is read again after this time
NEIGHBOURS = 64  # attempts before and after one that are looked up together
PAGE = 200
CREATIONS_AT_ONCE = 3  # with more, SQLite only answers that it is busy
AHEAD = (StateType.SCHEDULED, StateType.PENDING)
UNENDED = (*AHEAD, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)


SubmissionState = Literal["published", "submitted", "incomplete", "waiting", "quarantined", "gone"]
"""State of an upload after a hint.

published: its asset is there. submitted: a run is scheduled or at work. incomplete: files are missing. waiting: it has
failed, and is tried again later. quarantined: it has failed, and is not tried again until its content changes or a
person asks. gone: there is no capture.
"""


class Submission(BaseModel):
    """The answer to a hint."""

    model_config = ConfigDict(frozen=True)

    id: str
    """The capture's id."""
    uri: str
    """Folder or URL of the capture."""
    state: SubmissionState
    reason: str = ""
    """Why it is not submitted; empty if it is, or is published."""
    changed: bool = False
    """A run of the capture's older content is still at work."""
    uploaded_at: datetime | None = None
    """When its newest file was written; None if there is no capture."""


class Submitter:
    """Submits what is uploaded below `watched`. A capture's id is its path below `root`."""

    def __init__(
        self,
        watched: str,
        output: str,
        engine: EngineName = "auto",
        parameters: Parameters = Parameters(),
        root: str = "",
    ) -> None:
        if not (watched and output):
            raise InputError(
                "set CAPTURE2MESH_WATCHED (what is uploaded to) and CAPTURE2MESH_OUTPUT (where the assets go)"
            )
        require_server()
        self.watched, self.output = Location.of(watched), Location.of(output)
        self.root = Location.of(root or watched)
        self.parameters = parameters
        self._asked = engine
        self._client = get_client(sync_client=True)
        self._creating = threading.Semaphore(CREATIONS_AT_ONCE)
        self._known: dict[str, tuple[float, DeploymentResponse]] = {}

    def submit(self, capture_url: str) -> Submission:
        """Submit a capture if there is something to do; raises ServerUnavailable if Prefect does not answer."""
        location = Location.of(capture_url)
        state = StorageState.of(location)
        try:
            listing = list_capture(capture_url, self.root.url)
        except InputError as error:
            return Submission(id=location.name, uri=capture_url, state="gone", reason=str(error))
        return self.submit_listed(listing, state)

    def submit_listed(self, listing: Listing, state: StorageState) -> Submission:
        """Submit a capture that was listed after `state` was read."""
        if not is_id(listing.id):
            return _submission(listing, "quarantined", "its path cannot be the name of an asset; rename the folder")
        upload = self.upload(listing)
        if upload.published() is not None:
            return _submission(listing, "published")
        missing = awaited(listing, state, settings().quiet_seconds, ENGINES[self.engine().name].needs.min_views)
        if missing is not None:
            return _submission(listing, "incomplete", f"awaits {missing}")
        return self._next_attempt(listing, upload)

    def upload(self, listing: Listing) -> Upload:
        """The upload that a run of this capture would be for."""
        return Upload.of(listing, self.output.url, self.engine().name, self.parameters)

    def unended(self) -> list[FlowRun]:
        """The runs of uploads that are scheduled or at work."""
        found: list[FlowRun] = []
        with _server_errors():
            while True:
                page = self._client.read_flow_runs(
                    deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[self._deployment().id])),
                    flow_run_filter=_in_state(*UNENDED),
                    limit=PAGE,
                    offset=len(found),
                )
                found += page
                if len(page) < PAGE:
                    return found

    def engine(self) -> EngineChoice:
        """The engine of the runs: the one asked for, or for `auto` the setting of the deployment that infers."""
        if self._asked != "auto":
            return resolve_engine(self._asked)
        name = settings().infer_deployment or INFER
        return engine_set_in(name, self._read(name))

    def _next_attempt(self, listing: Listing, upload: Upload) -> Submission:
        """Make sure that there is a run for an upload that is not published, unless it has failed too often."""
        failure = upload.failure()
        attempt = failure.attempts + 1 if failure else 1
        while True:
            lapsed = failure is not None and _lapsed(failure, listing)
            if failure is not None and not lapsed and (failure.final or datetime.now(UTC) < failure.retry_at):
                return _submission(listing, "quarantined" if failure.final else "waiting", failure.reason)
            run = self._run(listing, upload, attempt)
            if run is None or not _ended(run):
                return _submission(listing, "submitted")
            runs = self._runs(upload, attempt)
            if not _ended(runs[max(runs)]):
                return _submission(listing, "submitted")
            # asked after the runs: they publish before they end
            if upload.published() is not None:
                return _submission(listing, "published")
            if not self._noted(runs, upload):
                return _submission(listing, "submitted")  # another process records it now, and submits the next run
            failure, attempt = upload.failure(), max(runs) + 1

    def _runs(self, upload: Upload, attempt: int) -> dict[int, FlowRun]:
        """The runs of an upload by attempt, those around `attempt`."""
        around = range(max(1, attempt - NEIGHBOURS), attempt + NEIGHBOURS)
        attempts = {_idempotency_key(upload, number): number for number in around}
        wanted = FlowRunFilterIdempotencyKey(any_=list(attempts))
        with _server_errors():
            found = self._client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=wanted), limit=PAGE)
        return {attempts[str(run.idempotency_key)]: run for run in found}

    def _noted(self, runs: dict[int, FlowRun], upload: Upload) -> bool:
        """Return whether the store has a record of the failed runs of an upload; one process writes it.

        A run that was killed could not record its failure itself. A run that completed has published content that was
        replaced afterwards, and is here again.
        """
        failed = 0
        for attempt in sorted(runs):
            failed = 0 if runs[attempt].state_type == StateType.COMPLETED else failed + 1
        with Claims() as claims, upload.claimed(claims) as mine:
            failure = upload.failure()
            if failed > (failure.attempts if failure else 0):
                if mine:
                    upload.record(_why(runs[max(runs)]))
                return mine
        return True

    def _run(self, listing: Listing, upload: Upload, attempt: int) -> FlowRun | None:
        """The run of an attempt, new or not; None if a batch that waits will take the capture."""
        common: dict[str, Any] = {"output": self.output.url, "engine": self.engine().name}
        common["parameters"] = self.parameters.model_dump(mode="json")
        if self._in_batches:
            if self._batch_waits():
                return None
            asked = {"dataset": self.root.url, "uploads": True, **common}
        else:
            asked = {"capture": upload.uri, "root": self.root.url, "upload": upload.key, **common}
        key = _idempotency_key(upload, attempt)
        with self._creating, _server_errors():
            run = self._client.create_flow_run_from_deployment(
                self._deployment().id, parameters=asked, idempotency_key=key, work_queue_name=QUEUE
            )
        emit_event(
            "capture.uploaded",
            resource={"prefect.resource.id": f"capture2mesh.capture.{upload.id}", "prefect.resource.name": upload.id},
            payload={"capture": upload.uri, "uploaded_at": listing.uploaded_at.isoformat()},
            id=uuid5(NAMESPACE_URL, key),
        )
        return run

    @property
    def _in_batches(self) -> bool:
        """True if one run takes all captures that are there: loading the model takes longer than an inference."""
        return ENGINES[self.engine().name].shares_model

    def _batch_waits(self) -> bool:
        """True if a batch is scheduled that will see the capture: it has not begun yet."""
        with _server_errors():
            runs = self._client.read_flow_runs(
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[self._deployment().id])),
                flow_run_filter=_in_state(*AHEAD),
                limit=PAGE,
            )
        return any(run.parameters.get("dataset") == self.root.url for run in runs)

    def _deployment(self) -> DeploymentResponse:
        """The deployment of the runs."""
        return self._read(BATCH if self._in_batches else SINGLE)

    def _read(self, name: str) -> DeploymentResponse:
        """A deployment, as it was within the last DEPLOYMENT_SECONDS."""
        known = self._known.get(name)
        if known is None or time.monotonic() > known[0]:
            with _server_errors():
                try:
                    known = time.monotonic() + DEPLOYMENT_SECONDS, self._client.read_deployment_by_name(name)
                except ObjectNotFound as error:
                    raise InputError(f"deployment {name}: not on this server; deploy it (prefect deploy)") from error
            self._known[name] = known
        return known[1]


def require_server() -> None:
    """Raise InputError if no server is set: Prefect would start one that has no workers."""
    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set: runs are submitted to a server that has workers")


def submitter() -> Submitter:
    """The submitter for CAPTURE2MESH_WATCHED and CAPTURE2MESH_OUTPUT."""
    return Submitter(settings().watched, settings().output)


def _idempotency_key(upload: Upload, attempt: int) -> str:
    """Prefect's key of a run: it starts one run for it."""
    return f"{upload.key}/{attempt}"


def _submission(listing: Listing, state: SubmissionState, reason: str = "") -> Submission:
    return Submission(id=listing.id, uri=listing.uri, state=state, reason=reason, uploaded_at=listing.uploaded_at)


def _lapsed(failure: Failure, listing: Listing) -> bool:
    """Return whether a capture was refused before the content that its manifest declares was there.

    The upload key holds the declared content: it stays when that replaces other files of the same size.
    """
    return failure.kind == "refused" and listing.manifest is not None and listing.uploaded_at > failure.at


def _ended(run: FlowRun) -> bool:
    """True if the run has a final state."""
    return run.state is not None and run.state.is_final()


def _why(run: FlowRun) -> Capture2MeshError:
    """The error of a run that ended without recording one.

    A run that was killed may have been killed by its capture: that counts against the capture. A run that failed has
    not begun with it, or it would have recorded why: that does not count.
    """
    kind = Capture2MeshError if run.state is not None and run.state.is_failed() else InferenceInterrupted
    return kind(f"run {run.name} ended {run.state_name}: {run.state.message if run.state else ''}")


def _in_state(*types: StateType) -> FlowRunFilter:
    """A filter for runs in one of these states."""
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))))


@contextmanager
def _server_errors() -> Iterator[None]:
    """Turn errors of Prefect's API into errors of this project; its client has tried again if the server was busy."""
    server = PREFECT_API_URL.value()
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.is_server_error or error.response.status_code in (408, 429):
            raise ServerUnavailable(f"{server}: {error}; look at the server's log") from error
        raise InputError(f"{server}: {error}; check PREFECT_API_AUTH_STRING and the deployments") from error
    except httpx.TransportError as error:
        raise ServerUnavailable(f"{server}: {error}; start the server, or check PREFECT_API_URL") from error
