"""infer: the views of a capture become raw geometry, by the engine that this machine can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load, save

from tasks.capture.checks import CaptureReport, Needs
from tasks.capture.stages import Capture
from tasks.capture.views import View
from tasks.errors import EngineUnavailable, InferenceInterrupted, StorageUnavailable
from tasks.inference.fusion import FUSION_VERSION, MIN_VIEWS, fuse
from tasks.inference.trellis import Trellis, TrellisOutput, vertex_colours
from tasks.registration import register
from tasks.report import RegistrationSummary, progress_artifact
from tasks.settings import EngineName, ExporterName, InferParameters
from tasks.stage import retried, stage
from tasks.store import StoredResult, store
from tasks.weights.local import find
from tasks.weights.pins import Weights, bundle

RESULT = "reconstruction.safetensors"
INFER_RETRIES = 2
Matrix = tuple[tuple[float, float, float, float], ...]


class Output(Protocol):
    """What an engine gives, `vertices` and `faces` among its tensors. reduced: of fewer views than it was given."""

    @property
    def vertices(self) -> NDArray[np.float32]: ...
    @property
    def faces(self) -> NDArray[np.int32]: ...
    @property
    def colours(self) -> NDArray[np.float32] | None: ...
    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def reduced(self) -> bool: ...
    @property
    def to_capture(self) -> NDArray[np.float64] | None: ...
    def to_safetensors(self) -> bytes: ...


class Engine(Protocol):
    """What turns views into geometry."""

    version: str
    needs: Needs
    exporter: ExporterName
    has_weights: bool
    closed: bool  # whether its surfaces are closed and without defects
    shares_model: bool  # one model, loaded once, takes capture after capture; else each process runs its own

    def missing(self) -> str | None:
        """Why it cannot run on this machine, as far as is quickly seen; weights apart."""
        ...

    def most_views(self, parameters: InferParameters) -> int | None:
        """How many views it takes; None: any number."""
        ...

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> Output: ...


@dataclass(frozen=True)
class Fused:
    """A surface in the capture's own frame: vertices (n, 3) float32 metres, faces (m, 3) int32."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    views: tuple[str, ...]
    colours = None
    reduced = False
    to_capture = np.eye(4)

    def to_safetensors(self) -> bytes:
        return save({"vertices": self.vertices, "faces": self.faces})


class Fusion:
    """RGB-D fusion on the CPU, in the capture's own frame."""

    version = FUSION_VERSION
    needs = Needs(cameras=True, metric_depth=True, min_views=MIN_VIEWS)
    exporter: ExporterName = "native"
    has_weights = False
    closed = True
    shares_model = False

    def missing(self) -> str | None:
        return None

    def most_views(self, parameters: InferParameters) -> int | None:
        return None

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> Fused:
        vertices, faces = fuse(views, parameters.fusion, progress)
        return Fused(vertices, faces, tuple(view.name for view in views))


TRELLIS = Trellis()
ENGINES: dict[str, Engine] = {"fusion": Fusion(), "trellis": TRELLIS}


class EngineChoice(BaseModel):
    """The engine that a run uses, resolved before any key is made, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """The surface of a reconstruction: vertices (n, 3) float32, faces (m, 3) int32, z-up, in the engine's frame.

    colours: (n, 3) float32 RGB 0..1 where the engine gives them. to_capture: the 4x4 similarity to the capture's frame
    (metres); None where it is not known.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    colours: NDArray[np.float32] | None
    to_capture: NDArray[np.float64] | None


class Reconstruction(StoredResult):
    """Raw geometry and appearance in the engine's z-up frame, as safetensors in the store.

    views: those that were used, of `views_asked`. registration: None where the engine works in the capture's frame, or
    the capture has no cameras and depth to register to.
    """

    engine: EngineChoice
    parameters: InferParameters
    weights: Weights | None
    views: tuple[str, ...]
    views_asked: int
    to_capture: Matrix | None
    registration: RegistrationSummary | None

    def geometry(self) -> Geometry:
        """The geometry, read from the store."""
        tensors = load(store().read(self, RESULT))
        colours = vertex_colours(tensors.get("vertex_attrs"))
        return Geometry(tensors["vertices"], tensors["faces"], colours, self._to_capture())

    def trellis_output(self) -> TrellisOutput:
        """All that the `trellis` engine gave, read from the store."""
        return TrellisOutput.from_safetensors(store().read(self, RESULT), self._to_capture())

    def _to_capture(self) -> NDArray[np.float64] | None:
        return None if self.to_capture is None else np.array(self.to_capture)


def resolve_engine(asked: EngineName) -> EngineChoice:
    """What `auto` means on this machine: trellis where GPU, package and weights are there, else fusion."""
    if asked != "auto":
        return EngineChoice(name=asked, version=ENGINES[asked].version, reason="asked for")
    lacking = TRELLIS.missing() or ("its weights are not fetched" if find(bundle()) is None else None)
    if lacking is None:
        return EngineChoice(name="trellis", version=TRELLIS.version, reason="auto: GPU, trellis and weights are here")
    return EngineChoice(name="fusion", version=FUSION_VERSION, reason=f"auto: no trellis on this machine: {lacking}")


def require_engine(engine: EngineChoice) -> None:
    """Raise EngineUnavailable where the engine cannot run on this machine, before anything is fetched for it."""
    if (lacking := ENGINES[engine.name].missing()) is not None:
        raise EngineUnavailable(f"engine {engine.name}: {lacking}; run `python -m flows doctor`")


def weights_for(engine: EngineChoice, report: CaptureReport) -> Weights | None:
    """The weights that a capture's inference loads, known before any download; None for an engine without weights."""
    return Weights.of(bundle(masks=report.lacks_masks)) if ENGINES[engine.name].has_weights else None


def spread(names: Sequence[str], limit: int | None) -> tuple[str, ...]:
    """At most `limit` of the views, evenly spread."""
    if limit is None or limit >= len(names):
        return tuple(names)
    return tuple(names[index] for index in np.linspace(0, len(names), limit, endpoint=False).astype(int))


def _infer_key(capture: Capture, engine: EngineChoice, parameters: InferParameters, weights: Weights | None) -> Any:
    digest = None if weights is None else weights.bundle
    own = parameters.model_dump(include={"seed", "views", engine.name})
    return [capture.digest, engine.name, engine.version, own, digest]


@stage(
    key=_infer_key,
    version="1",
    tags=("inference",),
    **retried(INFER_RETRIES, StorageUnavailable, InferenceInterrupted),
)
def infer(
    folder: Path, capture: Capture, engine: EngineChoice, parameters: InferParameters, weights: Weights | None
) -> Reconstruction:
    """Run the engine over the capture's views; shows its progress."""
    runs = ENGINES[engine.name]
    limits = [limit for limit in (parameters.views, runs.most_views(parameters)) if limit is not None]
    names = spread(capture.view_names, min(limits, default=None))
    with progress_artifact("infer") as progress:
        views = capture.views(names)
        output = runs.reconstruct(views, parameters, progress)
        to_capture, registration = _placed(output, views)
    (folder / RESULT).write_bytes(output.to_safetensors())
    return Reconstruction(
        engine=engine,
        parameters=parameters,
        weights=weights,
        views=output.views,
        views_asked=len(names),
        to_capture=None if to_capture is None else tuple(map(tuple, to_capture.tolist())),
        registration=registration,
        reusable=not output.reduced,  # with the memory free, the next run does better
    )


def _placed(output: Output, views: Sequence[View]) -> tuple[NDArray[np.float64] | None, RegistrationSummary | None]:
    """The similarity to the capture's frame, and how well it fits where it had to be found."""
    if output.to_capture is not None:
        return output.to_capture, None
    found = register(output.vertices, output.faces, views, output.colours)
    if found is None:
        return None, None
    summary = RegistrationSummary(
        accepted=found.accepted,
        residual_m=found.residual_m,
        inlier_share=found.inlier_share,
        stray_share=found.stray_share,
    )
    return found.to_capture if found.accepted else None, summary
