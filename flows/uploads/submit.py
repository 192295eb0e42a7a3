"""From an upload to a run, once: what the receiver, the poller and the sweep call. They only hint; the bucket is asked.

Prefect starts one run for an idempotency key, `<upload key>/<attempt>`, however often and by whomever it is asked.
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

from tasks.capture.completeness import StorageState, awaited
from tasks.capture.layout import is_id
from tasks.capture.listing import Listing, list_capture, upload_key
from tasks.errors import Capture2MeshError, InferenceInterrupted, InputError, ServerUnavailable
from tasks.inference.registry import ENGINES, EngineChoice
from tasks.mesh.publish import published_folder
from tasks.settings import EngineName, Parameters, settings
from tasks.store.claims import Claims, Failure, failure_of, record_failure
from tasks.store.location import Location

SINGLE, BATCH, INFER = "reconstruct/default", "batch/cuda", "infer/cuda"
QUEUE = "default"  # behind what a person waits for
DEPLOYMENT_SECONDS = 10.0  # that what is known of a deployment is kept
NEIGHBOURS = 64  # of an attempt, looked up at once
PAGE = 200
CREATIONS_AT_ONCE = 3  # more only make SQLite answer that it is busy
AHEAD = (StateType.SCHEDULED, StateType.PENDING)
UNENDED = (*AHEAD, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)


class Submission(BaseModel):
    """What became of a hint.

    submitted: a run is to come or at work; so is one of older content where `changed`. waiting: it has failed and is
    tried again later. quarantined: it is not, until its content changes or a person asks. gone: there is no capture.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    uri: str
    state: Literal["published", "submitted", "incomplete", "waiting", "quarantined", "gone"]
    reason: str = ""
    changed: bool = False
    uploaded_at: datetime | None = None


class Submitter:
    """Submits what is uploaded below `watched`. Captures have their path below `root` as their id."""

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
                "where uploads come from and where assets go is not set: CAPTURE2MESH_WATCHED, CAPTURE2MESH_OUTPUT"
            )
        require_server()
        self.watched, self.output = Location.of(watched), Location.of(output)
        self.root = Location.of(root or watched)
        self.parameters = parameters
        self._asked = engine
        self._client = get_client(sync_client=True)
        self._creating = threading.Semaphore(CREATIONS_AT_ONCE)
        self._known: dict[str, tuple[float, DeploymentResponse]] = {}

    def submit(self, capture: str) -> Submission:
        """Submit a capture if there is something to do; raises ServerUnavailable where it could not be."""
        location = Location.of(capture)
        state = StorageState.of(location)
        try:
            listing = list_capture(capture, self.root.url)
        except InputError as error:
            return Submission(id=location.name, uri=capture, state="gone", reason=str(error))
        return self.submit_listed(listing, state)

    def submit_listed(self, listing: Listing, state: StorageState) -> Submission:
        """The same for a capture that has been listed since `state` was asked for."""
        if not is_id(listing.id):
            return _submission(listing, "quarantined", "its path can name no asset; rename the folder")
        engine = self.engine()
        key = upload_key(listing, engine.name, self.parameters)
        if self._is_published(listing, key):
            return _submission(listing, "published")
        missing = awaited(listing, state, settings().quiet_seconds, ENGINES[engine.name].needs.min_views)
        if missing is not None:
            return _submission(listing, "incomplete", f"awaits {missing}")
        return self._next_attempt(listing, key)

    def unended(self) -> list[FlowRun]:
        """The runs of uploads that are to come or at work."""
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
        """The engine that runs without one use: the setting of the deployment that infers."""
        name = self._asked
        if name == "auto":
            name = self._read(settings().infer_deployment or INFER).parameters.get("engine", "auto")
        if name not in ENGINES:
            raise InputError(f"engine {name}: set one of {', '.join(ENGINES)} in deployment {INFER}")
        return EngineChoice(name=name, version=ENGINES[name].version, reason=f"the setting of deployment {INFER}")

    def _next_attempt(self, listing: Listing, key: str) -> Submission:
        failure = failure_of(self.output.url, key)
        attempt = failure.attempts + 1 if failure else 1
        while True:
            lapsed = failure is not None and _lapsed(failure, listing)
            if failure is not None and not lapsed and (failure.final or datetime.now(UTC) < failure.retry_at):
                return _submission(listing, "quarantined" if failure.final else "waiting", failure.reason)
            run = self._run(listing, f"{key}/{attempt}")
            if run is None or not _ended(run):
                return _submission(listing, "submitted")
            runs = self._runs(key, attempt)
            if not _ended(runs[max(runs)]):
                return _submission(listing, "submitted")
            # asked after the runs: they publish before they end
            if self._is_published(listing, key):
                return _submission(listing, "published")
            if not self._noted(runs, listing, key):
                return _submission(listing, "submitted")  # another process notes it now, and goes on from there
            failure, attempt = failure_of(self.output.url, key), max(runs) + 1

    def _runs(self, key: str, attempt: int) -> dict[int, FlowRun]:
        """The runs of an upload by attempt, those around `attempt`."""
        keys = {f"{key}/{number}": number for number in range(max(1, attempt - NEIGHBOURS), attempt + NEIGHBOURS)}
        with _server_errors():
            found = self._client.read_flow_runs(
                flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(keys))), limit=PAGE
            )
        return {keys[str(run.idempotency_key)]: run for run in found}

    def _noted(self, runs: dict[int, FlowRun], listing: Listing, key: str) -> bool:
        """Whether it is on record that the runs of an upload have ended without its asset; one process records it.

        A run that was killed could not say so itself. One that completed has published content that has been replaced
        since, and is here again.
        """
        failed = 0
        for attempt in sorted(runs):
            failed = 0 if runs[attempt].state_type == StateType.COMPLETED else failed + 1
        with Claims() as claims, claims.claimed(self.output.url, key) as mine:
            failure = failure_of(self.output.url, key)
            if failed > (failure.attempts if failure else 0):
                if mine:
                    record_failure(self.output.url, key, listing.uri, _why(runs[max(runs)]))
                return mine
        return True

    def _run(self, listing: Listing, key: str) -> FlowRun | None:
        """The run of an idempotency key, new or not; None where a batch that waits will take the capture."""
        common: dict[str, Any] = {"output": self.output.url, "engine": self.engine().name}
        common["parameters"] = self.parameters.model_dump(mode="json")
        if self._in_batches:
            if self._batch_waits():
                return None
            asked = {"dataset": self.root.url, "uploads": True, **common}
        else:
            asked = {"capture": listing.uri, "root": self.root.url, "upload": key.rpartition("/")[0], **common}
        with self._creating, _server_errors():
            run = self._client.create_flow_run_from_deployment(
                self._deployment().id, parameters=asked, idempotency_key=key, work_queue_name=QUEUE
            )
        emit_event(
            "capture.uploaded",
            resource={"prefect.resource.id": f"capture2mesh.capture.{listing.id}", "prefect.resource.name": listing.id},
            payload={"capture": listing.uri, "uploaded_at": listing.uploaded_at.isoformat()},
            id=uuid5(NAMESPACE_URL, key),
        )
        return run

    @property
    def _in_batches(self) -> bool:
        """Loading the model of TRELLIS costs more than an inference: one run takes all that is there."""
        return ENGINES[self.engine().name].shares_model

    def _batch_waits(self) -> bool:
        with _server_errors():
            runs = self._client.read_flow_runs(
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[self._deployment().id])),
                flow_run_filter=_in_state(*AHEAD),
                limit=PAGE,
            )
        return any(run.parameters.get("dataset") == self.root.url for run in runs)

    def _is_published(self, listing: Listing, key: str) -> bool:
        return published_folder(self.output.url, listing.id, key) is not None

    def _deployment(self) -> DeploymentResponse:
        return self._read(BATCH if self._in_batches else SINGLE)

    def _read(self, name: str) -> DeploymentResponse:
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
    """Raise InputError where no server is set: Prefect would start one that has no workers."""
    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set: runs are submitted to a server that has workers")


def submitter() -> Submitter:
    """For what is uploaded where the settings say."""
    return Submitter(settings().watched, settings().output)


def _submission(listing: Listing, state: Any, reason: str = "") -> Submission:
    return Submission(id=listing.id, uri=listing.uri, state=state, reason=reason, uploaded_at=listing.uploaded_at)


def _lapsed(failure: Failure, listing: Listing) -> bool:
    """Whether a capture was refused before what its manifest declares had come.

    The upload key holds the declared content, so it stays when files of the same size are replaced by what is declared.
    """
    return failure.kind == "refused" and listing.manifest is not None and listing.uploaded_at > failure.at


def _ended(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def _why(run: FlowRun) -> Capture2MeshError:
    """The error of a run that could record none: what killed it may be its capture; else it never began with it."""
    kind = Capture2MeshError if run.state is not None and run.state.is_failed() else InferenceInterrupted
    return kind(f"run {run.name} ended {run.state_name}: {run.state.message if run.state else ''}")


def _in_state(*types: StateType) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))))


@contextmanager
def _server_errors() -> Iterator[None]:
    """Prefect's faults as errors of this project; its client has tried again where it was busy (503)."""
    server = PREFECT_API_URL.value()
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.is_server_error or error.response.status_code in (408, 429):
            raise ServerUnavailable(f"{server}: {error}; look at the server's log") from error
        raise InputError(f"{server}: {error}; check PREFECT_API_AUTH_STRING and the deployments") from error
    except httpx.TransportError as error:
        raise ServerUnavailable(f"{server}: {error}; start the server, or check PREFECT_API_URL") from error
