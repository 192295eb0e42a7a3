"""The space that one view sees, and the signed distances that all views give; `fuse` calls this for every voxel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.geometry.depth import DepthMap, Planes

ACROSS_FOOTPRINTS = 0.05  # error of a plane across its ray: it counts the more, the flatter the surface is seen


@dataclass(frozen=True)
class SeenSpace:
    """One view's knowledge of space, in a local frame."""

    depth_map: DepthMap
    """The object's part of the view's depth map"""
    planes: Planes
    """The tangent planes of its readings"""
    weight: NDArray[np.float32]
    """(h * w,) of the planes: trust in their readings by the variance of their distances, 1 / metres^2"""
    hidden_from: NDArray[np.float32]
    """(h * w,) metres: a cell is hidden if its centre lies in the pixel, and all of the cell beyond this depth"""

    @staticmethod
    def of(depth_map: DepthMap, planes: Planes, cell_radius: float, truncation: float, spread: float) -> SeenSpace:
        """The space that a view sees, for cells of a radius (metres) and distances up to `truncation` (metres).

        spread: standard deviation of its planes along their normals, metres.
        """
        hidden = _hidden_from(depth_map, planes, cell_radius, truncation)
        return SeenSpace(depth_map, planes, _weight(planes, spread, depth_map.footprint), hidden)


def signed_distance(
    points: NDArray[np.float32], radius: float, seen: Sequence[SeenSpace], truncation: float, fade: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Distance to the surface of cells of points (k, m, 3), each of `radius`: (k, m) metres within +-truncation.

    Positive outside. The weighted mean over the views that see a point or the surface close before it, in the order of
    the views; points that no view sees are inside. Further behind a surface than `truncation` a view says nothing; over
    the last `fade` metres before that, its weight falls to 0. Also gives, (k, m), the points whose distance has been
    measured: not those that only a silhouette puts outside.
    """
    total = np.zeros(points.shape[:2], np.float32)
    weights = np.zeros_like(total)
    free = np.full_like(total, -truncation)
    middles = points.mean(axis=1)
    for one in seen:
        pixel, z, _ = pixels_of(one.depth_map, middles)
        open_cells = np.flatnonzero(z - radius < one.hidden_from.take(pixel, mode="clip"))
        outside, distance, weight = _seen_from(one, points[open_cells].reshape(-1, 3))
        # within the noise all views count alike: else the surface would move to its inner side
        weight *= np.clip((truncation + distance) / fade, 0, 1)
        distance = weight * np.minimum(distance, truncation)
        total[open_cells] += distance.reshape(-1, points.shape[1])
        weights[open_cells] += weight.reshape(-1, points.shape[1])
        free[open_cells] = np.maximum(free[open_cells], outside.reshape(-1, points.shape[1]))
    measured = np.divide(total, weights, out=np.full_like(total, -truncation), where=weights > 0)
    return np.maximum(measured, np.minimum(free, truncation)), (weights > 0) & ((measured > 0) | (free <= 0))


def pixels_of(
    depth_map: DepthMap, points: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels of a depth map that hold points (n, 3): flat index in the cut-out, depth (metres), True if in the image.

    Points beyond the cut-out get its nearest border pixel. At the camera's own depth the index means nothing.
    """
    camera = depth_map.camera
    position, z = camera.project(points)
    x, y = position[:, 0], position[:, 1]
    in_image = (z > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
    height, width = depth_map.silhouette.shape
    top, left = depth_map.corner
    with np.errstate(invalid="ignore"):
        column = np.clip(x - left, 0, width - 1).astype(np.intp)
        row = np.clip(y - top, 0, height - 1).astype(np.intp)
    return row * width + column, z, in_image


def _seen_from(
    one: SeenSpace, points: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """A view's statement about points (n, 3), (n,) each: their least distance outside of its silhouette (metres), their
    distance to the surface that is seen there (metres), and the weight of that measurement, 0 = there is none."""
    pixel, z, in_image = pixels_of(one.depth_map, points)
    outside = one.depth_map.silhouette.take(pixel, mode="clip") * (z / np.float32(one.depth_map.camera.fl_x))
    outside[~in_image] = -np.inf
    plane = one.planes.plane.take(pixel, axis=0, mode="clip")
    distance = plane[:, 3] + plane[:, 0] * points[:, 0] + plane[:, 1] * points[:, 1] + plane[:, 2] * points[:, 2]
    return outside, distance, one.weight.take(pixel, mode="clip") * in_image


def _weight(planes: Planes, spread: float, footprint: float) -> NDArray[np.float32]:
    """(h * w,), trust in each plane by the variance of its distances, 1 / metres^2."""
    seen = planes.weight > 0
    across = np.divide(ACROSS_FOOTPRINTS * footprint, planes.cosine, out=np.zeros_like(planes.cosine), where=seen)
    noise = np.divide(spread**2, planes.inner, out=np.zeros_like(across), where=seen)
    return np.divide(planes.weight, noise + across**2, out=np.zeros_like(across), where=seen)


def _hidden_from(depth_map: DepthMap, planes: Planes, cell_radius: float, truncation: float) -> NDArray[np.float32]:
    """Depth, (h * w,) metres, beyond which a cell is hidden behind the surface in all pixels that it may touch."""
    shape = depth_map.silhouette.shape
    depth, cosine = planes.depth.reshape(shape), planes.cosine.reshape(shape)
    beyond = depth + truncation / np.where(cosine > 0, cosine, np.float32(np.finfo(np.float32).tiny))
    nearest = float(depth[depth > 0].min()) if (depth > 0).any() else 1.0
    reach = int(np.ceil(cell_radius * depth_map.camera.fl_x / nearest)) + 1
    return ndimage.maximum_filter(beyond.astype(np.float32), 2 * reach + 1, mode="nearest").reshape(-1)
