"""Fusion of what real sensors deliver: coarse steps, missing readings, no masks, one side only, a table below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from tasks.capture.subject import Box
from tasks.capture.views import View, load_views
from tasks.errors import InferenceFailed
from tasks.inference.fusion.fuse import FusedSurface, fuse
from tests.support.on_a_table import PLACE, block, table, views_from_above, views_of_scene
from tests.synthetic import OBJECT_CENTRE, chamfer, make_capture
from tests.unit.test_fusion import PARAMETERS, RADIUS, SPHERE, captured_from, radii, views_of, with_depth

SPHERE_BOX = Box.between(np.array([OBJECT_CENTRE - 0.17, OBJECT_CENTRE + 0.17]))
BEHIND = 2.0  # metres to the wall behind the sphere
SIZE_PX = 128


def surface_of(views: list[View], **parameters: Any) -> tuple[FusedSurface, trimesh.Trimesh]:
    surface = fuse(views, PARAMETERS.model_copy(update=parameters), lambda _: None)
    return surface, trimesh.Trimesh(surface.vertices, surface.faces, process=False)


def is_one_closed_piece(mesh: trimesh.Trimesh) -> bool:
    return bool(mesh.is_watertight and mesh.body_count == 1)


def sphere_with(change: Callable[[NDArray[np.floating]], NDArray[np.floating]]) -> list[View]:
    views = []
    for view in views_of("sphere"):
        assert view.depth is not None
        views.append(with_depth(view, np.where(view.mask, change(view.depth), 0)))
    return views


@pytest.mark.parametrize("step", [0.001, 0.002, 0.005])
def test_depth_in_steps_is_as_good_as_uniform_noise(step: float) -> None:
    rng = np.random.default_rng(0)
    _, stepped = surface_of(sphere_with(lambda depth: np.rint(depth / step) * step))
    _, noisy = surface_of(sphere_with(lambda depth: depth + rng.uniform(-step / 2, step / 2, depth.shape)))
    assert is_one_closed_piece(stepped)
    assert np.abs(radii(stepped) - RADIUS).mean() < 1.3 * np.abs(radii(noisy) - RADIUS).mean()


def test_a_capture_in_whole_millimetres(tmp_path: Path) -> None:
    """The unit that most sensors write: it gave shards."""
    found = []
    for unit in (0.001, 0.0001):
        folder = tmp_path / f"{unit}"
        truth = make_capture(folder, "sphere", views=12, size=96, depth_scale=unit)
        paths = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
        content = {path: (folder / path).read_bytes() for path in paths}
        surface, mesh = surface_of(load_views(content, content.__getitem__))
        assert is_one_closed_piece(mesh)
        assert surface.sensor.step_at(surface.distance_m) == pytest.approx(unit, rel=0.02)
        found.append(chamfer(mesh, truth.mesh, 5000) / np.linalg.norm(truth.mesh.extents))
    assert found[0] < 0.0006 and found[0] < 1.5 * found[1]


def before_a_wall(shadow: int) -> list[View]:
    """The sphere before a wall, in bounds, without alpha. A band along its left edge has no reading, on both sides."""
    views = []
    for view in views_of("sphere"):
        assert view.depth is not None
        hit = view.depth > 0
        band = np.zeros_like(hit)
        for offset in range(1, shadow + 1):
            band[:, :-offset] |= hit[:, offset:] & ~hit[:, :-offset]
            band[:, offset:] |= hit[:, offset:] & ~hit[:, :-offset]
        depth = np.where(band, 0, np.where(hit, view.depth, BEHIND))
        views.append(replace(with_depth(view, depth), mask=np.ones_like(hit)).within(SPHERE_BOX))
    return views


@pytest.mark.parametrize("shadow", [4, 10])
def test_missing_readings_at_the_silhouette_are_not_carved(shadow: int) -> None:
    _, mesh = surface_of(before_a_wall(shadow))
    assert is_one_closed_piece(mesh)
    assert np.abs(radii(mesh) - RADIUS).max() < 0.0005
    assert mesh.volume == pytest.approx(SPHERE, rel=0.005)


@pytest.mark.parametrize("empty", ["mask", "depth"])
def test_a_frame_that_misses_the_object_is_left_out(empty: str) -> None:
    views = list(views_of("sphere"))
    lost = views[3]
    if empty == "mask":
        lost = replace(lost, mask=np.zeros_like(lost.mask))
    views[3] = with_depth(lost, np.zeros_like(lost.mask))
    surface, mesh = surface_of(views)
    assert surface.views == tuple(view.name for view in views if view.name != lost.name)
    assert is_one_closed_piece(mesh)
    assert np.abs(radii(mesh) - RADIUS).max() < 0.0005


def test_too_few_frames_that_show_the_object_are_refused() -> None:
    views = list(views_of("sphere"))
    lost = [replace(view, mask=np.zeros_like(view.mask)) for view in views[2:]]
    with pytest.raises(InferenceFailed, match="2 of 12 views have a depth reading"):
        surface_of([*views[:2], *lost])


PANEL = trimesh.creation.box((0.3, 0.1, 0.2)).apply_translation(OBJECT_CENTRE)


def panel() -> list[View]:
    """A box seen from one side only, along y."""
    directions = np.array([[0.05, -1, 0.1], [0.2, -1, 0], [-0.2, -1, 0], [0, -1, -0.1]])
    return captured_from(PANEL, directions / np.linalg.norm(directions, axis=1)[:, None])


def from_above(height: float = 0.0) -> list[View]:
    views = views_of("sphere")
    return [view for view in views if view.camera is not None and view.camera.centre[2] > OBJECT_CENTRE[2] + height]


def test_a_one_sided_capture_is_an_open_surface() -> None:
    surface, mesh = surface_of(panel())
    assert surface.subject.kind == "surface" and surface.invented_share == 0
    assert "would be invented, so it stays open" in surface.subject.reason
    assert not mesh.is_watertight and mesh.body_count == 1
    front = np.abs(mesh.vertices[:, 1] - PANEL.bounds[0, 1])
    assert np.percentile(front, 80) < 0.0005
    assert mesh.vertices[:, 1].max() < OBJECT_CENTRE[1]  # not the other side
    beyond = np.abs(mesh.vertices - OBJECT_CENTRE) - PANEL.extents / 2
    assert beyond[:, [0, 2]].max() < surface.voxel_m  # no skirt around what was seen


def test_a_one_sided_capture_is_closed_if_it_is_said_to_be_an_object() -> None:
    surface, mesh = surface_of(panel(), subject="object")
    assert surface.subject.kind == "object" and surface.invented_share > 0.5
    assert is_one_closed_piece(mesh)


def test_a_surface_has_nothing_that_no_view_saw() -> None:
    views = from_above()
    closed, solid = surface_of(views)
    opened, mesh = surface_of(views, subject="surface")
    assert (opened.subject.kind, opened.invented_share, opened.subject.reason) == ("surface", 0, "asked for")
    assert closed.invented_share > 0.15 and is_one_closed_piece(solid)
    off, solid_off = (np.percentile(np.abs(radii(one) - RADIUS), 90) for one in (mesh, solid))
    assert off < 0.0005 < solid_off
    below, solid_below = (one.area_faces[one.face_normals[:, 2] < -0.9].sum() for one in (mesh, solid))
    assert below < 0.05 * solid_below  # left open


def test_the_invented_share_is_that_of_the_unseen() -> None:
    assert surface_of([*views_of("sphere")])[0].invented_share < 0.001
    few, many = (surface_of(from_above(height))[0].invented_share for height in (0.3, 0.0))
    assert few > many > 0.15


def test_space_that_is_in_no_picture_is_not_a_piece_of_the_object() -> None:
    """Four views from above leave two corners of the grid that lie in none of them."""
    surface, mesh = surface_of(from_above(0.3))
    assert surface.subject.kind == "object" and len(surface.views) == 4
    assert is_one_closed_piece(mesh)


@lru_cache
def on_a_table() -> tuple[View, ...]:
    """A block on a table, without alpha and bounds, in whole millimetres."""
    views = views_from_above(trimesh.util.concatenate([block(), table()]), 12, SIZE_PX)
    return tuple(with_depth(view, in_millimetres(view)) for view in views)


def in_millimetres(view: View) -> NDArray[np.floating]:
    assert view.depth is not None
    return np.rint(view.depth * 1000) / 1000


def test_an_object_on_a_table_is_closed_and_stands_flat() -> None:
    surface, mesh = surface_of([*on_a_table()])
    truth = block()
    assert surface.subject.kind == "object" and surface.subject.box is not None
    assert is_one_closed_piece(mesh)
    assert chamfer(mesh, truth, 5000) < 0.0025 * np.linalg.norm(truth.extents)
    assert mesh.volume == pytest.approx(truth.volume, rel=0.02)
    assert mesh.bounds[0, 2] == pytest.approx(PLACE[2], abs=0.0005)
    foot = (mesh.face_normals[:, 2] < -0.99) & (mesh.triangles_center[:, 2] < PLACE[2] + 0.001)
    assert mesh.area_faces[foot].sum() == pytest.approx(0.2 * 0.14, rel=0.1)
    assert np.percentile(mesh.vertices[mesh.faces[foot], 2], 95) - mesh.bounds[0, 2] < 0.0001
    assert surface.invented_share < 0.05  # the foot is closed by the plane, not invented


def test_the_table_belongs_to_a_surface() -> None:
    _, mesh = surface_of([*on_a_table()], subject="surface")
    top = np.abs(mesh.vertices[:, 2] - PLACE[2]) < 0.001
    assert top.mean() > 0.4 and np.ptp(mesh.vertices[top, 0]) > 0.6


def test_no_object_is_said_clearly_if_one_is_asked_for() -> None:
    views = views_from_above(table(), 6)
    surface, _ = surface_of(views)
    assert surface.subject.kind == "surface" and "no object on a plane was found" in surface.subject.reason
    with pytest.raises(InferenceFailed, match=r"no object was found.*infer.fusion.subject=surface"):
        surface_of(views, subject="object")


def test_a_room_is_a_surface() -> None:
    room = trimesh.creation.box((4, 3, 2.5)).apply_translation(PLACE)
    room.invert()
    poses = []
    for turn in np.linspace(0, 6, 12):
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(turn), 0, np.sin(turn)], [np.sin(turn), 0, -np.cos(turn)], [0, 1, 0]]
        pose[:3, 3] = PLACE
        poses.append(pose)
    surface, mesh = surface_of(views_of_scene(room, poses))
    assert surface.subject.kind == "surface" and not mesh.is_watertight
    walls = (np.abs(mesh.vertices - PLACE) / (2, 1.5, 1.25)).max(axis=1)
    assert np.median(np.abs(walls - 1)) < 0.002
    assert np.abs(walls - 1).max() < 0.05  # nothing hangs where a camera's view ends


def test_the_unseen_underside_of_a_ball_is_round_and_touches_the_table() -> None:
    """No view sees the lower third; the space that it hides there is not part of the ball."""
    radius = 0.08
    middle = PLACE + np.array([0, 0, radius])
    ball = trimesh.creation.icosphere(4, radius).apply_translation(middle)
    views = views_from_above(trimesh.util.concatenate([ball, table()]), 12, SIZE_PX)
    _, mesh = surface_of([with_depth(view, in_millimetres(view)) for view in views])
    assert is_one_closed_piece(mesh)
    below = mesh.vertices[mesh.vertices[:, 2] < PLACE[2] + radius / 2]
    astray = np.abs(np.linalg.norm(below - middle, axis=1) - radius)
    assert astray.mean() < 0.015 * 2 * radius  # 0.046 with the space that the ball hides
    assert mesh.bounds[0, 2] == pytest.approx(PLACE[2], abs=0.001)
    assert mesh.volume == pytest.approx(ball.volume, rel=0.03)


def test_readings_count_by_their_confidence() -> None:
    """Half of the views are 3 mm off, and say that they are not sure."""
    views = sphere_with(lambda depth: depth)
    astray = [with_depth(view, np.where(view.depth, view.depth + 0.003, 0)) for view in views[::2]]
    off = []
    for trust in (1.0, 0.1, 0.0):
        unsure = [replace(view, confidence=np.full(view.depth.shape, trust, np.float32)) for view in astray]
        _, mesh = surface_of([*views[1::2], *unsure])
        assert is_one_closed_piece(mesh)
        off.append(float(np.abs(radii(mesh) - RADIUS).mean()))
    assert off[0] > 0.001 and off[1] < 0.4 * off[0] and off[2] < 0.0005
