"""The fusion engine on small captures of known truth."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import point_cloud_utils as pcu
import pytest
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.errors import InferenceFailed
from tasks.geometry.depth import cut_out, tangent_planes, without_outliers
from tasks.geometry.depth_noise import DepthNoise, measured_noise
from tasks.geometry.mesh_repair import without_crumbs
from tasks.geometry.render import RayScene, render
from tasks.inference.fusion.fuse import fuse
from tasks.inference.fusion.seen_space import SeenSpace, signed_distance
from tasks.settings import FusionParameters
from tests.synthetic import OBJECT_CENTRE, chamfer, fibonacci_sphere, look_at, shape_mesh

SIZE = 96
RADIUS = 0.15
SPHERE = 4 / 3 * np.pi * RADIUS**3
PARAMETERS = FusionParameters(max_voxels=96)


def captured(mesh: trimesh.Trimesh, count: int = 12) -> list[View]:
    """Views of a mesh from all around, with exact depth."""
    return captured_from(mesh, fibonacci_sphere(count))


def captured_from(mesh: trimesh.Trimesh, directions: NDArray[np.float64], size: int = SIZE) -> list[View]:
    """Views of a mesh from 1 m away in these directions (n, 3), with exact depth."""
    middle = mesh.bounds.mean(axis=0)
    focal = 0.42 * size / np.tan(np.arcsin(np.linalg.norm(mesh.vertices - middle, axis=1).max()))
    scene, views = RayScene(mesh), []
    for index, direction in enumerate(directions):
        pose = look_at(middle + direction, middle)
        camera = Camera(size, size, focal, focal, size / 2 + 0.7, size / 2 - 0.4, pose)
        seen = render(scene, camera)
        views.append(View(f"view_{index:03d}", seen.image, seen.mask, seen.depth, camera))
    return views


@lru_cache
def views_of(shape: str) -> tuple[View, ...]:
    return tuple(captured(shape_mesh(shape)))


def fused(views: list[View] | tuple[View, ...], parameters: FusionParameters = PARAMETERS) -> trimesh.Trimesh:
    surface = fuse(views, parameters, lambda _: None)
    return trimesh.Trimesh(surface.vertices, surface.faces, process=False)


def radii(mesh: trimesh.Trimesh) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(mesh.vertices - OBJECT_CENTRE, axis=1))


def with_depth(view: View, depth: NDArray[np.floating]) -> View:
    return replace(view, depth=depth.astype(np.float32))


def test_sphere_is_exact_to_a_fraction_of_a_pixel_and_closed() -> None:
    views = views_of("sphere")
    mesh = fused(views)
    assert views[0].camera is not None
    footprint = 1 / views[0].camera.fl_x
    assert np.abs(radii(mesh) - RADIUS).mean() < 0.02 * footprint  # half a pixel of error would show ten times that
    assert np.linalg.norm(mesh.center_mass - OBJECT_CENTRE) < 0.02 * footprint
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1
    assert mesh.volume == pytest.approx(SPHERE, rel=0.005)


@pytest.mark.parametrize("shape", ["rounded_box", "torus", "concave"])
def test_shapes_with_edges_holes_and_cavities(shape: str) -> None:
    mesh, truth = fused(views_of(shape)), shape_mesh(shape)
    assert mesh.is_watertight and mesh.body_count == 1
    assert mesh.euler_number == truth.euler_number
    if shape != "concave":  # of which twelve views leave a part unseen
        assert chamfer(mesh, truth, 5000) < 0.0006 * np.linalg.norm(truth.extents)


def test_same_views_give_the_same_bytes() -> None:
    first, second = (fuse(views_of("torus"), PARAMETERS, lambda _: None) for _ in range(2))
    assert first.vertices.tobytes() == second.vertices.tobytes() and first.faces.tobytes() == second.faces.tobytes()
    assert first.vertices.dtype == np.float32 and first.faces.dtype == np.int32


def test_progress_grows_to_one() -> None:
    told: list[float] = []
    fuse(views_of("sphere"), FusionParameters(max_voxels=32), told.append)
    assert told == sorted(told) and told[-1] == 1


def test_noise_outliers_and_lost_readings() -> None:
    rng, views = np.random.default_rng(1), []
    for view in views_of("sphere"):
        assert view.depth is not None
        depth = view.depth * (1 + 0.005 * rng.standard_normal(view.depth.shape))  # sigma 5 mm
        depth += (rng.random(depth.shape) < 0.01) * rng.uniform(-0.1, 0.1, depth.shape)
        depth[rng.random(depth.shape) < 0.05] = 0
        views.append(with_depth(view, np.where(view.mask, depth, 0)))
    mesh = fused(views)
    assert np.abs(radii(mesh) - RADIUS).mean() < 0.0012
    assert mesh.is_watertight and mesh.body_count == 1


def test_missing_readings_within_the_mask_are_not_free_space() -> None:
    views = []
    for view in views_of("sphere"):
        assert view.depth is not None
        depth = view.depth.copy()
        depth[SIZE // 2 - 8 : SIZE // 2 + 8, SIZE // 2 - 8 : SIZE // 2 + 8] = 0
        views.append(with_depth(view, depth))
    mesh = fused(views)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(SPHERE, rel=0.02)


def test_background_carves_and_the_unseen_is_inside() -> None:
    """Depth from above only: below, the solid ends where the silhouettes of views without any depth say so."""
    views = views_of("sphere")
    above = [view for view in views if view.camera is not None and view.camera.centre[2] > OBJECT_CENTRE[2]]
    below = [with_depth(view, np.zeros((SIZE, SIZE))) for view in views if not any(view is other for other in above)]
    unseen, carved = fused(above), fused([*above, *below])
    assert unseen.is_watertight and carved.is_watertight
    assert unseen.volume > 1.01 * SPHERE
    assert SPHERE < carved.volume < unseen.volume


def test_object_far_from_the_worlds_origin_loses_nothing() -> None:
    offset = np.array([400.0, -250.0, 30.0])
    views = []
    for view in views_of("sphere"):
        assert view.camera is not None
        pose = view.camera.camera_to_world.copy()
        pose[:3, 3] += offset
        views.append(replace(view, camera=replace(view.camera, camera_to_world=pose)))
    mesh = fused(views)
    assert abs(np.linalg.norm(mesh.vertices - OBJECT_CENTRE - offset, axis=1) - RADIUS).mean() < 0.0003


def test_lens_distortion_is_taken_into_account() -> None:
    """Depth maps seen through a distorting lens give the same sphere."""
    scene, views = RayScene(shape_mesh("sphere")), []
    for view in views_of("sphere"):
        assert view.camera is not None
        camera = replace(view.camera, distortion=(-0.2, 0.05, 0.001, -0.002))
        seen = render(scene, camera)
        views.append(View(view.name, seen.image, seen.mask, seen.depth, camera))
    assert np.abs(radii(fused(views)) - RADIUS).mean() < 0.0003


def test_depth_maps_of_another_size_than_the_views() -> None:
    views = [
        replace(view, mask=view.mask.repeat(2, 0).repeat(2, 1), image=view.image.repeat(2, 0).repeat(2, 1))
        for view in views_of("sphere")
    ]
    views = [replace(view, camera=view.camera and view.camera.resized(2 * SIZE, 2 * SIZE)) for view in views]
    assert np.abs(radii(fused(views)) - RADIUS).mean() < 0.0002


def test_a_hollow_goes_on_smoothly_where_no_view_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight views miss a part of a bowl's hollow: it continues what is around, within the space that none saw."""
    truth = shape_mesh("concave")
    views = captured(truth, 8)
    mesh = fused(views)
    assert mesh.is_watertight and mesh.body_count == 1
    assert chamfer(mesh, truth, 5000) < 0.0012 * np.linalg.norm(truth.extents)  # 0.0043 with the shadow left solid

    monkeypatch.setattr("tasks.inference.fusion.fuse.continued", lambda vertices, *_: vertices)
    solid = fused(views)
    outside, _, _ = pcu.signed_distance_to_mesh(
        np.asarray(mesh.vertices), np.asarray(solid.vertices), solid.faces.astype(np.int64)
    )
    voxel = solid.extents.max() / PARAMETERS.max_voxels
    assert outside.max() < 0.25 * voxel and outside.min() < -5 * voxel
    assert (np.asarray(mesh.faces) == solid.faces).all()


def test_crumbs_and_unseen_cavities_go_and_large_pieces_stay() -> None:
    parts = [trimesh.creation.icosphere(subdivisions=2, radius=radius) for radius in (1.0, 0.5, 0.05, 0.4)]
    for part, x in zip(parts, (0, 3, 5, 0), strict=True):
        part.apply_translation((x, 0, 0))
    parts[3].invert()  # a bubble inside the first
    soup = trimesh.util.concatenate(parts)
    vertices, faces = without_crumbs(soup.vertices.astype(np.float32), soup.faces.astype(np.int32), 0.02)
    left = trimesh.Trimesh(vertices, faces, process=False)
    assert left.body_count == 2
    assert left.volume == pytest.approx(parts[0].volume + parts[1].volume, rel=1e-5)


def test_a_floating_crumb_in_the_capture_is_removed() -> None:
    crumb = trimesh.creation.icosphere(subdivisions=2, radius=0.008)
    crumb.apply_translation(OBJECT_CENTRE + np.array([0, 0, 0.19]))
    both = trimesh.util.concatenate([shape_mesh("sphere"), crumb])
    views = captured(both)
    assert fused(views, PARAMETERS.model_copy(update={"crumb_fraction": 0.0})).body_count == 2
    assert fused(views).body_count == 1


def test_nothing_left_is_said_clearly() -> None:
    empty = [with_depth(view, np.zeros((SIZE, SIZE))) for view in views_of("sphere")]
    with pytest.raises(InferenceFailed, match="0 of 12 views have a depth reading"):
        fused(empty)


def test_readings_do_not_mix_across_a_depth_step() -> None:
    """A near square before a far wall: every plane lies on one of them, none between."""
    depth = np.full((64, 64), 1.5, np.float32)
    depth[20:44, 20:44] = 1.0
    camera = Camera(64, 64, 80.0, 80.0, 32.0, 32.0, np.eye(4))
    cut = cut_out(View("step", np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool), depth, camera))
    assert cut is not None
    planes = tangent_planes(cut, DepthNoise((0.0, 0.0), (0.0, 0.0)))
    fitted = planes.depth[planes.weight > 0]
    assert len(fitted) > 3000
    assert np.minimum(np.abs(fitted - 1.0), np.abs(fitted - 1.5)).max() < 1e-6
    inner = planes.inner.reshape(cut.depth.shape)
    assert inner[32, 32] == pytest.approx(1, abs=1e-3)
    assert 0 < inner[32, 22] < 0.3  # sensors are wrong beside a step


def test_views_that_differ_by_their_noise_meet_in_the_middle() -> None:
    """Weights that fell right behind the surface drew it to its inner side."""
    camera = Camera(32, 32, 40.0, 40.0, 16.0, 16.0, np.eye(4))
    seen = []
    for depth in (1.0 - 0.004, 1.0 + 0.004):
        view = View("", np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), bool), np.full((32, 32), depth), camera)
        cut = cut_out(view)
        assert cut is not None
        planes = tangent_planes(cut, DepthNoise((0.0, 0.0), (0.0, 0.0)))
        seen.append(SeenSpace.of(cut, planes, 0.01, truncation=0.03, spread=0.004))
    between = np.array([[[0.0, 0.0, -1.0]]], np.float32)
    distance, measured = signed_distance(between, 0.01, seen, truncation=0.03, fade=0.015)
    assert measured.all()
    assert abs(distance.item()) < 1e-5


def test_noise_is_measured_and_outliers_found() -> None:
    rng = np.random.default_rng(0)
    depth = 1 + 0.1 * np.linspace(0, 1, 64)[None, :] + 0.004 * rng.standard_normal((64, 64))
    depth[10, 10] += 0.2
    camera = Camera(64, 64, 80.0, 80.0, 32.0, 32.0, np.eye(4))
    view = View("noisy", np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool), depth.astype(np.float32), camera)
    cut = cut_out(view)
    assert cut is not None
    assert measured_noise([cut.depth]).at(1.05) == pytest.approx(0.004, rel=0.15)
    kept = without_outliers(cut.depth, 0.03)
    assert kept[10, 10] == 0
    assert (kept > 0).mean() > 0.99
