"""How far a mesh is from the true one, in shape and in colour. Used by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import point_cloud_utils as pcu
import trimesh
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab

from tasks.capture.camera import Camera
from tasks.geometry.render import RayScene, depth_map, render


def chamfer(
    published: trimesh.Trimesh, truth: trimesh.Trimesh, samples: int = 100_000, *, above: float = -np.inf
) -> float:
    """Mean of the two directed mean point-to-surface distances, in the meshes' unit.

    above: only points of either surface with a larger z are measured.
    """
    return float(np.mean([distances.mean() for distances in _surface_distances(published, truth, samples, above)]))


def f_score(
    published: trimesh.Trimesh,
    truth: trimesh.Trimesh,
    threshold: float,
    samples: int = 100_000,
    *,
    above: float = -np.inf,
) -> float:
    """Harmonic mean of precision and recall: shares of either surface within `threshold` of the other.

    above: only points of either surface with a larger z count.
    """
    distances = _surface_distances(published, truth, samples, above)
    precision, recall = (float((d <= threshold).mean()) for d in distances)
    return 2 * precision * recall / max(precision + recall, np.finfo(float).tiny)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Peak signal-to-noise ratio of two 8-bit images (h, w, 3) over the masked pixels, decibels."""
    error = np.square(a[mask].astype(float) - b[mask].astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def colour_error(
    published: trimesh.Trimesh, truth: trimesh.Trimesh, painted: RayScene, cameras: Sequence[Camera]
) -> float:
    """Mean colour difference (CIEDE2000; 1 is just visible) of a mesh with colours to the true one.

    painted: a scene of true colours that holds `truth` and perhaps more. Compared where both are seen, within 2 % of
    the truth's diagonal; one gain for each of red, green and blue is free, as no camera tells the light from the paint.
    """
    ours, alone, near = RayScene(published), RayScene(truth), 0.02 * float(np.linalg.norm(truth.extents))
    pairs = []
    for camera in cameras:
        made, true = (render(scene, camera, supersample=2) for scene in (ours, painted))
        same = np.abs(depth_map(alone, camera) - true.depth) < near / 100
        mask = made.mask & true.mask & same & (np.abs(made.depth - true.depth) < near)
        pairs.append(np.stack([made.image[mask], true.image[mask]]))
    light = (np.concatenate(pairs, axis=1) / 255) ** 2.2
    light[0] *= light[1].mean(axis=0) / np.maximum(light[0].mean(axis=0), 1e-6)
    return float(deltaE_ciede2000(*rgb2lab(np.clip(light, 0, 1) ** (1 / 2.2))).mean())


def glb_to_capture_frame(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A copy of a y-up glTF mesh in the z-up capture frame: (x, y, z) -> (x, -z, y)."""
    turned = mesh.copy()
    turned.apply_transform(np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float))
    return turned


def _surface_distances(
    a: trimesh.Trimesh, b: trimesh.Trimesh, samples: int, above: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of points sampled on `a` to the surface of `b`, and the reverse, at most (samples,) each."""

    def directed(source: trimesh.Trimesh, target: trimesh.Trimesh) -> NDArray[np.float64]:
        points, _ = trimesh.sample.sample_surface(source, samples, seed=0)
        points = points[points[:, 2] > above]
        faces = np.ascontiguousarray(target.faces, np.int64)
        distances, _, _ = pcu.closest_points_on_mesh(np.ascontiguousarray(points), np.array(target.vertices), faces)
        return np.asarray(distances, np.float64)

    return directed(a, b), directed(b, a)
