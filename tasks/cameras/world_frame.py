"""The world of found cameras: z up, the origin under the object, and a box around that. `finding` calls it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.pairs import assembled
from tasks.cameras.surface_views import SurfaceView, merged, object_size
from tasks.capture.subject import Box

Floats = NDArray[np.float64]

READINGS = 500  # of a view
LEVEL = 0.7  # cosine between a supporting plane's normal and the cameras' up
TRIES = 300  # random planes
THICKNESS = 0.01  # of the object's size, beside the noise
THICKNESS_SIGMAS = 3.0
LEAST_PLANE = 0.15  # share of all readings on a supporting plane
OUTERMOST = (0.5, 99.5)  # percentiles of places: beyond there may be stray readings
MARGIN = 0.05  # of the longest side
FOOT = 1.0  # percentile of heights: where no plane is seen, the object stands there


def world_of(surfaces: Sequence[SurfaceView], poses: Floats, zoom: float) -> Floats:
    """The motion (4, 4) from the axes of the poses into a world with z up.

    poses: (n, 4, 4) camera-to-world in pinhole axes. Without a plane under the object, up is the cameras' mean.
    """
    points, normals = merged(surfaces, poses, zoom, READINGS)
    up = -poses[:, :3, 1].mean(axis=0)
    length = float(np.linalg.norm(up))
    up = up / length if length > 0 else np.array([0.0, 0.0, 1.0])
    noise = float(np.median([surface.noise for surface in surfaces]))
    thickness = THICKNESS * object_size(surfaces, zoom) + THICKNESS_SIGMAS * noise
    plane = _level_plane(points, normals, up, thickness)
    upright = _upright(up if plane is None else plane)
    turned = points @ upright.T
    middle = np.median(turned, axis=0)
    if plane is None:
        foot = float(np.percentile(turned[:, 2], FOOT))
    else:
        level = turned[normals @ plane > LEVEL]
        foot = float(np.median(level[:, 2]))
    return assembled(upright, -np.array([middle[0], middle[1], foot]))


def box_around(surfaces: Sequence[SurfaceView], poses: Floats, zoom: float) -> Box:
    """A box around all that the views show, along the axes of their world, a little larger. poses: as in `world_of`."""
    points, _ = merged(surfaces, poses, zoom, READINGS)
    low, high = np.percentile(points, OUTERMOST, axis=0)
    margin = MARGIN * (high - low).max()
    return Box.between(np.stack([low - margin, high + margin]))


def _level_plane(points: Floats, normals: Floats, up: Floats, thickness: float) -> Floats | None:
    """Normal (3,) of the largest plane that is about level; None without one."""
    level = np.flatnonzero(normals @ up > LEVEL)
    if len(level) < LEAST_PLANE * len(points):
        return None
    rng = np.random.default_rng(0)
    chosen = rng.choice(level, TRIES)
    heights = points @ normals[chosen].T
    near = np.abs(heights - np.einsum("kc,kc->k", points[chosen], normals[chosen])) < thickness
    near &= (normals @ normals[chosen].T) > LEVEL
    best = int(near.sum(axis=0).argmax())
    if near[:, best].sum() < LEAST_PLANE * len(points):
        return None
    on = points[near[:, best]]
    normal = np.linalg.svd(on - on.mean(axis=0), full_matrices=False)[2][2]
    return normal * np.sign(normal @ up)


def _upright(up: Floats) -> Floats:
    """The rotation (3, 3) that turns a direction to +z by the smallest angle."""
    axis = np.cross(up, [0.0, 0.0, 1.0])
    cosine = float(up[2])
    if cosine < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + cosine)
