"""Smoothing of fused surfaces: noise goes, curved shapes and edges stay."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.geometry.fairing import without_noise
from tasks.geometry.mesh_repair import is_closed
from tests.synthetic import SHAPES
from tests.synthetic.shapes import OBJECT_HALF, field_mesh

NOISE = 0.0005  # metres
CELLS = 90


@pytest.mark.parametrize("shape", ["sphere", "rounded_box"])
def test_noise_is_taken_out_and_the_shape_stays(shape: str) -> None:
    mesh = field_mesh(SHAPES[shape], OBJECT_HALF, CELLS)
    noise = NOISE * np.random.default_rng(0).standard_normal((len(mesh.vertices), 1))
    faces = mesh.faces.astype(np.int32)
    smooth = without_noise(mesh.vertices + noise * mesh.vertex_normals, faces, NOISE)
    error = SHAPES[shape](smooth)
    assert is_closed(faces) and smooth.shape == mesh.vertices.shape
    assert error.std() < 0.3 * NOISE
    assert abs(error.mean()) < 0.05 * NOISE  # plain smoothing would draw it to the inner side


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_a_mesh_without_noise_keeps_its_edges(noise: float) -> None:
    mesh = field_mesh(SHAPES["rounded_box"], OBJECT_HALF, CELLS)
    smooth = without_noise(mesh.vertices, mesh.faces.astype(np.int32), noise)
    assert np.abs(smooth - mesh.vertices).max() <= 2 * noise + 1e-7
