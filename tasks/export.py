"""export_glb: raw geometry becomes a closed, textured GLB with a PBR material."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from tasks.capture.stages import Capture
from tasks.inference.infer import Geometry, Reconstruction
from tasks.settings import ExportParameters
from tasks.stage import retried, stage
from tasks.store import StoredResult, store
from tasks.surface import repair, simplify
from tasks.texture import Unwrapped, bake, unwrap, vertex_normals

GLB = "mesh.glb"
EXPORT_RETRIES = 1

# glTF is y-up: capture (x, y, z) -> (x, z, -y)
CAPTURE_TO_GLTF = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)


class Mesh(StoredResult):
    """`mesh.glb`: y-up, metres where `metric`. texture_coverage: share of the surface's texels that a view saw."""

    exporter: str
    texture_px: int
    texture_coverage: float
    metric: bool

    def glb(self) -> bytes:
        return store().read(self, GLB)


def _export_key(reconstruction: Reconstruction, capture: Capture, parameters: ExportParameters) -> Any:
    return [reconstruction.key, parameters]


@stage(key=_export_key, version="1", **retried(EXPORT_RETRIES))
def export_glb(folder: Path, reconstruction: Reconstruction, capture: Capture, parameters: ExportParameters) -> Mesh:
    """Simplify, repair, unwrap and bake the texture from the views."""
    geometry = reconstruction.geometry()
    vertices, faces = repair(*simplify(*_in_capture_frame(geometry), parameters.faces))
    unwrapped = unwrap(vertices, faces, parameters.texture_px)
    texture, coverage = bake(unwrapped, capture.views(reconstruction.views), parameters.texture_px)
    (folder / GLB).write_bytes(glb_of(unwrapped, texture))
    return Mesh(
        exporter="native",
        texture_px=parameters.texture_px,
        texture_coverage=coverage,
        metric=geometry.to_capture is not None,
    )


def _in_capture_frame(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    if geometry.to_capture is None:
        return geometry.vertices, geometry.faces
    vertices = trimesh.transform_points(geometry.vertices, geometry.to_capture)
    return vertices.astype(np.float32), geometry.faces


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
