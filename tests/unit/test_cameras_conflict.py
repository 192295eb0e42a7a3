"""One view's depth seen from another: agreement, conflict and what is hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tasks.cameras.conflict import Comparison, Witness, compare, inverse, pinhole_poses
from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise
from tasks.geometry.render import RayScene, render
from tests.synthetic import orbit_cameras, pattern, shape_mesh, solid_colours

SENSOR = DepthNoise((0, 0), (0.0005, 0))  # of exact depth: nothing may be in conflict
SIZE = 128


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Exact views of a bowl."""
    mesh = shape_mesh("concave")
    scene = RayScene(mesh, solid_colours(pattern))
    cameras = orbit_cameras(mesh, 6, SIZE, rng=np.random.default_rng(0))
    return [view_of(scene, camera, f"view_{index}") for index, camera in enumerate(cameras)]


def view_of(scene: RayScene, camera: Camera, name: str) -> View:
    rendering = render(scene, camera)
    return View(name, rendering.image, rendering.mask, rendering.depth, camera)


def moved(camera: Camera, degrees: float, metres: float) -> Camera:
    change = np.eye(4)
    change[:3, :3] = Rotation.from_rotvec([0, np.radians(degrees), 0]).as_matrix()
    change[:3, 3] = metres, 0, 0
    return replace(camera, camera_to_world=camera.camera_to_world @ change)


def compared(one: Witness, other: Witness) -> Comparison:
    poses = pinhole_poses([one, other])
    return compare(one, other, inverse(poses[1]) @ poses[0])


def test_right_cameras_are_in_no_conflict(views: list[View]) -> None:
    witnesses = [Witness.of(view, SENSOR) for view in views]
    pairs = [compared(one, other) for one in witnesses for other in witnesses if one is not other]
    assert np.mean([pair.conflict for pair in pairs]) < 0.002
    assert np.mean([pair.agree for pair in pairs]) > 0.2
    assert all((pair.agree + 0 + pair.conflict + pair.hidden <= 1).all() for pair in pairs)
    assert np.nanmax(np.abs(pairs[0].behind[pairs[0].agree])) < 0.01


@pytest.mark.parametrize(("degrees", "metres"), [(3.0, 0.0), (0.0, 0.04)])
def test_a_camera_that_is_off_is_in_conflict(views: list[View], degrees: float, metres: float) -> None:
    one = Witness.of(views[0], SENSOR)
    off = Witness.of(views[1], SENSOR, moved(views[1].camera, degrees, metres))  # type: ignore[arg-type]
    assert compared(one, off).conflict.mean() > 0.1


def test_noise_is_no_conflict(views: list[View]) -> None:
    rng = np.random.default_rng(1)
    sensor = DepthNoise((0, 0), (0.004, 0))

    def noisy(view: View) -> View:
        assert view.depth is not None
        return replace(view, depth=np.where(view.depth > 0, view.depth + rng.normal(0, 0.004, view.depth.shape), 0))

    one, other = (Witness.of(noisy(view), sensor) for view in views[:2])
    assert compared(one, other).conflict.mean() < 0.02


def test_a_reading_before_known_background_is_a_conflict(views: list[View]) -> None:
    """The other view's mask alone shows it: it has no reading there."""
    one = Witness.of(views[0], SENSOR)
    empty = replace(views[1], mask=np.zeros_like(views[1].mask), depth=np.zeros((SIZE, SIZE), np.float32))
    found = compared(one, Witness.of(empty, SENSOR))
    assert found.conflict.mean() > 0.9
    assert np.isnan(found.behind).all()


def test_many_motions_are_compared_at_once(views: list[View]) -> None:
    one, other = Witness.of(views[0], SENSOR), Witness.of(views[1], SENSOR)
    poses = pinhole_poses([one, other])
    right = inverse(poses[1]) @ poses[0]
    tried = compare(one, other, np.stack([right, np.eye(4)]))
    assert tried.agree.shape == (2, len(one.points))
    np.testing.assert_array_equal(tried.agree[0], compare(one, other, right).agree)
    assert tried.agree[0].mean() > 2 * tried.agree[1].mean()


def test_a_large_map_is_pooled_without_shifting_it(views: list[View], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cameras.conflict.MOST_PIXELS", SIZE * SIZE // 4 - 1)
    one, other = Witness.of(views[0], SENSOR), Witness.of(views[1], SENSOR)
    assert one.nearest.shape == (43, 43)
    assert compared(one, other).conflict.mean() < 0.002


def test_a_scaled_witness_is_the_same_scene_in_another_unit(views: list[View]) -> None:
    one, other = (Witness.of(view, SENSOR).scaled(3) for view in views[:2])
    poses = pinhole_poses([one, other])
    poses[:, :3, 3] *= 3
    found = compare(one, other, inverse(poses[1]) @ poses[0])
    assert found.conflict.mean() < 0.002 and found.agree.mean() > 0.15
    assert compared(one, other).agree.mean() < 0.02
