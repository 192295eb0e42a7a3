"""Cameras found from views and depth alone, and refusals where they cannot be known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from tasks.cameras.conflict import GL_TO_PINHOLE, inverse
from tasks.cameras.features import features, matches
from tasks.cameras.finding import FoundCameras, find
from tasks.cameras.focal import found_zoom
from tasks.cameras.joint_refinement import motions, refine
from tasks.cameras.jury import Jury
from tasks.cameras.lost_views import placed_again
from tasks.cameras.pairs import rigid_motions, turned
from tasks.cameras.still_background import without_still_background
from tasks.cameras.surface_views import surface_views
from tasks.cameras.world_frame import world_of
from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise
from tasks.geometry.render import RayScene, render
from tests.synthetic import OBJECT_CENTRE, Points, cameras_around, orbit_cameras, pattern, shape_mesh, solid_colours

EXACT = DepthNoise((0, 0), (1e-5, 0))
SIZE = 192


def painted(points: Points) -> np.ndarray:
    """Spots of many colours: enough for features in small pictures."""
    spots = np.sin(points @ np.array([[90.0, 41.0, 63.0], [-37.0, 95.0, 71.0], [55.0, -66.0, 88.0]]))
    return 128 + 60 * spots + 0.4 * (pattern(points) - 128)


def grey(points: Points) -> np.ndarray:
    return np.full((len(points), 3), 150.0)


def five_times(points: Points) -> np.ndarray:
    """Spots that are the same on each fifth of the way around the z axis."""
    turn = np.mod(np.arctan2(points[:, 1], points[:, 0]), 2 * np.pi / 5)
    radius = np.hypot(points[:, 0], points[:, 1])
    return painted(np.column_stack([radius * np.cos(turn), radius * np.sin(turn), points[:, 2]]))


def views_of(shape: str, count: int, *, plain: bool = False, size: int = SIZE) -> list[View]:
    mesh = shape_mesh(shape)
    cameras = orbit_cameras(mesh, count, size, rng=np.random.default_rng(0))
    return seen_by(cameras, mesh, grey if plain else painted)


def around(mesh: trimesh.Trimesh, count: int, size: int = 128) -> Sequence[Camera]:
    """Cameras in one circle, a little above."""
    rng = np.random.default_rng(0)
    turns = 2 * np.pi * np.arange(count) / count + rng.normal(0, 0.03, count)
    offsets = np.column_stack([np.cos(turns), np.sin(turns), 0.45 + rng.normal(0, 0.02, count)])
    return cameras_around(mesh, 0.7 * offsets, size, rolls=rng.uniform(-0.05, 0.05, count))


def seen_by(cameras: Sequence[Camera], mesh: trimesh.Trimesh, paint: Callable[[Points], np.ndarray]) -> list[View]:
    scene = RayScene(mesh, solid_colours(paint))
    views = []
    for index, camera in enumerate(cameras):
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


def before_a_wall(views: Sequence[View], backdrop: np.ndarray) -> list[View]:
    """The object turned before a wall with this picture (h, w, 3), 1.8 m away."""
    wall = np.full((SIZE, SIZE), 1.8, np.float32)
    filmed = []
    for view in views:
        image = np.where(view.mask[..., None], view.image, backdrop)
        depth = np.where(view.mask, view.depth, wall)
        filmed.append(replace(view, image=image, depth=depth, mask=np.ones_like(view.mask)))
    return filmed


def assert_cut_out(alone: Sequence[View] | None, views: Sequence[View]) -> None:
    assert alone is not None
    for view, cut in zip(views, alone, strict=True):
        assert (view.mask & cut.mask).sum() > 0.95 * (view.mask | cut.mask).sum()


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(trimesh.creation.cylinder(0.09, 0.2), id="cylinder"),
        pytest.param(trimesh.creation.box((0.2, 0.2, 0.2)), id="cube"),
        pytest.param(trimesh.creation.box((0.5, 0.01, 0.5)), id="plate"),
    ],
)
def test_a_plain_body_is_refused(mesh: trimesh.Trimesh) -> None:
    assert find(seen_by(around(mesh, 8), mesh, grey), EXACT).refusal is not None


def test_five_views_of_sides_that_look_alike_are_doubted() -> None:
    """They fit perfectly as five views of one side."""
    mesh = trimesh.creation.cylinder(0.1, 0.2, sections=200)
    found = find(seen_by(around(mesh, 5, 96), mesh, five_times), EXACT)
    assert found.refusal is not None or found.ambiguous is not None


def test_a_surface_that_slides_along_itself_is_doubted() -> None:
    """Rings of colour around a cylinder: any turn about its axis fits."""
    mesh = trimesh.creation.cylinder(0.09, 0.2, sections=200)
    found = find(seen_by(around(mesh, 4, 96), mesh, lambda points: painted(points * [0, 0, 1])), EXACT)
    assert found.refusal is not None or found.ambiguous is not None


def test_of_two_objects_one_is_left_out_or_both(bowl: list[View]) -> None:
    ring = shape_mesh("torus")
    others = [replace(view, name=f"ring_{view.name}") for view in seen_by(around(ring, 3, SIZE), ring, painted)]
    found = find([*bowl[:5], *others], EXACT)
    assert not {view.name for view in others} & found.cameras.keys() or not found.cameras.keys() & {
        view.name for view in bowl
    }


def test_a_still_background_is_taken_away_from_an_object_that_turns(bowl: list[View]) -> None:
    rng = np.random.default_rng(0)
    backdrop = np.repeat(np.repeat(rng.integers(0, 255, (24, 24, 3), np.uint8), 8, axis=0), 8, axis=1)
    assert_cut_out(without_still_background(before_a_wall(bowl, backdrop), EXACT), bowl)


def test_a_plain_background_is_still_if_a_person_says_so(bowl: list[View]) -> None:
    """It could as well be a plain table around which the cameras moved."""
    filmed = before_a_wall(bowl, np.random.default_rng(0).integers(120, 125, (SIZE, SIZE, 3), np.uint8))
    flickering = [
        replace(view, image=np.clip(view.image.astype(int) + 3 * k, 0, 255).astype(np.uint8))
        for k, view in enumerate(filmed)
    ]
    assert without_still_background(flickering, EXACT) is None
    assert_cut_out(without_still_background(flickering, EXACT, sure=True), bowl)


def open_frames(views: Sequence[View]) -> list[View]:
    return [replace(view, mask=np.ones_like(view.mask)) for view in views]


def test_a_background_that_moves_with_the_object_stays(bowl: list[View]) -> None:
    assert without_still_background(open_frames(bowl), EXACT) is None
    found = find(open_frames(bowl), EXACT, object_moves=True)
    assert found.refusal is not None and "nothing is seen to move" in found.refusal


def test_no_background_is_sought_if_a_person_says_that_the_cameras_moved(
    bowl: list[View], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    monkeypatch.setattr("tasks.cameras.finding.without_still_background", lambda *given, **more: searched.append(given))
    monkeypatch.setattr("tasks.cameras.finding.candidate_pairs", lambda found: [])  # nothing else is tried
    find(open_frames(bowl)[:4], EXACT, object_moves=False)
    assert not searched


def test_too_few_views_are_refused(bowl: list[View]) -> None:
    found = find([replace(bowl[0]), replace(bowl[1], depth=None)], EXACT)
    assert found.refusal is not None and found.left_out.keys() == {bowl[1].name}


def test_the_supporting_plane_is_up_and_the_foot_at_zero(bowl: list[View]) -> None:
    surfaces = surface_views(bowl, EXACT)
    poses = np.stack([view.camera.camera_to_world @ GL_TO_PINHOLE for view in bowl])
    tilted = motions(np.array([[0.4, 0.1, 0.0, 0.2, 0.3, 0.4]]))[0]
    world = world_of(surfaces, tilted @ poses, 1.0)
    assert np.degrees(np.arccos((world @ tilted)[2, 2])) < 5


def test_texture_tells_a_ball_that_is_turned_and_exposure_does_not_matter() -> None:
    views = views_of("sphere", 6, size=96)
    views[0] = replace(views[0], image=(0.8 * views[0].image).astype(np.uint8))
    surfaces = surface_views(views, EXACT)
    poses = dict(enumerate(np.stack([view.camera.camera_to_world @ GL_TO_PINHOLE for view in views])))
    about = np.eye(4)
    about[:3, 3] = OBJECT_CENTRE
    turned_over = about @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ inverse(about) @ poses[0]
    others = {view: pose for view, pose in poses.items() if view}
    verdict = Jury(surfaces, 1.0, 0.006).view(0, np.stack([poses[0], turned_over]), others)
    assert verdict.agree[1] > 0.9 * verdict.agree[0] and verdict.conflict.max() < 0.02  # its depth cannot tell
    assert verdict.other_texture[0] < 0.5 < verdict.other_texture[1]


def test_the_focal_length_follows_from_matches_whose_distances_are_the_same() -> None:
    mesh = shape_mesh("concave")
    scene = RayScene(mesh, solid_colours(painted))
    angles = np.radians([0, 25, 50])
    offsets = np.column_stack([np.cos(angles), np.sin(angles), np.full(len(angles), 0.7)])
    views = []
    for camera in cameras_around(mesh, offsets, SIZE, rolls=np.zeros(len(angles))):
        seen = render(scene, camera)
        short = replace(camera, fl_x=camera.fl_x / 1.3, fl_y=camera.fl_y / 1.3)
        views.append(View(f"view_{len(views)}", seen.image, seen.mask, seen.depth, short))
    surfaces = surface_views(views, EXACT)
    found = [features(view, surface) for view, surface in zip(views, surfaces, strict=True)]
    matched = {(one, other): matches(found[one], found[other]) for one in range(len(views)) for other in range(one)}
    assert found_zoom(surfaces, found, matched, np.random.default_rng(0)) == pytest.approx(1.3, rel=0.03)
