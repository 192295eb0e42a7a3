"""Exact views of an object on a table or in a room, without masks; tests of the subject and of fusion use them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.geometry.render import RayScene, render
from tests.synthetic import look_at

PLACE = np.array([0.3, -0.2, 0.75])
"""Middle of the object's foot, world metres: the table's top is at 0.75."""


def at(x: float, y: float, z: float) -> NDArray[np.float64]:
    """A place (3,) by its distances from PLACE, metres."""
    return PLACE + np.array([x, y, z])


def block(sides: Sequence[float] = (0.2, 0.14, 0.1), turn: float = 0.4) -> trimesh.Trimesh:
    """A box of these sides, metres, that stands at PLACE, turned by radians."""
    mesh = trimesh.creation.box(sides)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(turn, [0, 0, 1]))
    mesh.apply_translation(at(0, 0, sides[2] / 2))
    return mesh


def table(radius: float = 0.5) -> trimesh.Trimesh:
    """A round table top, 3 cm thick, below PLACE."""
    mesh = trimesh.creation.cylinder(radius, 0.03, sections=64)
    mesh.apply_translation(at(0, 0, -0.015))
    return mesh


def views_from_above(
    mesh: trimesh.Trimesh, count: int = 12, size: int = 96, elevations: tuple[float, float] = (15, 75)
) -> list[View]:
    """Views of a scene around PLACE by cameras on a spiral, 0.6 m away. elevations: of the cameras, degrees."""
    middle = at(0, 0, 0.05)
    low, high = np.sin(np.radians(elevations))
    heights = np.linspace(low, high, count)
    turns = np.arange(count) * np.pi * (3 - np.sqrt(5))
    level = np.sqrt(1 - heights**2)
    eyes = middle + 0.6 * np.column_stack([level * np.cos(turns), level * np.sin(turns), heights])
    return views_of_scene(mesh, [look_at(eye, middle) for eye in eyes], size)


def views_of_scene(mesh: trimesh.Trimesh, poses: Sequence[NDArray[np.float64]], size: int = 96) -> list[View]:
    """Views of a mesh by square cameras with these poses (4, 4), all with a full mask."""
    scene = RayScene(mesh)
    views = []
    for index, pose in enumerate(poses):
        camera = Camera(size, size, 1.5 * size, 1.5 * size, size / 2, size / 2, pose)
        seen = render(scene, camera)
        views.append(View(f"view_{index:03d}", seen.image, np.ones((size, size), bool), seen.depth, camera))
    return views
