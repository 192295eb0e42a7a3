"""Many captures in one process with one model load: while one is inferred, others are prepared and finished."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Literal

from prefect import flow, runtime, task
from pydantic import BaseModel, ConfigDict

from flows.events import OutcomeName, emit_outcome
from flows.gpu import gpu_slot
from flows.process_pool import Processes
from flows.reconstruct import Prepared, finish, prepare
from tasks.capture.completeness import StorageState, awaited
from tasks.capture.listing import Listing
from tasks.dataset.plan import Planned, plan
from tasks.errors import (
    Capture2MeshError,
    CaptureRefused,
    CaptureReplaced,
    EngineUnavailable,
    MeshRejected,
    WeightsCorrupt,
    WeightsMissing,
    WeightsUnavailable,
)
from tasks.inference.reconstruction import Reconstruction, infer
from tasks.inference.registry import ENGINES, EngineChoice, require_engine, resolve_engine
from tasks.mesh.export import export_glb, exports_in_process
from tasks.mesh.publish import Published, published_folder
from tasks.progress import StageTiming, Timings, in_flow, observed_by, progress_artifact, timed
from tasks.settings import EngineName, Parameters, settings
from tasks.stage import UNCACHED
from tasks.store.claims import Claims, failure_of, failures_recorded
from tasks.store.location import Location
from tasks.weights.fetch_weights import fetch_weights
from tasks.weights.pins import Weights

LANES = 2  # one capture is in the model while the other's views are read, or its result is registered and stored
ELSEWHERE_SECONDS = 2  # between two looks at what other runs have
AHEAD = 2  # captures that are prepared and wait for the model
HOUR = 3600
PROGRESS = "captures"  # key of the progress artifact

EVENTS: dict[str, OutcomeName] = {
    "normal": "reconstructed",
    "warning": "reconstructed",
    "failure": "rejected",
    "refused": "rejected",
    "failed": "failed",
}

# this machine cannot do it, whatever the capture
HOPELESS = (EngineUnavailable, WeightsMissing, WeightsCorrupt, WeightsUnavailable)

log = logging.getLogger(__name__)


class Outcome(BaseModel):
    """How a capture ended. url: of what is published.

    elsewhere: another run has it, or has done it meanwhile. replaced: it was uploaded anew, the next run takes it.
    """

    model_config = ConfigDict(frozen=True)

    capture: Planned
    state: Literal["normal", "warning", "failure", "refused", "failed", "elsewhere", "replaced"]
    reason: str = ""
    url: str = ""

    @property
    def failed(self) -> bool:
        return self.state in ("failure", "refused", "failed")


def _run_name() -> str:
    return Location.of(runtime.flow_run.parameters["dataset"]).name


@flow(name="batch", flow_run_name=_run_name)
def batch(
    dataset: str,
    output: str,
    engine: EngineName = "auto",
    parameters: Parameters = Parameters(),
    uploads: bool = False,
) -> dict[str, int]:
    """Reconstruct all that is pending in a dataset, in one process; gives how many captures ended how.

    Args:
        dataset: Folder or URL above the captures, or a list of captures (.txt, .csv, .jsonl)
        output: Folder or URL below which the assets are published
        engine: The engine to run
        parameters: What changes the results
        uploads: Captures may be half uploaded; those are left for later
    """
    choice = resolve_engine(engine)
    state = StorageState.of(Location.of(dataset)) if uploads else None
    pending = plan(dataset, output, choice, parameters).pending
    if state is not None:
        needed = ENGINES[choice.name].needs.min_views
        quiet = settings().quiet_seconds
        pending = tuple(each for each in pending if each.listing and not awaited(each.listing, state, quiet, needed))
    return work_through(pending, output, choice, parameters)


def work_through(
    captures: Sequence[Planned], output: str, engine: EngineChoice, parameters: Parameters
) -> dict[str, int]:
    """Reconstruct captures; gives how many ended how.

    What may work the next time is tried again at the end. What other runs have is waited for: they may be dead.
    """
    if not captures:
        return {}
    require_engine(engine)
    ended, tries, begun = dict[str, Outcome](), Counter[str](), time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(timed(PROGRESS))
        show = stack.enter_context(progress_artifact(PROGRESS))
        stack.enter_context(gpu_slot(engine))
        workshop = stack.enter_context(Workshop(output, engine, parameters))
        left = tuple(captures)
        while left:
            for outcome in workshop.reconstruct(left):
                ended[outcome.capture.id] = outcome
                tries[outcome.capture.id] += outcome.failed
                _tell(outcome)
                pace = _pace(len(ended), len(captures), time.monotonic() - begun)
                show(len(ended) / len(captures), f"{pace}; {outcome.capture.id} {outcome.state}")
            left = tuple(
                capture
                for capture in left
                if (ended[capture.id].failed or ended[capture.id].state == "elsewhere")
                and tries[capture.id] < settings().attempts
                and _is_left(output, capture)
            )
            if left and all(ended[capture.id].state == "elsewhere" for capture in left):
                time.sleep(ELSEWHERE_SECONDS)
    states = [outcome.state for outcome in ended.values()]
    return {state: states.count(state) for state in sorted(set(states))}


class Workshop:
    """The processes and the model that the captures of a batch share, and the claims on what it works on."""

    def __init__(self, output: str, engine: EngineChoice, parameters: Parameters) -> None:
        self.output, self.engine, self.parameters = output, engine, parameters
        self._processes, self._claims = Processes(settings().batch_processes), Claims()
        self._ended = threading.Event()
        self._lanes = threading.Semaphore(LANES)
        self._fetching, self._fetched = threading.Lock(), set[str]()  # bundles
        self._unavailable: Capture2MeshError | None = None  # why weights cannot be had
        shares = ENGINES[engine.name].shares_model
        self._at_once = settings().batch_processes + (LANES + AHEAD if shares else 0)
        # only so many are claimed before the model: another machine may be free for the rest
        self._room = threading.Semaphore(LANES + AHEAD if shares else self._at_once)
        self._reconstruct = self._with_shared_model if shares else self._in_one_process

    def __enter__(self) -> Workshop:
        self._claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._processes.__exit__(*error)  # type: ignore[arg-type]
        self._claims.__exit__(*error)

    def reconstruct(self, captures: Iterable[Planned]) -> Iterator[Outcome]:
        """Reconstruct captures, so many at once as there are processes and room before the model; in no order.

        Raises what would fail on this machine for every capture.
        """
        waiting, ended = SimpleQueue[Planned | None](), SimpleQueue[Outcome | BaseException]()

        def work() -> None:
            while (capture := waiting.get()) is not None and not self._ended.is_set():
                try:
                    ended.put(self._one(capture))
                except BaseException as error:
                    ended.put(error)

        count = 0
        for capture in captures:
            waiting.put(capture)
            count += 1
        for _ in range(min(self._at_once, count)):
            waiting.put(None)
            # as daemons they do not hold up a process that is to end; nothing of Prefect runs in them
            threading.Thread(target=work, daemon=True).start()
        for _ in range(count):
            outcome = ended.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    def _one(self, capture: Planned) -> Outcome:
        """Reconstruct one capture, unless another run has it; its failure costs itself only."""
        try:
            with ExitStack() as before_model, self._claimed(capture, before_model) as mine:
                if not mine or published_folder(self.output, capture.id, capture.upload_key) is not None:
                    return Outcome(capture=capture, state="elsewhere")
                with failures_recorded(self.output, capture.upload_key, capture.uri), self._unless_ended():
                    published = self._reconstruct(capture, before_model)
                    return Outcome(capture=capture, state=published.report.status, url=published.url)
        except HOPELESS:
            raise
        except CaptureReplaced as error:
            return Outcome(capture=capture, state="replaced", reason=str(error))
        except CaptureRefused as error:
            return Outcome(capture=capture, state="refused", reason=str(error))
        except MeshRejected as error:
            return Outcome(capture=capture, state="failure", reason=str(error), url=error.published.url)
        except Capture2MeshError as error:
            return Outcome(capture=capture, state="failed", reason=str(error))
        except Exception as error:
            log.exception("%s", capture.id)
            return Outcome(capture=capture, state="failed", reason=f"{type(error).__name__}: {error}")

    @contextmanager
    def _unless_ended(self) -> Iterator[None]:
        """What fails since the batch is ended (a cancelled run, another capture's error) is no failure of a capture."""
        try:
            yield
        except Exception as error:
            if self._ended.is_set():
                raise SystemExit from error  # of this thread
            raise

    @contextmanager
    def _claimed(self, capture: Planned, before_model: ExitStack) -> Iterator[bool]:
        """Claim a capture once there is room for it before the model."""
        before_model.enter_context(self._room)
        with self._claims.claimed(self.output, capture.upload_key) as mine:
            yield mine

    def _in_one_process(self, capture: Planned, before_model: ExitStack) -> Published:
        return self._processes.run(_whole, capture, self.output, self.engine, self.parameters)

    def _with_shared_model(self, capture: Planned, before_model: ExitStack) -> Published:
        assert capture.listing is not None
        prepared, stages = self._processes.run(_prepared, capture.listing, self.engine, capture.upload_key)
        with prepared.capture.in_scratch():
            timings = Timings(stages)
            with self._lanes, observed_by(timings):
                reconstruction = self._infer(prepared)
            before_model.close()
            return self._processes.run(
                _finished, prepared, reconstruction, self.parameters, self.output, timings.stages
            )

    def _infer(self, prepared: Prepared) -> Reconstruction:
        weights, parameters = prepared.weights, self.parameters
        if (
            weights is not None
            and weights.bundle not in self._fetched
            and infer.stored(prepared.capture, self.engine, parameters.infer, weights) is None
        ):
            self._fetch(weights)
        reconstruction = infer(prepared.capture, self.engine, parameters.infer, weights)
        if exports_in_process(self.engine, parameters.export):
            export_glb(reconstruction, prepared.capture, parameters.export)
        return reconstruction

    def _fetch(self, weights: Weights) -> None:
        """Fetch a bundle once, for all captures; where that fails, it fails for all."""
        with self._fetching:
            if self._unavailable is None and weights.bundle not in self._fetched:
                try:
                    fetch_weights(weights)
                except HOPELESS as error:
                    self._unavailable = error
                except Capture2MeshError as error:
                    self._unavailable = WeightsUnavailable(str(error))
                else:
                    self._fetched.add(weights.bundle)
            if self._unavailable is not None:
                raise self._unavailable


def _whole(capture: Planned, output: str, engine: EngineChoice, parameters: Parameters) -> Published:
    """One capture from its files to its asset, in a process of the batch."""
    assert capture.listing is not None
    timings = Timings()
    with observed_by(timings):
        prepared = prepare(capture.listing, engine, capture.upload_key)
        with prepared.capture.in_scratch():
            reconstruction = infer(prepared.capture, engine, parameters.infer, prepared.weights)
            return finish(prepared, reconstruction, parameters, output, timings)


def _prepared(listing: Listing, engine: EngineChoice, key: str) -> tuple[Prepared, list[StageTiming]]:
    timings = Timings()
    with observed_by(timings):
        return prepare(listing, engine, key), timings.stages


def _finished(
    prepared: Prepared, reconstruction: Reconstruction, parameters: Parameters, output: str, stages: list[StageTiming]
) -> Published:
    timings = Timings(stages)
    with observed_by(timings):
        return finish(prepared, reconstruction, parameters, output, timings)


@task(name="reconstructed", task_run_name="{capture}", **UNCACHED)
def reconstructed(capture: str, state: str, reason: str) -> None:
    """A capture of a batch has ended: what the UI lists of it."""
    if reason:
        raise Capture2MeshError(f"{capture}: {state}: {reason}")


def _tell(outcome: Outcome) -> None:
    """A task run and an event for each capture that has ended."""
    if outcome.state not in EVENTS or not in_flow():
        return
    capture = outcome.capture
    reconstructed(capture.id, outcome.state, outcome.reason, return_state=True)
    report = f"{outcome.url}/report.json" if outcome.url else ""
    emit_outcome(capture.id, capture.uri, EVENTS[outcome.state], report, outcome.reason)


def _is_left(output: str, capture: Planned) -> bool:
    """Whether there is still something to do: it is neither published nor given up, here or elsewhere."""
    if published_folder(output, capture.id, capture.upload_key) is not None:
        return False
    failure = failure_of(output, capture.upload_key)
    return failure is None or not failure.final


def _pace(done: int, total: int, seconds: float) -> str:
    left = seconds / done * (total - done)
    return f"{done} of {total}, {done / seconds * HOUR:.0f} an hour, {left / 60:.0f} min left"
