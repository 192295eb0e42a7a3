"""A mesh as samples of its surface, which `search` compares with the evidence of the views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

MAX_SAMPLES = 30_000
EXTREME_DIRECTIONS = 512  # in which the mesh's outermost vertices are known
SPACINGS = 2.0  # hardly a place on the mesh is further than this many mean spacings from a sample
# Products of matrices this small start no threads in OpenBLAS, whose overhead is many times the work
CHUNK_POINTS, CHUNK_DIRECTIONS = 1024, 64


@dataclass(frozen=True)
class MeshSamples:
    """A mesh for matching: samples spread evenly over it, in the canonical frame and its unit."""

    points: Floats
    """(n, 3), in random order"""
    normals: Floats
    """(n, 3), of unit length, outward"""
    colours: Floats | None
    """(n, 3) RGB in 0..1; None for a mesh without"""
    tree: cKDTree
    """of the points"""
    spacing: float
    """Hardly a place on the mesh is further than this from a sample"""
    extremes: Floats
    """(e, 3), the outermost vertices of the mesh"""

    @property
    def diagonal(self) -> float:
        """Of the mesh's bounding box."""
        return float(np.linalg.norm(np.ptp(self.extremes, axis=0)))

    def thinned(self, limit: int) -> MeshSamples:
        """The first `limit` samples only; as their order is random, these are spread evenly as well."""
        points = self.points[:limit]
        colours = None if self.colours is None else self.colours[:limit]
        spacing = self.spacing * float(np.sqrt(len(self.points) / len(points)))
        return MeshSamples(points, self.normals[:limit], colours, cKDTree(points), spacing, self.extremes)


def sampled(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], colours: NDArray[np.floating] | None
) -> MeshSamples:
    """Samples spread over the mesh by area (stratified, in random order), with normals that face outwards."""
    corners = vertices.astype(np.float64)[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    doubled = np.linalg.norm(normals, axis=1)
    reach = doubled.cumsum()
    rng = np.random.default_rng(0)
    at = (rng.permutation(MAX_SAMPLES) + rng.random(MAX_SAMPLES)) / MAX_SAMPLES
    face = np.searchsorted(reach, at * reach[-1]).clip(max=len(faces) - 1)
    u, v = rng.random((2, MAX_SAMPLES))
    root = np.sqrt(u)
    weights = np.column_stack([1 - root, root * (1 - v), root * v])
    points = np.einsum("nc,ncd->nd", weights, corners[face])
    painted = None
    if colours is not None:
        painted = np.einsum("nc,ncd->nd", weights, colours.astype(np.float64)[faces[face]])
    outward = 1.0 if np.einsum("nd,nd->", corners.mean(axis=1), normals) >= 0 else -1.0
    unit = outward * normals[face] / np.maximum(doubled[face], np.finfo(float).tiny)[:, None]
    spacing = SPACINGS * float(np.sqrt(reach[-1] / 2 / MAX_SAMPLES))
    return MeshSamples(points, unit, painted, cKDTree(points), spacing, _extremes(vertices))


def _extremes(vertices: NDArray[np.floating]) -> Floats:
    """The outermost vertices, (e, 3): those furthest in one of many directions."""
    furthest = furthest_along(spread_directions(EXTREME_DIRECTIONS).astype(np.float32), vertices.astype(np.float32))[0]
    return np.asarray(vertices[np.unique(furthest)], np.float64)


def furthest_along(
    directions: NDArray[np.floating], points: NDArray[np.floating]
) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """Index of the point (n, 3) that is furthest along each direction (k, 3), and how far that is, (k,) each."""
    index, reach = np.zeros(len(directions), np.intp), np.full(len(directions), -np.inf, points.dtype)
    for start in range(0, len(points), CHUNK_POINTS):
        some = points[start : start + CHUNK_POINTS]
        for first in range(0, len(directions), CHUNK_DIRECTIONS):
            chunk = slice(first, first + CHUNK_DIRECTIONS)
            heights = directions[chunk] @ some.T
            best = heights.argmax(axis=1)
            highest = heights[np.arange(len(best)), best]
            index[chunk] = np.where(highest > reach[chunk], start + best, index[chunk])
            reach[chunk] = np.maximum(reach[chunk], highest)
    return index, reach


def spread_directions(count: int) -> Floats:
    """Evenly spread unit vectors (count, 3): a Fibonacci lattice."""
    index = np.arange(count)
    z = 1 - (2 * index + 1) / count
    angle = index * np.pi * (3 - np.sqrt(5))
    return np.column_stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z])
