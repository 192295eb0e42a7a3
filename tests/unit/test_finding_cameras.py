"""Cameras found from views and depth alone, and refusals where they cannot be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tasks.cameras.conflict import GL_TO_PINHOLE, inverse
from tasks.cameras.finding import FoundCameras, find
from tasks.cameras.joint_refinement import motions, refine
from tasks.cameras.lost_views import placed_again
from tasks.cameras.pairs import rigid_motions, turned
from tasks.cameras.still_background import without_still_background
from tasks.cameras.surface_views import surface_views
from tasks.cameras.world_frame import world_of
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise
from tasks.geometry.render import RayScene, render
from tests.synthetic import Points, orbit_cameras, pattern, shape_mesh, solid_colours

EXACT = DepthNoise((0, 0), (1e-5, 0))
SIZE = 192


def painted(points: Points) -> np.ndarray:
    """Spots of many colours: enough for features in small pictures."""
    spots = np.sin(points @ np.array([[90.0, 41.0, 63.0], [-37.0, 95.0, 71.0], [55.0, -66.0, 88.0]]))
    return 128 + 60 * spots + 0.4 * (pattern(points) - 128)


def views_of(shape: str, count: int, *, plain: bool = False, size: int = SIZE) -> list[View]:
    mesh = shape_mesh(shape)
    scene = RayScene(mesh, solid_colours((lambda points: np.full((len(points), 3), 150.0)) if plain else painted))
    views = []
    for index, camera in enumerate(orbit_cameras(mesh, count, size, rng=np.random.default_rng(0))):
        rendering = render(scene, camera)
        views.append(View(f"view_{index:03d}", rendering.image, rendering.mask, rendering.depth, camera))
    return views


@pytest.fixture(scope="module")
def bowl() -> list[View]:
    return views_of("concave", 12)


def degrees_off(views: Sequence[View], found: FoundCameras) -> np.ndarray:
    """Angle of each found camera from the truth, after the rotation between the two worlds, degrees."""
    relative = []
    for view in views:
        if view.name in found.cameras:
            assert view.camera is not None
            relative.append(view.camera.camera_to_world[:3, :3] @ found.cameras[view.name].camera_to_world[:3, :3].T)
    middle = Rotation.from_matrix(relative).mean()
    return np.degrees((Rotation.from_matrix(relative) * middle.inv()).magnitude())


def test_cameras_of_a_painted_bowl_are_found_in_a_world_with_z_up(bowl: list[View]) -> None:
    found = find(bowl, EXACT)
    assert found.refusal is None and len(found.cameras) >= 10  # two see next to nothing that others see
    assert found.ambiguous is None and found.object_moves is None
    assert degrees_off(bowl, found).max() < 0.3
    assert not found.focal_found and found.focal_px == pytest.approx(bowl[0].camera.fl_x)
    assert found.conflict < 0.015


def test_perturbed_cameras_are_refined_to_the_truth_with_the_focal_length(bowl: list[View]) -> None:
    surfaces = surface_views(bowl, EXACT)
    true = np.stack([view.camera.camera_to_world @ GL_TO_PINHOLE for view in bowl])
    steps = np.random.default_rng(0).normal(size=(len(bowl), 6)) * np.repeat([0.005, 0.002], 3)
    disturbed = true @ motions(steps)
    refined = refine(surfaces, disturbed, 1.01, free_focal=True)
    relative = inverse(refined.poses[0]) @ refined.poses
    expected = inverse(true[0]) @ true
    assert max(turned(a[:3, :3], b[:3, :3]) for a, b in zip(relative, expected, strict=True)) < np.radians(0.15)
    assert refined.zoom == pytest.approx(1, abs=2e-3)


def test_a_lost_view_is_recognised_among_the_others(bowl: list[View]) -> None:
    surfaces = surface_views(bowl, EXACT)
    true = np.stack([view.camera.camera_to_world @ GL_TO_PINHOLE for view in bowl])
    astray = motions(np.array([[0.1, -0.12, 0.05, 0.02, 0.01, 0.0]]))[0]
    lost = np.arange(len(bowl)) == 4
    again = placed_again(bowl, surfaces, np.where(lost[:, None, None], true @ astray, true), lost)
    assert turned(again[4, :3, :3], true[4, :3, :3]) < np.radians(0.5)
    np.testing.assert_array_equal(again[~lost], true[~lost])


def test_rigid_motions_survive_wrong_matches() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.1, 0.1, (60, 3))
    motion = motions(np.array([[0.3, -0.8, 0.2, 0.1, 0.0, -0.05]]))[0]
    seen = points @ motion[:3, :3].T + motion[:3, 3]
    seen[:30] = rng.uniform(-0.1, 0.1, (30, 3))
    inliers, best = rigid_motions(points, seen, 0.001, rng)[0]
    assert inliers >= 30
    np.testing.assert_allclose(best, motion, atol=1e-3)


@pytest.mark.parametrize("shape", ["sphere", "rounded_box"])
def test_an_object_without_texture_never_passes_as_certain(shape: str) -> None:
    found = find(views_of(shape, 8, plain=True, size=128), EXACT)
    assert found.refusal is not None or found.ambiguous is not None


def test_a_still_background_is_taken_away_from_an_object_that_turns(bowl: list[View]) -> None:
    rng = np.random.default_rng(0)
    backdrop = np.repeat(np.repeat(rng.integers(0, 255, (24, 24, 3), np.uint8), 8, axis=0), 8, axis=1)
    wall = np.full((SIZE, SIZE), 1.8, np.float32)
    filmed = []
    for view in bowl:
        image = np.where(view.mask[..., None], view.image, backdrop)
        depth = np.where(view.mask, view.depth, wall)
        filmed.append(replace(view, image=image, depth=depth, mask=np.ones_like(view.mask)))
    alone = without_still_background(filmed, EXACT)
    assert alone is not None
    for view, cut in zip(bowl, alone, strict=True):
        assert (view.mask & cut.mask).sum() > 0.95 * (view.mask | cut.mask).sum()


def test_a_background_that_moves_with_the_object_stays(bowl: list[View]) -> None:
    assert without_still_background([replace(view, mask=np.ones_like(view.mask)) for view in bowl], EXACT) is None


def test_too_few_views_are_refused(bowl: list[View]) -> None:
    found = find([replace(bowl[0]), replace(bowl[1], depth=None)], EXACT)
    assert found.refusal is not None and found.left_out.keys() == {bowl[1].name}


def test_the_supporting_plane_is_up_and_the_foot_at_zero(bowl: list[View]) -> None:
    surfaces = surface_views(bowl, EXACT)
    poses = np.stack([view.camera.camera_to_world @ GL_TO_PINHOLE for view in bowl])
    tilted = motions(np.array([[0.4, 0.1, 0.0, 0.2, 0.3, 0.4]]))[0]
    world = world_of(surfaces, tilted @ poses, 1.0)
    assert np.degrees(np.arccos((world @ tilted)[2, 2])) < 5
