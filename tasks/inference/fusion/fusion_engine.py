"""The `fusion` engine as tasks.inference.registry lists it: RGB-D fusion on the CPU, in the capture's own frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from tasks.capture.capture_checks import Needs
from tasks.capture.views import View
from tasks.inference.engine import Engine, SurfaceFacts
from tasks.inference.fusion.fuse import FUSION_VERSION, MIN_VIEWS, MOST_VIEWS, fuse
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
    surface: SurfaceFacts
    """The measurements"""
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
        return MOST_VIEWS

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> Fused:
        fused = fuse(views, parameters.fusion, progress)
        facts = SurfaceFacts(
            subject=fused.subject,
            depth_step_m=float(fused.sensor.step_at(fused.distance_m)),
            noise_m=float(fused.sensor.at(fused.distance_m)),
            noise_m_at_1m=float(fused.sensor.at(1.0)),
            spread_m=fused.spread_m,
            voxel_m=fused.voxel_m,
            invented_share=fused.invented_share,
        )
        return Fused(fused.vertices, fused.faces, fused.views, facts)
