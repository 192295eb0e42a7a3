"""How far a mesh is from the true one, in shape and in colour. Used by tests and benchmarks."""

from __future__ import annotations

import numpy as np
import point_cloud_utils as pcu
import trimesh
from numpy.typing import NDArray


def chamfer(published: trimesh.Trimesh, truth: trimesh.Trimesh, samples: int = 100_000) -> float:
    """Mean of the two directed mean point-to-surface distances, in the meshes' unit."""
    return float(np.mean([distances.mean() for distances in _surface_distances(published, truth, samples)]))


def f_score(published: trimesh.Trimesh, truth: trimesh.Trimesh, threshold: float, samples: int = 100_000) -> float:
    """Harmonic mean of precision and recall: shares of either surface within `threshold` of the other."""
    precision, recall = (float((d <= threshold).mean()) for d in _surface_distances(published, truth, samples))
    return 2 * precision * recall / max(precision + recall, np.finfo(float).tiny)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Peak signal-to-noise ratio of two 8-bit images (h, w, 3) over the masked pixels, decibels."""
    error = np.square(a[mask].astype(float) - b[mask].astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def glb_to_capture_frame(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A copy of a y-up glTF mesh in the z-up capture frame: (x, y, z) -> (x, -z, y)."""
    turned = mesh.copy()
    turned.apply_transform(np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float))
    return turned


def _surface_distances(
    a: trimesh.Trimesh, b: trimesh.Trimesh, samples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of points sampled on `a` to the surface of `b`, and the reverse, (samples,) each."""

    def directed(source: trimesh.Trimesh, target: trimesh.Trimesh) -> NDArray[np.float64]:
        points, _ = trimesh.sample.sample_surface(source, samples, seed=0)
        faces = np.ascontiguousarray(target.faces, np.int64)
        distances, _, _ = pcu.closest_points_on_mesh(np.ascontiguousarray(points), np.array(target.vertices), faces)
        return np.asarray(distances, np.float64)

    return directed(a, b), directed(b, a)
