"""Cameras around an object. Used by the captures of this package and by tests that place cameras of their own."""

from __future__ import annotations

import numpy as np
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera

CAMERA_DISTANCE = 1.0
FRAME_FILL = 0.75  # of the image's width by the bounding sphere
PRINCIPAL_POINT = (0.51, 0.495)  # of width and height: off the middle, so that swapping or ignoring it shows
POSE_JITTER = 0.05  # of directions, distance and roll


def orbit_cameras(mesh: trimesh.Trimesh, views: int, size: int, *, rng: np.random.Generator) -> tuple[Camera, ...]:
    """Cameras all around a mesh, on a jittered Fibonacci sphere, some 1 m away."""
    directions = fibonacci_sphere(views) + rng.normal(scale=POSE_JITTER / 2, size=(views, 3))
    distances = CAMERA_DISTANCE * (1 + rng.uniform(-POSE_JITTER, POSE_JITTER, views))
    offsets = directions * (distances / np.linalg.norm(directions, axis=1))[:, None]
    return cameras_around(mesh, offsets, size, rolls=rng.uniform(-POSE_JITTER, POSE_JITTER, views))


def cameras_around(
    mesh: trimesh.Trimesh,
    offsets: NDArray[np.float64],
    size: int,
    *,
    rolls: NDArray[np.float64],
    fill: float = FRAME_FILL,
) -> tuple[Camera, ...]:
    """Cameras at offsets (n, 3) metres from a mesh's middle that look at it, all of one focal length."""
    middle = mesh.bounds.mean(axis=0)
    radius = np.linalg.norm(mesh.vertices - middle, axis=1).max()
    distance = np.linalg.norm(offsets, axis=1).mean()
    focal = float(fill * size / 2 * np.sqrt(distance**2 - radius**2) / radius)
    cx, cy = (share * size for share in PRINCIPAL_POINT)
    return tuple(
        Camera(size, size, focal, focal, cx, cy, look_at(middle + offset, middle, roll=roll))
        for offset, roll in zip(offsets, rolls, strict=True)
    )


def look_at(eye: NDArray[np.float64], target: NDArray[np.float64], *, roll: float = 0.0) -> NDArray[np.float64]:
    """Camera-to-world (4, 4) in OpenGL axes of a camera at `eye`, world z upwards in its image, rolled by radians."""
    back = (eye - target) / np.linalg.norm(eye - target)
    level = np.cross([0.0, 0.0, 1.0], back)
    level /= np.linalg.norm(level)
    right = np.cos(roll) * level + np.sin(roll) * np.cross(back, level)
    pose = np.eye(4)
    pose[:3, :3] = np.column_stack([right, np.cross(back, right), back])
    pose[:3, 3] = eye
    return pose


def fibonacci_sphere(count: int) -> NDArray[np.float64]:
    """Evenly spread unit vectors (count, 3), from top to bottom."""
    index = np.arange(count)
    z = 1 - 2 * (index + 0.5) / count
    angle = index * np.pi * (3 - np.sqrt(5))
    return np.column_stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z])
