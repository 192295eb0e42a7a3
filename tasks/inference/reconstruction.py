"""The stage `infer`: an engine turns the views of a capture into raw geometry. The flows run it.

Its result, `Reconstruction`, is read by the stages of `tasks.mesh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load

from tasks.cameras.find_cameras import CaptureCameras
from tasks.capture.stage_capture import Capture
from tasks.capture.views import View
from tasks.errors import InferenceInterrupted, StorageUnavailable
from tasks.geometry.gaussians import Gaussians
from tasks.geometry.registration import register
from tasks.inference.engine import Output, SurfaceFacts
from tasks.inference.registry import ENGINES, EngineChoice
from tasks.progress import progress_artifact
from tasks.settings import InferParameters
from tasks.stage import retried, stage
from tasks.store.results import StoredResult, store
from tasks.weights.pins import Weights

RESULT = "reconstruction.safetensors"
INFER_RETRIES = 2
THREADS = 2  # decoders release the interpreter lock
Matrix = tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Geometry:
    """The surface of a reconstruction and its appearance, in the engine's z-up frame."""

    vertices: NDArray[np.float32]
    """(n, 3)."""
    faces: NDArray[np.int32]
    """(m, 3), indices of vertices."""
    colours: NDArray[np.float32] | None
    """(n, 3), RGB 0..1 of the vertices; None if the engine gives none."""
    gaussians: Gaussians | None
    """They show the surface's colours; None if the engine makes none."""


class RegistrationSummary(BaseModel):
    """How well a mesh of unknown pose and size fits the capture's depth readings."""

    model_config = ConfigDict(frozen=True)

    accepted: bool
    """True if the fit is good enough; only then the mesh is moved to the capture's frame."""
    residual_m: float
    """Root mean square distance to the mesh of the readings near it, in metres."""
    inlier_share: float
    """Share of the readings that are near the mesh, 0 to 1."""
    stray_share: float
    """Share of the mesh that lies in space which the views see to be empty, 0 to 1."""


class Reconstruction(StoredResult):
    """Raw geometry and appearance in the engine's z-up frame, as safetensors in the store."""

    engine: EngineChoice
    """The engine that made it."""
    parameters: InferParameters
    """The parameters of the inference."""
    weights: Weights | None
    """The weights that the engine loaded; None for an engine without weights."""
    views: tuple[str, ...]
    """Names of the views that were used."""
    views_asked: int
    """Number of views that the engine was given."""
    to_capture: Matrix | None
    """4x4 similarity to the capture's frame (metres); None if it is not known."""
    registration: RegistrationSummary | None
    """How `to_capture` was found; None if the engine works in the capture's frame, or the capture has no cameras and
    depth to register to."""
    surface: SurfaceFacts | None = None
    """The engine's measurements on the surface; None if it measures nothing."""

    def safetensors(self) -> bytes:
        """The engine's output (`Output.to_safetensors`), read from the store."""
        return store().read(self, RESULT)

    def geometry(self) -> Geometry:
        """The surface, read from the store."""
        engine, stored = ENGINES[self.engine.name], self.safetensors()
        tensors = load(stored)
        return Geometry(
            tensors["vertices"], tensors["faces"], engine.colours(tensors), engine.gaussians(stored, tensors)
        )

    def similarity(self) -> NDArray[np.float64] | None:
        """`to_capture` as an array."""
        return None if self.to_capture is None else np.array(self.to_capture)


def chosen(names: Sequence[str], limit: int | None, sharpness: Callable[[str], float]) -> tuple[str, ...]:
    """Choose at most `limit` of the views: the sharpest one of each of so many equal parts of the capture."""
    if limit is None or limit >= len(names):
        return tuple(names)
    with ThreadPoolExecutor(THREADS) as pool:
        measured = dict(zip(names, pool.map(sharpness, names), strict=True))
    return tuple(max(part, key=measured.__getitem__) for part in np.array_split(np.array(names, object), limit))


def _infer_key(
    capture: Capture,
    cameras: CaptureCameras,
    engine: EngineChoice,
    parameters: InferParameters,
    weights: Weights | None,
) -> Any:
    digest = None if weights is None else weights.bundle
    own = parameters.model_dump(include={"seed", "views", engine.name})
    return [capture.digest, cameras.key, engine.name, engine.version, own, digest]


@stage(
    key=_infer_key,
    version="3",
    tags=("inference",),
    **retried(INFER_RETRIES, StorageUnavailable, InferenceInterrupted),
)
def infer(
    folder: Path,
    capture: Capture,
    cameras: CaptureCameras,
    engine: EngineChoice,
    parameters: InferParameters,
    weights: Weights | None,
) -> Reconstruction:
    """Run the engine on the capture's views and show its progress."""
    runs = ENGINES[engine.name]
    limits = [limit for limit in (parameters.views, runs.most_views(parameters)) if limit is not None]
    posed = cameras.by_view()
    named = [name for name in capture.view_names if name in posed or not runs.needs.cameras]
    names = chosen(named, min(limits, default=None), capture.sharpness)
    with progress_artifact("infer") as progress:
        views = list(cameras.views_of(capture, names))
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
        surface=output.surface,
        reusable=not output.reduced,  # with more free memory the next run can use all views
    )


def _placed(output: Output, views: Sequence[View]) -> tuple[NDArray[np.float64] | None, RegistrationSummary | None]:
    """Return the similarity to the capture's frame, and how well it fits if it had to be found."""
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
