"""The `fusion` engine as tasks.inference.registry lists it: RGB-D fusion on the CPU, in the capture's own frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from tasks.capture.capture_checks import Needs
from tasks.capture.views import View
from tasks.inference.engine import Engine
from tasks.inference.fusion.fuse import FUSION_VERSION, MIN_VIEWS, fuse
from tasks.settings import ExporterName, InferParameters


@dataclass(frozen=True)
class Fused:
    """A surface in the capture's own frame."""

    vertices: NDArray[np.float32]
    """(n, 3) metres"""
    faces: NDArray[np.int32]
    """(m, 3)"""
    views: tuple[str, ...]
    """Names of the views that were fused"""
    colours = None
    reduced = False
    to_capture = np.eye(4)

    def to_safetensors(self) -> bytes:
        return save({"vertices": self.vertices, "faces": self.faces})


class Fusion(Engine):
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
