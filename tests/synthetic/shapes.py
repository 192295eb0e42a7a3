"""Solids of known shape and colour. Used by the captures of this package and by tests of geometry."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import trimesh
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from tasks.geometry.render import Hits

Points = NDArray[np.floating]
Field = Callable[[Points], NDArray[np.floating]]
"""A function of position: (n, 3) metres -> (n,) signed distance, or (n, 3) colours in 0..255 sRGB."""

# Off the origin, so that nothing may assume a centred object; metres, in the capture's z-up world
OBJECT_CENTRE = np.array([0.05, -0.03, 0.10])
OBJECT_HALF = 0.17  # half the side of a cube that holds every shape
GRID = 150  # marching-cubes cells along that cube: facets stray some 10 um from the true surface


def solid_colours(field: Field) -> Callable[[Hits], NDArray[np.float32]]:
    """Colours for a `RayScene` that are a function of position alone, so every view agrees on them."""
    return lambda hits: field(hits.points).astype(np.float32)


def pattern(points: Points) -> NDArray[np.floating]:
    """The colours of every shape: a slow change of hue with 2 cm markings of soft edge on it, (n, 3) in 0..255."""
    p = points - OBJECT_CENTRE
    slow = 150 + 70 * np.cos(2 * np.pi * p / 0.35 + np.array([0.0, 2.1, 4.2]))
    waves = np.sin(p[:, 0] * 150) * np.cos(p[:, 1] * 150)
    waves += np.sin(p[:, 1] * 150) * np.cos(p[:, 2] * 150) + np.sin(p[:, 2] * 150) * np.cos(p[:, 0] * 150)
    return slow * (0.8 + 0.2 * np.tanh(4 * waves))[:, None]


def sphere(p: Points) -> NDArray[np.floating]:
    return np.linalg.norm(p, axis=1) - 0.15


def rounded_box(p: Points) -> NDArray[np.floating]:
    q = np.abs(p) - (np.array([0.15, 0.11, 0.07], p.dtype) - 0.02)
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0) - 0.02


def torus(p: Points) -> NDArray[np.floating]:
    return np.hypot(np.hypot(p[:, 0], p[:, 1]) - 0.10, p[:, 2]) - 0.05


def bowl(p: Points) -> NDArray[np.floating]:
    """A hollow ball cut open above, 24 mm thick, with a round rim (https://iquilezles.org/articles/distfunctions)."""
    radius, height, half_wall = 0.138, 0.05, 0.012
    rim = np.sqrt(radius**2 - height**2)
    r, z = np.hypot(p[:, 0], p[:, 1]), p[:, 2]
    above = height * r < rim * z
    return np.where(above, np.hypot(r - rim, z - height), np.abs(np.hypot(r, z) - radius)) - half_wall


SHAPES: dict[str, Field] = {"sphere": sphere, "rounded_box": rounded_box, "torus": torus, "concave": bowl}


@lru_cache
def shape_mesh(shape: str) -> trimesh.Trimesh:
    """One of `SHAPES` as a watertight mesh in the capture frame."""
    mesh = field_mesh(SHAPES[shape], OBJECT_HALF, GRID)
    mesh.apply_translation(OBJECT_CENTRE)
    return mesh


def field_mesh(field: Field, half: float, cells: int) -> trimesh.Trimesh:
    """The zero level of a signed distance within a cube of side 2 * half about the origin, vertices exactly on it."""
    axis = np.linspace(-half, half, cells + 1, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    values = field(grid.reshape(-1, 3)).reshape(grid.shape[:3])
    spacing = 2 * half / cells
    vertices, faces, _, _ = marching_cubes(values, 0.0, spacing=(spacing,) * 3, gradient_direction="descent")
    vertices = vertices.astype(np.float64) - half
    for _ in range(2):  # Newton steps along the gradient take out what the cells' linear interpolation missed
        gradient = _gradient(field, vertices)
        vertices -= field(vertices)[:, None] * gradient / np.square(gradient).sum(axis=1, keepdims=True)
    return trimesh.Trimesh(vertices, faces, process=False)


def _gradient(field: Field, points: NDArray[np.float64], step: float = 1e-5) -> NDArray[np.float64]:
    offsets = np.eye(3) * step
    return np.column_stack([field(points + offset) - field(points - offset) for offset in offsets]) / (2 * step)
