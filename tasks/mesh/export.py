"""The stage `export_glb`: raw geometry becomes a closed, textured GLB with a PBR material. The flows run it."""

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

from tasks.cameras.find_cameras import CaptureCameras
from tasks.capture.stage_capture import Capture
from tasks.errors import ExportFailed, InputError
from tasks.geometry.simplification import simplify, simplify_open
from tasks.geometry.solids import solidify
from tasks.geometry.surface_distance import SurfaceDistance
from tasks.geometry.texture import Unwrapped, VertexColours, bake, unwrap, vertex_normals
from tasks.inference.engine import SurfaceFacts
from tasks.inference.reconstruction import Reconstruction
from tasks.inference.registry import ENGINES, EngineChoice, require_engine
from tasks.settings import ExporterName, ExportParameters
from tasks.stage import retried, stage
from tasks.store.results import StoredResult, store

GLB = "mesh.glb"
EXPORT_RETRIES = 1
FAST_SIMPLIFICATION = "fast-simplification"

# glTF is y-up: capture (x, y, z) -> (x, z, -y)
CAPTURE_TO_GLTF = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)


class Mesh(StoredResult):
    """The textured mesh: `mesh.glb`, y-up."""

    exporter: ExporterName
    """The exporter that made it."""
    decimated_by: str
    """The library that removed faces."""
    texture_px: int
    """Width and height of the texture, in pixels."""
    texture_coverage: float | None
    """Share of the surface's texels that a view saw, 0 to 1; None if the texture is not made from the views."""
    metric: bool
    """True if it is in the capture's frame and in metres; False if its size is unknown."""
    export_error: SurfaceDistance | None = None
    """Distance from the dense surface; None, as the next two, if the engine's own exporter removed the faces."""
    export_limit_m: float | None = None
    """Limit of the 99.9th percentile of that distance, in metres."""
    face_budget: int | None = None
    """Number of faces that was asked for."""
    surface: SurfaceFacts | None = None
    """The engine's measurements on the surface; None if it measures nothing."""

    def glb(self) -> bytes:
        """`mesh.glb`, read from the store."""
        return store().read(self, GLB)


def exporter_of(engine: EngineChoice, parameters: ExportParameters) -> ExporterName:
    """Return the exporter that is asked for; `auto`: the engine's choice. Raises InputError if the engine lacks it."""
    runs = ENGINES[engine.name]
    chosen = runs.exporter if parameters.exporter == "auto" else parameters.exporter
    if chosen != "native" and not runs.exports_in_process:
        raise InputError(f"export.exporter={chosen}: engine {engine.name} makes no gaussians; use native")
    return chosen


def exports_in_process(engine: EngineChoice, parameters: ExportParameters) -> bool:
    """Return whether the export runs in the process of the engine's model, so where the inference runs."""
    return exporter_of(engine, parameters) != "native"


def _export_key(
    reconstruction: Reconstruction, capture: Capture, cameras: CaptureCameras, parameters: ExportParameters
) -> Any:
    return [reconstruction.key, reconstruction.views, cameras.key, parameters]


@stage(key=_export_key, version="3", **retried(EXPORT_RETRIES))
def export_glb(
    folder: Path,
    reconstruction: Reconstruction,
    capture: Capture,
    cameras: CaptureCameras,
    parameters: ExportParameters,
) -> Mesh:
    """Make the textured GLB: by our own steps (native), or by the engine's exporter in its model's process."""
    if exports_in_process(reconstruction.engine, parameters):
        exported = _in_process(reconstruction, parameters)
    else:
        exported = _native(reconstruction, capture, cameras, parameters)
    (folder / GLB).write_bytes(glb_of(exported.unwrapped, exported.texture))
    return Mesh(
        exporter=exporter_of(reconstruction.engine, parameters),
        decimated_by=exported.decimated_by,
        texture_px=parameters.texture_px,
        texture_coverage=exported.coverage,
        metric=reconstruction.to_capture is not None,
        export_error=exported.error,
        export_limit_m=exported.limit,
        face_budget=parameters.faces if exported.error else None,
        surface=reconstruction.surface,
    )


@dataclass(frozen=True)
class _Exported:
    """A textured surface, z-up; in the capture's frame if that is known, else in the engine's."""

    unwrapped: Unwrapped
    texture: NDArray[np.uint8]  # (px, px, 3) sRGB
    coverage: float | None  # as Mesh.texture_coverage
    decimated_by: str
    error: SurfaceDistance | None = None
    limit: float | None = None


def _native(
    reconstruction: Reconstruction, capture: Capture, cameras: CaptureCameras, parameters: ExportParameters
) -> _Exported:
    """Simplify, close, unwrap and bake the texture.

    The texture comes from the views if the mesh lies in their frame; what they do not show, and any other mesh, gets
    the colours of the gaussians, or else of the dense mesh.
    """
    geometry, to_capture = reconstruction.geometry(), reconstruction.similarity()
    dense = in_capture_frame(geometry.vertices, to_capture)
    colours = None if geometry.colours is None else VertexColours(dense, geometry.colours)
    gaussians = geometry.gaussians
    if gaussians is not None and to_capture is not None:
        gaussians = gaussians.moved(to_capture)
    surface = reconstruction.surface
    subject, noise = (None, 0.0) if surface is None else (surface.subject, surface.spread_m)
    try:
        solid = (dense, geometry.faces)
        if not ENGINES[reconstruction.engine.name].closed:
            solid = solidify(*solid, parameters.faces)
        if subject is not None and subject.kind == "surface":
            simplified = simplify_open(*solid, parameters.faces, noise)
        else:
            simplified = simplify(*solid, parameters.faces, noise)
    except ValueError as error:
        raise ExportFailed(f"{capture.id}: {error}") from error
    unwrapped = unwrap(simplified.vertices, simplified.faces, parameters.texture_px)
    seen = () if to_capture is None else cameras.views_of(capture, reconstruction.views)
    views = [view.of(subject) for view in seen if view.camera is not None]
    texture, coverage = bake(unwrapped, views, parameters.texture_px, colours, gaussians)
    return _Exported(unwrapped, texture, coverage, FAST_SIMPLIFICATION, simplified.error, simplified.limit)


def _in_process(reconstruction: Reconstruction, parameters: ExportParameters) -> _Exported:
    """Export with the engine's own exporter."""
    require_engine(reconstruction.engine)
    engine = ENGINES[reconstruction.engine.name]
    textured = engine.to_glb(reconstruction.safetensors(), parameters.simplify, parameters.texture_px)
    vertices = in_capture_frame(textured.vertices, reconstruction.similarity())
    _, source = np.unique(vertices, axis=0, return_inverse=True)  # smooth normals across the seams
    unwrapped = Unwrapped(vertices, textured.faces, textured.uv, source.reshape(-1).astype(np.int32))
    return _Exported(unwrapped, textured.texture, None, textured.decimated_by)


def in_capture_frame(vertices: NDArray[np.float32], to_capture: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """Move vertices (n, 3) by a 4x4 similarity; without one they stay."""
    if to_capture is None:
        return vertices
    moved: NDArray[np.float32] = trimesh.transform_points(vertices, to_capture).astype(np.float32)
    return moved


def glb_of(unwrapped: Unwrapped, texture: NDArray[np.uint8]) -> bytes:
    """Make a GLB, y-up, with smooth normals and a matt PBR material, of a z-up surface; texture: (px, px, 3) sRGB."""
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
