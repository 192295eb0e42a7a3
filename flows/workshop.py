"""The workshop of a batch: the processes and the model that its captures share, and the claims on them.

While one capture is in the model, others are prepared and finished. `flows/batch.py` hands it captures.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from flows.model_server import ModelServer, ask
from flows.process_pool import Processes
from flows.reconstruct import Prepared, finish, prepare
from tasks.capture.listing import Listing
from tasks.dataset.plan import Planned
from tasks.dataset.upload import Upload
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
from tasks.inference.registry import ENGINES, EngineChoice
from tasks.mesh.export import export_glb, exports_in_process
from tasks.mesh.publish import Published
from tasks.progress import StageTiming, Timings, observed_by
from tasks.settings import Parameters, settings
from tasks.store.claims import Claims
from tasks.weights.fetch_weights import fetch_weights
from tasks.weights.pins import Weights

# for each model:
LANES = 4  # one capture is in the model; of the others, views are read, or results are registered and stored
AHEAD = 4  # captures that are prepared, which takes longer than an inference, or wait for a lane

# errors of this machine: no capture could be reconstructed on it
HOPELESS = (EngineUnavailable, WeightsMissing, WeightsCorrupt, WeightsUnavailable)

log = logging.getLogger(__name__)


class Outcome(BaseModel):
    """How a capture of a batch ended."""

    model_config = ConfigDict(frozen=True)

    planned: Planned
    """The capture."""
    state: Literal["normal", "warning", "failure", "refused", "failed", "elsewhere", "replaced"]
    """normal, warning, failure: the status of the published asset. elsewhere: another run has it, or has done it.
    replaced: it was replaced by a newer upload, which the next run takes."""
    reason: str = ""
    """Why it was not reconstructed."""
    url: str = ""
    """Folder or URL of the published asset; empty if there is none."""

    @property
    def failed(self) -> bool:
        """True if no usable asset came out."""
        return self.state in ("failure", "refused", "failed")


class Workshop:
    """The processes and the models that the captures of a batch share, and the claims on them."""

    def __init__(self, engine: EngineChoice, parameters: Parameters) -> None:
        self._engine, self._parameters = engine, parameters
        self._processes, self._claims = Processes(settings().batch_processes), Claims()
        self._model = SharedModel(engine, parameters, self._processes) if ENGINES[engine.name].shares_model else None
        self._at_once = settings().batch_processes + (self._model.places if self._model else 0)
        self._ended = threading.Event()

    def __enter__(self) -> Workshop:
        self._claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._model is not None:
            self._model.server.close()
        self._processes.__exit__(*error)  # type: ignore[arg-type]
        self._claims.__exit__(*error)

    @property
    def lanes(self) -> dict[str, str]:
        """With several GPUs, what each is at work on, for people."""
        return dict(self._model.lanes) if self._model else {}

    def reconstruct(self, captures: Sequence[Planned]) -> Iterator[Outcome]:
        """Reconstruct captures, several at once; gives their outcomes as they end, in no order.

        Raises an error that every capture would meet on this machine.
        """
        waiting, ended = SimpleQueue[Planned | None](), SimpleQueue[Outcome | BaseException]()

        def work() -> None:
            while (planned := waiting.get()) is not None and not self._ended.is_set():
                try:
                    ended.put(self._outcome(planned))
                except BaseException as error:
                    ended.put(error)

        for planned in captures:
            waiting.put(planned)
        for _ in range(min(self._at_once, len(captures))):
            waiting.put(None)
            # as daemons they do not hold up a process that is to end; nothing of Prefect runs in them
            threading.Thread(target=work, daemon=True).start()
        for _ in captures:
            outcome = ended.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    def _outcome(self, planned: Planned) -> Outcome:
        """Reconstruct one capture; its own errors become its outcome, and the other captures go on."""
        try:
            if self._model is not None:
                return self._with_model(planned, self._model)
            return self._once(planned, lambda: self._in_one_process(planned))
        except HOPELESS:
            raise
        except CaptureReplaced as error:
            return Outcome(planned=planned, state="replaced", reason=str(error))
        except CaptureRefused as error:
            return Outcome(planned=planned, state="refused", reason=str(error))
        except MeshRejected as error:
            return Outcome(planned=planned, state="failure", reason=str(error), url=error.published.url)
        except Capture2MeshError as error:
            return Outcome(planned=planned, state="failed", reason=str(error))
        except Exception as error:
            log.exception("%s", planned.id)
            return Outcome(planned=planned, state="failed", reason=f"{type(error).__name__}: {error}")

    def _once(self, planned: Planned, reconstruct: Callable[[], Published]) -> Outcome:
        """Claim a capture and reconstruct it, unless another run has it or has done it."""
        upload = planned.upload
        with upload.claimed(self._claims) as mine:
            if not mine or upload.published() is not None:
                return Outcome(planned=planned, state="elsewhere")
            with upload.recorded(), self._unless_ended():
                published = reconstruct()
                return Outcome(planned=planned, state=published.report.status, url=published.url)

    @contextmanager
    def _unless_ended(self) -> Iterator[None]:
        """An error after the end of the batch (a cancelled run, another capture's error) is no failure of a capture."""
        try:
            yield
        except Exception as error:
            if self._ended.is_set():
                raise SystemExit from error  # of this thread
            raise

    def _in_one_process(self, planned: Planned) -> Published:
        return self._processes.run(_whole, planned, self._engine, self._parameters)

    def _with_model(self, planned: Planned, model: SharedModel) -> Outcome:
        """Reconstruct a capture with a shared model: the processes do all but the model's own work."""
        with ExitStack() as before_model:
            # room comes before the claim: another machine may be free for the captures that find none
            before_model.enter_context(model.room)

            def reconstruct() -> Published:
                assert planned.listing is not None
                prepared, stages = self._processes.run(
                    _prepared, planned.listing, self._engine, self._parameters, planned.upload
                )
                with prepared.capture.in_scratch():
                    timings = Timings(stages)
                    with observed_by(timings):
                        reconstruction, stages = model.infer(prepared, timings)
                    before_model.close()
                    return self._processes.run(_finished, prepared, reconstruction, self._parameters, stages)

            return self._once(planned, reconstruct)


class SharedModel:
    """The model that the captures of a batch share, once on each GPU. Its weights are fetched once, for all of them.

    places: the number of captures that are before or in a model at the same time. room: these places.
    lanes: what each of several GPUs is at work on.
    """

    def __init__(self, engine: EngineChoice, parameters: Parameters, processes: Processes) -> None:
        self._engine, self._parameters, self._processes = engine, parameters, processes
        self.server, self.lanes = ModelServer(self._answer), dict[str, str]()
        models = ENGINES[engine.name].models_at_once()
        self.places = models * (LANES + AHEAD)
        self.room = threading.Semaphore(self.places)
        self._lanes = threading.Semaphore(models * LANES)
        self._fetching, self._fetched = threading.Lock(), set[str]()  # digests of bundles
        self._unavailable: Capture2MeshError | None = None  # why the weights could not be fetched

    def infer(self, prepared: Prepared, timings: Timings) -> tuple[Reconstruction, list[StageTiming]]:
        """Infer a prepared capture, and export it if that needs the model's process; gives all stages up to there."""
        weights, parameters = prepared.weights, self._parameters
        with self._lanes:
            if (
                weights is not None
                and weights.bundle not in self._fetched
                and infer.stored(prepared.capture, prepared.cameras, self._engine, parameters.infer, weights) is None
            ):
                self._fetch(weights)
            reconstruction, stages = self._processes.run(
                _inferred, prepared, parameters, timings.stages, self.server.address
            )
            if exports_in_process(self._engine, parameters.export):
                exported = Timings(stages)
                with observed_by(exported):
                    export_glb(reconstruction, prepared.capture, prepared.cameras, parameters.export)
                stages = exported.stages
            return reconstruction, stages

    def _answer(self, capture: str, request: Any) -> Any:
        """Ask a model in the name of a capture."""

        def progressed(fraction: float, note: str = "") -> None:
            if note:
                self.lanes[note] = f"{capture} {fraction:.0%}"

        return ENGINES[self._engine.name].ask(request, progressed)

    def _fetch(self, weights: Weights) -> None:
        """Fetch a bundle once, for all captures; if that fails, it fails for all of them."""
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


# these run in the processes


def _whole(planned: Planned, engine: EngineChoice, parameters: Parameters) -> Published:
    """Reconstruct one capture, from its files to its asset."""
    assert planned.listing is not None
    timings = Timings()
    with observed_by(timings):
        prepared = prepare(planned.listing, engine, parameters, planned.upload)
        with prepared.capture.in_scratch():
            reconstruction = infer(prepared.capture, prepared.cameras, engine, parameters.infer, prepared.weights)
            return finish(prepared, reconstruction, parameters, timings)


def _prepared(
    listing: Listing, engine: EngineChoice, parameters: Parameters, upload: Upload
) -> tuple[Prepared, list[StageTiming]]:
    """Prepare a capture; gives the stages that ran as well."""
    timings = Timings()
    with observed_by(timings):
        return prepare(listing, engine, parameters, upload), timings.stages


def _inferred(
    prepared: Prepared, parameters: Parameters, stages: list[StageTiming], models: str
) -> tuple[Reconstruction, list[StageTiming]]:
    """Infer a capture after its first `stages`, by the models of the batch's process; gives all stages so far.

    models: the address of the server that asks them.
    """
    capture, engine, timings = prepared.capture, prepared.engine, Timings(stages)
    ENGINES[engine.name].use_models_of(partial(ask, models, capture.id))
    with observed_by(timings):
        return infer(capture, prepared.cameras, engine, parameters.infer, prepared.weights), timings.stages


def _finished(
    prepared: Prepared, reconstruction: Reconstruction, parameters: Parameters, stages: list[StageTiming]
) -> Published:
    """Finish a capture after its first `stages`."""
    timings = Timings(stages)
    with observed_by(timings):
        return finish(prepared, reconstruction, parameters, timings)
