"""infer: the views of a capture become raw geometry, by the engine that this machine can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load, save_file

from tasks.capture.checks import Needs
from tasks.capture.stages import Capture
from tasks.capture.views import View
from tasks.errors import EngineUnavailable, StorageUnavailable
from tasks.inference.fusion import FUSION_VERSION, MIN_VIEWS, fuse
from tasks.report import progress_artifact
from tasks.settings import EngineName, InferParameters
from tasks.stage import retried, stage
from tasks.store import StoredResult, store

GEOMETRY = "mesh.safetensors"
INFER_RETRIES = 2
Matrix = tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Geometry:
    """What an engine gives: vertices (n, 3) float32 and faces (m, 3) int32, z-up, in the engine's frame.

    `to_capture` is the 4x4 similarity from that frame to the capture's (metres); None where it is not known.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    to_capture: NDArray[np.float64] | None


class Engine(Protocol):
    """What turns views into geometry."""

    version: str
    needs: Needs

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> Geometry: ...


class Fusion:
    """RGB-D fusion on the CPU, in the capture's own frame."""

    version = FUSION_VERSION
    needs = Needs(cameras=True, metric_depth=True, min_views=MIN_VIEWS)

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> Geometry:
        vertices, faces = fuse(views, parameters.fusion, progress)
        return Geometry(vertices, faces, np.eye(4))


ENGINES: dict[str, Engine] = {"fusion": Fusion()}


class EngineChoice(BaseModel):
    """The engine that a run uses, resolved before any key is made, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    reason: str


class Reconstruction(StoredResult):
    """Raw geometry and appearance in the engine's z-up frame, as safetensors in the store."""

    engine: EngineChoice
    parameters: InferParameters
    views: tuple[str, ...]
    to_capture: Matrix | None

    def geometry(self) -> Geometry:
        """The geometry, read from the store."""
        tensors = load(store().read(self, GEOMETRY))
        to_capture = None if self.to_capture is None else np.array(self.to_capture)
        return Geometry(tensors["vertices"], tensors["faces"], to_capture)


def resolve_engine(asked: EngineName) -> EngineChoice:
    """What `auto` means on this machine; raises EngineUnavailable for an engine that cannot run here."""
    if asked == "trellis":
        raise EngineUnavailable("engine trellis: this version has no adapter for it; use --engine fusion or auto")
    reason = "asked for" if asked == "fusion" else "auto: runs on any machine, from posed RGB-D views"
    return EngineChoice(name="fusion", version=ENGINES["fusion"].version, reason=reason)


def spread(names: Sequence[str], limit: int | None) -> tuple[str, ...]:
    """At most `limit` of the views, evenly spread."""
    if limit is None or limit >= len(names):
        return tuple(names)
    return tuple(names[index] for index in np.linspace(0, len(names), limit, endpoint=False).astype(int))


def _infer_key(capture: Capture, engine: EngineChoice, parameters: InferParameters) -> Any:
    return [capture.digest, engine.name, engine.version, parameters]


@stage(key=_infer_key, version="1", tags=("inference",), **retried(INFER_RETRIES, StorageUnavailable))
def infer(folder: Path, capture: Capture, engine: EngineChoice, parameters: InferParameters) -> Reconstruction:
    """Run the engine over the capture's views; shows its progress."""
    names = spread(capture.view_names, parameters.views)
    with progress_artifact("infer") as progress:
        geometry = ENGINES[engine.name].reconstruct(capture.views(names), parameters, progress)
    save_file({"vertices": geometry.vertices, "faces": geometry.faces}, folder / GEOMETRY)
    to_capture = None if geometry.to_capture is None else tuple(map(tuple, geometry.to_capture.tolist()))
    return Reconstruction(engine=engine, parameters=parameters, views=names, to_capture=to_capture)
