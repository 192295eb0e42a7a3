"""Formats: a converted file loads back the same; a format that fails is left out and the others are written."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from tasks.geometry.texture import unwrap
from tasks.mesh.convert import convert, load_glb, write_obj, write_ply
from tasks.mesh.export import glb_of

TEXTURE_PX = 64


@pytest.fixture(scope="module")
def glb() -> bytes:
    """A textured ball whose red grows with u and whose green grows downwards."""
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.1)
    ramp = np.linspace(0, 255, TEXTURE_PX).astype(np.uint8)
    texture = np.dstack([*np.meshgrid(ramp, ramp), np.full((TEXTURE_PX, TEXTURE_PX), 90, np.uint8)])
    return glb_of(unwrap(ball.vertices, ball.faces, TEXTURE_PX), texture)


def texture_of(mesh: trimesh.Trimesh) -> np.ndarray:
    material = mesh.visual.material
    image = material.image if hasattr(material, "image") else material.baseColorTexture
    return np.asarray(image.convert("RGB"))


def test_obj_loads_back_with_the_same_vertices_and_texture(glb: bytes, tmp_path: Path) -> None:
    assert convert({"obj": partial(write_obj, load_glb(glb))}, tmp_path) == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mesh.mtl", "mesh.obj", "mesh.png"]
    original, loaded = load_glb(glb), trimesh.load_mesh(tmp_path / "mesh.obj", process=False)
    corners, loaded_corners = original.vertices[original.faces], loaded.vertices[loaded.faces]
    assert np.abs(corners - loaded_corners).max() < 1e-7
    uv, loaded_uv = original.visual.uv[original.faces], loaded.visual.uv[loaded.faces]
    assert np.abs(uv - loaded_uv).max() < 1e-6
    assert (texture_of(original) == texture_of(loaded)).all()
    assert "Kd 1.0" in (tmp_path / "mesh.mtl").read_text()


def test_ply_loads_back_with_the_same_vertices_and_the_colours_of_the_texture(glb: bytes, tmp_path: Path) -> None:
    assert convert({"ply": partial(write_ply, load_glb(glb))}, tmp_path) == ()
    original, loaded = load_glb(glb), trimesh.load_mesh(tmp_path / "mesh.ply", process=False)
    assert np.abs(original.vertices - loaded.vertices).max() < 1e-7
    assert (original.faces == loaded.faces).all()
    red_wanted = 255 * original.visual.uv[:, 0]
    assert np.abs(loaded.visual.vertex_colors[:, 0] - red_wanted).mean() < 6
    assert (loaded.visual.vertex_colors[:, 2] == 90).all()


def test_a_format_that_fails_is_left_out_and_said(glb: bytes, tmp_path: Path) -> None:
    def half_written(folder: Path) -> None:
        (folder / "mesh.obj").write_text("v 0 0")
        raise ValueError("no space for vt")

    failures = convert({"ply": partial(write_ply, load_glb(glb)), "obj": half_written}, tmp_path)
    assert [(failure.format, failure.reason) for failure in failures] == [("obj", "ValueError: no space for vt")]
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.ply"]


def test_the_glb_is_closed_and_matt(glb: bytes) -> None:
    loaded = load_glb(glb)
    material = loaded.visual.material
    assert (material.metallicFactor, material.roughnessFactor) == (0.0, 1.0)
    assert isinstance(material.baseColorTexture, Image.Image)
    lengths = np.linalg.norm(loaded.vertex_normals, axis=1)
    assert np.abs(lengths - 1).max() < 1e-5
