"""The stage `convert_formats`: the GLB as OBJ and PLY and, on request, the engine's gaussians. The flows run it.

All files share the GLB's frame.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image
from pydantic import BaseModel, ConfigDict
from trimesh.exchange.obj import export_obj
from trimesh.visual.material import SimpleMaterial
from trimesh.visual.texture import TextureVisuals

from tasks.errors import ExportFailed, InputError
from tasks.inference.reconstruction import Reconstruction
from tasks.inference.registry import ENGINES
from tasks.mesh.export import CAPTURE_TO_GLTF, Mesh
from tasks.settings import MeshFormat
from tasks.stage import retried, stage
from tasks.store.results import StoredResult

logger = logging.getLogger(__name__)

CONVERT_RETRIES = 1
SPLAT = "splat.ply"


class FormatFailure(BaseModel):
    """A format that could not be written."""

    model_config = ConfigDict(frozen=True)

    format: MeshFormat
    """Its name."""
    reason: str
    """The error, for people."""


class Formats(StoredResult):
    """The mesh in further formats. A format that fails is left out; the others are there."""

    failures: tuple[FormatFailure, ...]
    """The formats that are left out."""


def load_glb(data: bytes) -> trimesh.Trimesh:
    """Load the one mesh of a GLB, with its vertices as stored (not merged)."""
    return trimesh.load_mesh(io.BytesIO(data), file_type="glb", process=False)


def write_obj(mesh: trimesh.Trimesh, folder: Path) -> None:
    """Write mesh.obj, mesh.mtl and the texture mesh.png."""
    material = SimpleMaterial(image=_texture(mesh), diffuse=[255, 255, 255, 255], name="mesh")
    textured = mesh.copy()
    textured.visual = TextureVisuals(uv=mesh.visual.uv, material=material)
    text, side_files = export_obj(textured, return_texture=True, mtl_name="mesh.mtl", include_normals=True)
    for name, data in side_files.items():
        (folder / name).write_bytes(data)
    (folder / "mesh.obj").write_text(text)


def write_ply(mesh: trimesh.Trimesh, folder: Path) -> None:
    """Write mesh.ply, binary, with the texture's colour at every vertex: the format has no texture."""
    coloured = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False, vertex_normals=mesh.vertex_normals)
    coloured.visual = mesh.visual.to_color()
    (folder / "mesh.ply").write_bytes(coloured.export(file_type="ply"))


def write_splat(reconstruction: Reconstruction, folder: Path) -> None:
    """Write splat.ply: the engine's 3D gaussians, for splat viewers. Raises InputError if the engine makes none."""
    engine, to_capture = ENGINES[reconstruction.engine.name], reconstruction.similarity()
    if not engine.makes_gaussians:
        raise InputError(f"engine {reconstruction.engine.name} makes no gaussians")
    to_file = np.eye(4)
    to_file[:3, :3] = CAPTURE_TO_GLTF
    if to_capture is not None:
        to_file = to_file @ to_capture
    (folder / SPLAT).write_bytes(engine.splat_ply(reconstruction.safetensors(), to_file))


def convert(writers: Mapping[MeshFormat, Callable[[Path], None]], folder: Path) -> tuple[FormatFailure, ...]:
    """Write every format; return those that could not be written, of which no file is left."""
    failures = []
    for name, write in sorted(writers.items()):
        try:
            _convert(write, folder)
        except ExportFailed as error:
            logger.warning("format %s is left out: %s", name, error)
            failures.append(FormatFailure(format=name, reason=str(error)))
    return tuple(failures)


def _convert_key(mesh: Mesh, reconstruction: Reconstruction, formats: tuple[MeshFormat, ...]) -> Any:
    return [mesh.outputs, sorted(set(formats)), reconstruction.outputs if "splat" in formats else None]


@stage(key=_convert_key, version="1", **retried(CONVERT_RETRIES))
def convert_formats(
    folder: Path, mesh: Mesh, reconstruction: Reconstruction, formats: tuple[MeshFormat, ...]
) -> Formats:
    """Write every format that is asked for; a format that fails is left out and listed in the result."""
    loaded = load_glb(mesh.glb())
    writers: dict[MeshFormat, Callable[[Path], None]] = {
        "obj": partial(write_obj, loaded),
        "ply": partial(write_ply, loaded),
        "splat": partial(write_splat, reconstruction),
    }
    failures = convert({name: writers[name] for name in formats}, folder)
    return Formats(failures=failures, reusable=not failures)


def _convert(write: Callable[[Path], None], folder: Path) -> None:
    """Write one format. Any error removes the format's files and is raised as ExportFailed."""
    before = set(folder.iterdir())
    try:
        write(folder)
    except Exception as error:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        raise ExportFailed(f"{type(error).__name__}: {error}") from error


def _texture(mesh: trimesh.Trimesh) -> Image.Image:
    return mesh.visual.material.baseColorTexture
