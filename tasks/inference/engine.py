"""The interface of an engine: it takes views and gives raw geometry. `fusion` and `trellis` implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tasks.capture.capture_checks import Needs
from tasks.capture.subject import Subject
from tasks.capture.views import View
from tasks.geometry.gaussians import Gaussians
from tasks.progress import Progress
from tasks.settings import ExporterName, InferParameters


class SurfaceFacts(BaseModel):
    """Measurements on the depth maps and on the surface that an engine made of them. Lengths in metres."""

    model_config = ConfigDict(frozen=True)

    subject: Subject
    """The part of the scene that the surface is of."""
    depth_step_m: float
    """Step between two values of the depth maps, at the object."""
    noise_m: float
    """Standard deviation of a depth reading, at the object."""
    noise_m_at_1m: float
    """The same at a distance of 1 m."""
    spread_m: float
    """Standard deviation of one view's surface from another's, once smoothed: what sensor and cameras leave."""
    voxel_m: float
    """Size of the voxels."""
    invented_share: float
    """Share of the closed surface that no view saw, 0 to 1; 0 for an open surface."""


class Output(Protocol):
    """The output of an engine, in its own z-up frame."""

    @property
    def vertices(self) -> NDArray[np.float32]:
        """(n, 3)."""
        ...

    @property
    def faces(self) -> NDArray[np.int32]:
        """(m, 3), indices of vertices."""
        ...

    @property
    def colours(self) -> NDArray[np.float32] | None:
        """(n, 3), RGB 0..1 of the vertices; None if the engine gives none."""
        ...

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views that were used."""
        ...

    @property
    def reduced(self) -> bool:
        """True if these are fewer than the engine was given."""
        ...

    @property
    def to_capture(self) -> NDArray[np.float64] | None:
        """4x4 similarity to the capture's frame (metres); None if the engine does not know it."""
        ...

    @property
    def surface(self) -> SurfaceFacts | None:
        """The measurements on the surface; None if nothing was measured."""
        ...

    def to_safetensors(self) -> bytes:
        """The output as it is stored; `vertices` and `faces` are among its tensors."""
        ...


@dataclass(frozen=True, eq=False)
class Textured:
    """A textured surface from an engine's own exporter, in the engine's z-up frame."""

    vertices: NDArray[np.float32]
    """(n, 3)."""
    faces: NDArray[np.int32]
    """(m, 3), indices of vertices."""
    uv: NDArray[np.float32]
    """(n, 2), v upwards."""
    texture: NDArray[np.uint8]
    """(px, px, 3) sRGB; its first row is at v = 1."""
    decimated_by: str
    """The library that removed faces."""
    measured: dict[str, float] = field(default_factory=dict)
    """Seconds by step."""


class Engine(ABC):
    """Turns views into geometry. Its attributes say what it can do; the last two add methods of their own."""

    version: str
    """Part of the cache key: a new one for other results."""
    needs: Needs
    """The needs that a capture must meet."""
    exporter: ExporterName
    """The exporter that `auto` means."""
    has_weights: bool
    """True if it loads weights."""
    closed: bool
    """True if its surfaces are closed and without defects."""
    shares_model: bool
    """True if one loaded model takes capture after capture; False if each process runs its own."""
    makes_gaussians: bool = False
    """True if its outputs hold 3D gaussians (`gaussians`, `splat_ply`)."""
    exports_in_process: bool = False
    """True if its model's process has an exporter (`to_glb`)."""

    @abstractmethod
    def missing(self) -> str | None:
        """Say why it cannot run on this machine, None if it can. A quick look that leaves out the weights."""

    @abstractmethod
    def most_views(self, parameters: InferParameters) -> int | None:
        """Return the number of views that it takes; None for any number."""

    @abstractmethod
    def reconstruct(self, views: Sequence[View], parameters: InferParameters, progress: Progress) -> Output:
        """Reconstruct the views; `progress` is told the share that is done, 0 to 1, and on which of several GPUs."""

    def models_at_once(self) -> int:
        """The number of captures that its models take at the same time: one for each GPU that this process sees."""
        return 1

    def ask(self, request: Any, progress: Progress) -> Any:
        """Ask whichever of its models is free; of engines that share their models."""
        raise NotImplementedError

    def use_models_of(self, ask: Callable[[Any], Any]) -> None:
        """From now on ask the models of another process, by a function that passes on what `ask` takes and gives."""
        raise NotImplementedError

    def colours(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        """RGB 0..1 (n, 3) of the vertices, from the tensors of a stored output; None if it has no colours."""
        return None

    def gaussians(self, stored: bytes, tensors: Mapping[str, NDArray[Any]]) -> Gaussians | None:
        """The gaussians of a stored output, given its tensors as well, in the engine's frame; None if it has none."""
        return None

    def splat_ply(self, stored: bytes, transform: NDArray[np.float64]) -> bytes:
        """The gaussians of a stored output as a .ply for splat viewers; transform: 4x4 similarity to its frame."""
        raise NotImplementedError

    def to_glb(self, stored: bytes, simplify: float, texture_px: int) -> Textured:
        """Texture a stored output in the model's process; simplify: share of faces removed, 0 to less than 1."""
        raise NotImplementedError
