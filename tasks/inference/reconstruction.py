"""infer: the views of a capture become raw geometry, by the engine that this machine can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load

from tasks.capture.stage_capture import Capture
from tasks.capture.views import View
from tasks.errors import InferenceInterrupted, StorageUnavailable
from tasks.geometry.registration import register
from tasks.inference.engine import Output
from tasks.inference.registry import ENGINES, EngineChoice
from tasks.inference.trellis.trellis_engine import TrellisOutput, vertex_colours
from tasks.progress import progress_artifact
from tasks.settings import InferParameters
from tasks.stage import retried, stage
from tasks.store.results import StoredResult, store
from tasks.weights.pins import Weights

RESULT = "reconstruction.safetensors"
INFER_RETRIES = 2
Matrix = tuple[tuple[float, float, float, float], ...]


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


class RegistrationSummary(BaseModel):
    """How well a mesh of unknown pose and size was found in the capture's depth readings.

    residual_m: root mean square distance of the readings near the mesh. inlier_share: of the readings near it.
    stray_share: of the mesh, what lies in space that the views see to be free. Without `accepted` nothing was moved.
    """

    model_config = ConfigDict(frozen=True)

    accepted: bool
    residual_m: float
    inlier_share: float
    stray_share: float


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
