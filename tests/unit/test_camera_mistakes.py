"""Usual mistakes in cameras and depth are named, with the right factor; captures without one are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.cameras.explanations import DepthFormat, Told
from tasks.cameras.mistakes import find_mistake
from tasks.capture.views import View
from tasks.geometry.render import RayScene, render
from tests.synthetic import orbit_cameras, pattern, shape_mesh, solid_colours

STORED = DepthFormat(unit=0.0001, integer=True, limits=None)
Change = Callable[[View], View]
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Views of a bowl with depth in steps of 0.1 mm."""
    mesh = shape_mesh("concave")
    scene = RayScene(mesh, solid_colours(pattern))
    seen = []
    for index, camera in enumerate(orbit_cameras(mesh, 8, 160, rng=np.random.default_rng(0))):
        rendering = render(scene, camera)
        depth = np.rint(rendering.depth / STORED.unit) * STORED.unit
        seen.append(View(f"view_{index}", rendering.image, rendering.mask, depth.astype(np.float32), camera))
    return seen


def told(views: Sequence[View], change: Change) -> Told:
    return find_mistake([change(view) for view in views], STORED)


def depth(change: Callable[[NDArray[np.floating]], NDArray[np.floating]]) -> Change:
    def changed(view: View) -> View:
        assert view.depth is not None
        readings = np.maximum(view.depth, np.finfo(np.float32).tiny)
        return replace(view, depth=np.where(view.depth > 0, change(readings), 0).astype(np.float32))

    return changed


def pose(change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Change:
    def changed(view: View) -> View:
        assert view.camera is not None
        matrix = change(view.camera.camera_to_world)
        return replace(view, camera=replace(view.camera, camera_to_world=matrix))

    return changed


def farther(factor: float) -> Change:
    scale = np.array([[1, 1, 1, factor]] * 3 + [[1, 1, 1, 1]])
    return pose(lambda matrix: matrix * scale)


@pytest.mark.parametrize(
    ("factor", "said", "unit"),
    [
        (5.0, "5 times too large", "2e-05"),
        (0.25, "4 times too small", "0.0004"),
        (0.87, "1.15 times too small", "0.000115"),
    ],
)
def test_depth_in_another_unit_is_told_with_its_factor(views: list[View], factor: float, said: str, unit: str) -> None:
    found = told(views, depth(lambda z: z * factor))
    assert found is not None
    assert said in found[0]
    assert f"depth_unit_scale_factor {unit}" in found[1]


def test_positions_in_another_unit_are_told_with_their_factor(views: list[View]) -> None:
    found = told(views, farther(0.5))
    assert found is not None
    assert "2 times too large" in found[0] and "multiply the cameras' positions by 2" in found[1]


def test_float_depth_is_not_told_to_have_a_unit(views: list[View]) -> None:
    found = find_mistake([farther(10)(view) for view in views], replace(STORED, integer=False))
    assert found is not None
    assert "depth_unit_scale_factor" not in found[1] and "multiply it by 10" in found[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pose(lambda matrix: matrix @ FLIP), "OpenCV's axes"),
        (pose(np.linalg.inv), "world-to-camera"),
        (pose(lambda matrix: np.linalg.inv(matrix @ FLIP)), "world-to-camera, not camera-to-world, and have OpenCV"),
        (depth(lambda z: np.rint(z / STORED.unit).astype(np.uint16).byteswap() * STORED.unit), "bytes"),
        (depth(lambda z: 65535 * STORED.unit - z), "inverted"),
        (depth(lambda z: 0.7 / z), "disparity"),
    ],
)
def test_other_mistakes_are_named(views: list[View], change: Change, said: str) -> None:
    found = told(views, change)
    assert found is not None and said in found[0]


def test_a_right_capture_has_no_mistake(views: list[View]) -> None:
    assert told(views, lambda view: view) is None


def test_an_approximate_camera_is_no_mistake_of_all(views: list[View]) -> None:
    """One camera that is off explains itself by no mistake in the file."""
    off = replace(views[0], camera=views[1].camera)
    assert find_mistake([off, *views[1:]], STORED) is None


def test_six_views_of_a_cube_do_not_complain() -> None:
    """Views along the axes share no surface: nothing agrees, and nothing is in conflict."""
    import trimesh

    from tasks.capture.camera import Camera
    from tests.synthetic import look_at

    mesh = trimesh.creation.box((0.3, 0.3, 0.3))
    scene = RayScene(mesh, solid_colours(pattern))
    seen = []
    for index, eye in enumerate(np.vstack([np.eye(3), -np.eye(3)]) + 1e-9):
        camera = Camera(96, 96, 150.0, 150.0, 48.0, 48.0, look_at(eye + np.array([1e-6, 0, 0]), np.zeros(3)))
        rendering = render(scene, camera)
        seen.append(View(f"side_{index}", rendering.image, rendering.mask, rendering.depth, camera))
    assert find_mistake(seen, STORED) is None
