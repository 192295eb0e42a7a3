"""export_glb: raw geometry becomes a closed, textured GLB with a PBR material."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from tasks.capture.stage_capture import Capture
from tasks.errors import ExportFailed, InputError
from tasks.geometry.simplification import simplify
from tasks.geometry.solids import solidify
from tasks.geometry.surface_distance import SurfaceDistance
from tasks.geometry.texture import Unwrapped, VertexColours, bake, unwrap, vertex_normals
from tasks.inference.reconstruction import Reconstruction
from tasks.inference.registry import ENGINES, TRELLIS, EngineChoice, require_engine
from tasks.settings import ExporterName, ExportParameters
from tasks.stage import retried, stage
from tasks.store.results import StoredResult, store

GLB = "mesh.glb"
EXPORT_RETRIES = 1
FAST_SIMPLIFICATION = "fast-simplification"

# glTF is y-up: capture (x, y, z) -> (x, z, -y)
CAPTURE_TO_GLTF = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)


class Mesh(StoredResult):
    """`mesh.glb`: y-up, metres where `metric`.

    texture_coverage: share of the surface's texels that a view saw; None where the views did not paint it.
    decimated_by: the library that removed faces. export_error: distance from the dense surface, of which the 99.9th
    percentile should be at most export_limit_m; face_budget: what the faces should not exceed. All three are None if
    upstream's exporter removed the faces.
    """

    exporter: ExporterName
    decimated_by: str
    texture_px: int
    texture_coverage: float | None
    metric: bool
    export_error: SurfaceDistance | None = None
    export_limit_m: float | None = None
    face_budget: int | None = None

    def glb(self) -> bytes:
        return store().read(self, GLB)


def exporter_of(engine: EngineChoice, parameters: ExportParameters) -> ExporterName:
    """The exporter that is asked for, or the engine's own choice; raises InputError where it cannot be."""
    chosen = ENGINES[engine.name].exporter if parameters.exporter == "auto" else parameters.exporter
    if chosen == "to_glb" and engine.name != "trellis":
        raise InputError(f"export.exporter=to_glb: engine {engine.name} makes no gaussians; use native, or trellis")
    return chosen


def _export_key(reconstruction: Reconstruction, capture: Capture, parameters: ExportParameters) -> Any:
    return [reconstruction.key, reconstruction.views, parameters]


@stage(key=_export_key, version="1", **retried(EXPORT_RETRIES))
def export_glb(folder: Path, reconstruction: Reconstruction, capture: Capture, parameters: ExportParameters) -> Mesh:
    """Make the textured GLB: by our own steps (native), or by upstream's to_glb in the model's process."""
    exporter = exporter_of(reconstruction.engine, parameters)
    export = _to_glb if exporter == "to_glb" else _native
    exported = export(reconstruction, capture, parameters)
    (folder / GLB).write_bytes(glb_of(exported.unwrapped, exported.texture))
    return Mesh(
        exporter=exporter,
        decimated_by=exported.decimated_by,
        texture_px=parameters.texture_px,
        texture_coverage=exported.coverage,
        metric=reconstruction.to_capture is not None,
        export_error=exported.error,
        export_limit_m=exported.limit,
        face_budget=parameters.faces if exported.error else None,
    )


@dataclass(frozen=True)
class _Exported:
    """A textured surface, z-up, in the capture's frame where that is known."""

    unwrapped: Unwrapped
    texture: NDArray[np.uint8]
    coverage: float | None
    decimated_by: str
    error: SurfaceDistance | None = None
    limit: float | None = None


def _native(reconstruction: Reconstruction, capture: Capture, parameters: ExportParameters) -> _Exported:
    """Simplify, close, unwrap and bake the texture: from the views where the mesh lies in their frame, beneath them
    and elsewhere from the dense mesh's own colours."""
    geometry = reconstruction.geometry()
    dense = in_capture_frame(geometry.vertices, geometry.to_capture)
    colours = None if geometry.colours is None else VertexColours(dense, geometry.colours)
    try:
        solid = (dense, geometry.faces)
        if not ENGINES[reconstruction.engine.name].closed:
            solid = solidify(*solid, parameters.faces)
        simplified = simplify(*solid, parameters.faces)
    except ValueError as error:
        raise ExportFailed(f"{capture.id}: {error}") from error
    unwrapped = unwrap(simplified.vertices, simplified.faces, parameters.texture_px)
    views = [] if geometry.to_capture is None else capture.views(reconstruction.views)
    texture, coverage = bake(unwrapped, views, parameters.texture_px, colours)
    return _Exported(unwrapped, texture, coverage, FAST_SIMPLIFICATION, simplified.error, simplified.limit)


def _to_glb(reconstruction: Reconstruction, capture: Capture, parameters: ExportParameters) -> _Exported:
    """Upstream's exporter; its licences do not allow commercial use."""
    require_engine(reconstruction.engine)
    output = reconstruction.trellis_output()
    textured = TRELLIS.to_glb(output, parameters.simplify, parameters.texture_px)
    vertices = in_capture_frame(textured.vertices, output.to_capture)
    _, source = np.unique(vertices, axis=0, return_inverse=True)  # smooth normals across the seams
    unwrapped = Unwrapped(vertices, textured.faces, textured.uv, source.reshape(-1).astype(np.int32))
    return _Exported(unwrapped, textured.texture, None, textured.decimated_by)


def in_capture_frame(vertices: NDArray[np.float32], to_capture: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """Vertices (n, 3) by the similarity, where there is one."""
    if to_capture is None:
        return vertices
    moved: NDArray[np.float32] = trimesh.transform_points(vertices, to_capture).astype(np.float32)
    return moved


def glb_of(unwrapped: Unwrapped, texture: NDArray[np.uint8]) -> bytes:
    """A GLB, y-up, with smooth normals and a matt PBR material; texture (px, px, 3) uint8 sRGB."""
    material = PBRMaterial(
        name="mesh",
        baseColorTexture=Image.fromarray(texture),
        baseColorFactor=[255, 255, 255, 255],
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    mesh = trimesh.Trimesh(
        unwrapped.vertices @ CAPTURE_TO_GLTF.T,
        unwrapped.faces,
        vertex_normals=vertex_normals(unwrapped) @ CAPTURE_TO_GLTF.T,
        visual=TextureVisuals(uv=unwrapped.uv, material=material),
        process=False,
    )
    glb: bytes = trimesh.Scene({"mesh": mesh}).export(file_type="glb", include_normals=True)
    return glb
