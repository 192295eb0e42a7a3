"""How far two triangle meshes lie apart, in both directions. Called by the simplification."""

from __future__ import annotations

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.spatial import cKDTree

from tasks.geometry.mesh_repair import Faces, Vertices, face_normals

SAMPLES = 20_000  # on each surface
NEAREST = 2  # samples of the other surface whose faces are looked at, beside what lies along the normal
CHUNK = 20_000  # pairs of points and faces worked on at once: fits the caches


class SurfaceDistance(BaseModel):
    """Distance of two surfaces: of points of each to the other one, both directions together."""

    model_config = ConfigDict(frozen=True)

    mean_m: float = Field(description="Mean distance, metres where the mesh is metric.")
    p999_m: float = Field(description="99.9th percentile of the distances, metres where the mesh is metric.")
    mean_share: float = Field(description="Mean distance as a share of the bounding box's diagonal.")
    p999_share: float = Field(description="99.9th percentile as a share of the bounding box's diagonal.")


class SampledSurface:
    """A mesh with points spread over it by area, ready to be measured against others. The points are the same ones
    every time."""

    def __init__(self, vertices: Vertices, faces: Faces) -> None:
        self.middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
        self.size = float(np.ptp(vertices, axis=0).max())
        self.diagonal = float(np.linalg.norm(np.ptp(vertices, axis=0)))
        self.triangles = vertices[faces].astype(np.float64)
        normals = face_normals(vertices, faces)
        area = np.linalg.norm(normals, axis=1)
        steps = (np.arange(SAMPLES) + 0.5) / SAMPLES
        self.source = np.searchsorted(np.cumsum(area) / area.sum(), steps).clip(max=len(faces) - 1)
        self.normals = normals[self.source] / np.maximum(area[self.source, None], np.finfo(float).tiny)
        across, along = np.random.default_rng(0).random((2, SAMPLES))
        across = np.sqrt(across)
        weights = np.column_stack([1 - across, across * (1 - along), across * along])
        self.points = np.einsum("kc,kcd->kd", weights, self.triangles[self.source])
        self._tree = cKDTree(self.points, balanced_tree=False, compact_nodes=False)
        # embree computes in float32: a centred scene of unit size keeps all of its digits
        self._rays = EmbreeScene(robust=True)
        TriangleMesh(self._rays, ((vertices - self.middle) / self.size).astype(np.float32), np.ascontiguousarray(faces))

    def distances_of(self, other: SampledSurface) -> NDArray[np.float64]:
        """Distances (k,) of another surface's points to this one: the least along their normals, either way, and to
        the faces of the nearest samples. A nearer face that neither finds makes them larger, never smaller."""
        origins = ((other.points - self.middle) / self.size).astype(np.float32)
        found = [self._rays.run(origins, (way * other.normals).astype(np.float32), output=True) for way in (1, -1)]
        along = [np.where(hits["primID"] >= 0, hits["tfar"] * self.size, np.inf) for hits in found]
        _, nearest = self._tree.query(other.points, k=NEAREST)
        faces, points = self.source[nearest].reshape(-1), np.repeat(other.points, NEAREST, axis=0)
        parts = np.array_split(np.arange(len(points)), max(1, len(points) // CHUNK))
        to_faces = np.concatenate([_point_to_triangle(points[part], self.triangles[faces[part]]) for part in parts])
        return np.asarray(np.minimum.reduce([*along, *to_faces.reshape(-1, NEAREST).T]), np.float64)


def surface_distance(one: SampledSurface, other: SampledSurface) -> SurfaceDistance:
    """Mean and 99.9th percentile of the distances of points of each surface to the other one."""
    distances = np.concatenate([one.distances_of(other), other.distances_of(one)])
    mean, p999 = float(distances.mean()), float(np.quantile(distances, 0.999))
    shares = (mean / one.diagonal, p999 / one.diagonal)
    return SurfaceDistance(mean_m=mean, p999_m=p999, mean_share=shares[0], p999_share=shares[1])


def _point_to_triangle(points: NDArray[np.float64], corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances of points (n, 3) to triangles (n, 3, 3)."""
    a, sides = corners[:, 0], np.roll(corners, -1, axis=1) - corners
    normals = np.cross(sides[:, 0], sides[:, 1])
    squared = np.maximum(np.einsum("nd,nd->n", normals, normals), np.finfo(float).tiny)
    height = np.einsum("nd,nd->n", points - a, normals)
    inside = np.ones(len(points), bool)
    nearest = np.full(len(points), np.inf)
    for corner in range(3):
        towards, side = points - corners[:, corner], sides[:, corner]
        inside &= np.einsum("nd,nd->n", np.cross(side, towards), normals) >= 0
        length = np.maximum(np.einsum("nd,nd->n", side, side), np.finfo(float).tiny)
        along = (np.einsum("nd,nd->n", towards, side) / length).clip(0, 1)
        gap = towards - along[:, None] * side
        nearest = np.minimum(nearest, np.einsum("nd,nd->n", gap, gap))
    return np.sqrt(np.where(inside, height**2 / squared, nearest))
