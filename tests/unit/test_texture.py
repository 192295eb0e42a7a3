"""Simplification, repair, unwrapping and baking on small meshes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.geometry.mesh_repair import face_normals, is_closed, volume, weld
from tasks.geometry.render import Hits, RayScene, render, sample_texture
from tasks.geometry.simplification import simplify
from tasks.geometry.solids import repair
from tasks.geometry.texture import Unwrapped, VertexColours, bake, unwrap, vertex_normals
from tests.support.surface_gaussians import gaussians_on
from tests.synthetic import fibonacci_sphere, look_at

SIZE = 96
TEXTURE_PX = 256
BACKGROUND = (255, 0, 255)  # a colour that the object has nowhere


def smooth_colours(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """Greens and blues without red, (n, 3) in 0..255."""
    return np.column_stack([np.zeros(len(points)), 130 + 300 * points[:, 0], 130 + 300 * points[:, 2]])


def photographed(mesh: trimesh.Trimesh, count: int = 14) -> list[View]:
    def colours(hits: Hits) -> NDArray[np.float32]:
        return smooth_colours(hits.points).astype(np.float32)

    scene, views = RayScene(mesh, colours), []
    for index, direction in enumerate(fibonacci_sphere(count)):
        camera = Camera(SIZE, SIZE, 220.0, 220.0, SIZE / 2, SIZE / 2, look_at(direction, np.zeros(3)))
        seen = render(scene, camera)
        image = np.where(seen.mask[..., None], seen.image, np.array(BACKGROUND, np.uint8))
        views.append(View(f"view_{index:03d}", image, seen.mask, seen.depth, camera))
    return views


@lru_cache
def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=4, radius=0.15)


@lru_cache
def unwrapped_ball() -> Unwrapped:
    return unwrap(ball().vertices, ball().faces, TEXTURE_PX)


def texel_colours(unwrapped: Unwrapped, texture: NDArray[np.uint8]) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Points inside the faces, and what the texture shows there."""
    points = unwrapped.vertices[unwrapped.faces].mean(axis=1)
    uv = unwrapped.uv[unwrapped.faces].mean(axis=1)
    return points, sample_texture(texture.astype(np.float32), uv)


def test_simplify_keeps_to_the_budget_and_the_shape() -> None:
    fewer = simplify(ball().vertices, ball().faces, 1000)
    assert len(fewer.faces) <= 1000 and fewer.error.p999_m <= fewer.limit
    assert np.abs(np.linalg.norm(fewer.vertices, axis=1) - 0.15).max() < 0.003
    small = simplify(fewer.vertices, fewer.faces, 5000)
    assert small.faces.tobytes() == fewer.faces.tobytes()


def test_repair_closes_holes_and_turns_outwards() -> None:
    mesh = ball().copy()
    holed = np.delete(mesh.faces, [5, 6, 7, 400, 401, 1200], axis=0)[:, ::-1]
    assert not is_closed(holed)
    vertices, faces = repair(mesh.vertices, holed)
    assert is_closed(faces)
    assert volume(vertices, faces) == pytest.approx(mesh.volume, rel=0.01)
    assert np.linalg.norm(face_normals(vertices, faces), axis=1).min() > 0
    again = repair(mesh.vertices, holed)
    assert vertices.tobytes() == again[0].tobytes() and faces.tobytes() == again[1].tobytes()


def test_repair_leaves_a_closed_mesh_of_several_pieces_alone() -> None:
    other = ball().copy()
    other.apply_translation((1, 0, 0))
    both = trimesh.util.concatenate([ball(), other])
    vertices, faces = repair(both.vertices, both.faces)
    result = trimesh.Trimesh(vertices, faces, process=False)
    assert result.body_count == 2 and result.is_watertight
    assert len(faces) == len(both.faces)


def test_repair_drops_degenerate_faces_and_splits_touching_solids() -> None:
    box = trimesh.creation.box()
    touching = np.concatenate([box.vertices, box.vertices + 1])  # they share one corner
    faces = np.concatenate([box.faces, box.faces + 8, [[0, 0, 1]]])
    vertices, faces = repair(touching, faces)
    assert len(faces) == 24
    welded_vertices, welded = weld(vertices, faces)
    result = trimesh.Trimesh(welded_vertices, welded, process=False)
    assert result.is_watertight and result.body_count == 2
    assert result.volume == pytest.approx(2, rel=1e-3)


def test_repair_refuses_what_encloses_nothing() -> None:
    with pytest.raises(ValueError, match="encloses"):
        repair(np.eye(3), np.array([[0, 0, 1]]))


def test_unwrap_covers_every_face_without_overlap() -> None:
    unwrapped = unwrapped_ball()
    assert len(unwrapped.faces) == len(ball().faces)
    assert np.array_equal(unwrapped.vertices, ball().vertices.astype(np.float32)[unwrapped.source])
    assert unwrapped.uv.min() >= 0 and unwrapped.uv.max() <= 1
    a, b, c = (unwrapped.uv[unwrapped.faces[:, corner]].astype(float) for corner in range(3))
    area = np.abs(np.cross(np.pad(b - a, ((0, 0), (0, 1))), np.pad(c - a, ((0, 0), (0, 1))))[:, 2]) / 2
    assert area.min() > 0
    assert 0.3 < area.sum() < 1
    assert np.allclose(np.linalg.norm(vertex_normals(unwrapped), axis=1), 1, atol=1e-5)


def test_small_objects_are_not_shattered_into_charts() -> None:
    charts = [
        trimesh.Trimesh(u.vertices, u.faces, process=False).body_count
        for u in (unwrap(ball().vertices * scale, ball().faces, TEXTURE_PX) for scale in (0.1, 1, 100))
    ]
    assert max(charts) < 60
    assert max(charts) <= 2 * min(charts)


def test_bake_gives_the_right_colour_everywhere() -> None:
    texture, coverage = bake(unwrapped_ball(), photographed(ball()), TEXTURE_PX)
    points, colours = texel_colours(unwrapped_ball(), texture)
    assert texture.shape == (TEXTURE_PX, TEXTURE_PX, 3) and texture.dtype == np.uint8
    assert coverage is not None and coverage > 0.99
    assert np.abs(colours - smooth_colours(points)).max() < 6


def test_bake_lets_no_background_in() -> None:
    """The object has no red at all: neither edges, seams nor the space between charts may show any."""
    texture, _ = bake(unwrapped_ball(), photographed(ball()), TEXTURE_PX)
    assert texture[..., 0].max() == 0


def test_bake_is_reproducible() -> None:
    views = photographed(ball())
    first, second = (bake(unwrapped_ball(), views, TEXTURE_PX) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes() and first[1] == second[1]


def test_bake_fills_what_no_view_saw_from_its_neighbours() -> None:
    above = [view for view in photographed(ball()) if view.camera is not None and view.camera.centre[2] > 0.3]
    texture, coverage = bake(unwrapped_ball(), above, TEXTURE_PX)
    points, colours = texel_colours(unwrapped_ball(), texture)
    below = points[:, 2] < -0.12
    assert coverage is not None and 0.4 < coverage < 0.9
    assert texture[..., 0].max() == 0
    assert colours[below, 1].min() > 50  # not left black


def test_bake_does_not_paint_through_what_stands_in_front() -> None:
    """A small ball before a large one: the large one's hidden part does not take the small one's colour."""
    small = trimesh.creation.icosphere(subdivisions=3, radius=0.03)
    small.apply_translation((0, 0, 0.19))
    both = trimesh.util.concatenate([ball(), small])
    unwrapped = unwrap(both.vertices, both.faces, TEXTURE_PX)
    red = [replace(view, image=_painted_red(view, both)) for view in photographed(both)]
    texture, _ = bake(unwrapped, red, TEXTURE_PX)
    points, colours = texel_colours(unwrapped, texture)
    on_ball = np.linalg.norm(points, axis=1) < 0.151
    assert np.percentile(colours[on_ball, 0], 99) < 10  # but where the balls all but touch
    assert np.percentile(colours[~on_ball, 0], 5) > 150


@lru_cache
def dense_colours() -> VertexColours:
    """Of a ball of 16 times as many faces, in reds and blues: the views show no red."""
    dense = trimesh.creation.icosphere(subdivisions=6, radius=0.15)
    colours = smooth_colours(dense.vertices)[:, [1, 0, 2]]
    return VertexColours(dense.vertices.astype(np.float32), (colours / 255).astype(np.float32))


def test_bake_from_vertex_colours_alone() -> None:
    texture, coverage = bake(unwrapped_ball(), (), TEXTURE_PX, dense_colours())
    points, colours = texel_colours(unwrapped_ball(), texture)
    assert coverage is None
    assert np.abs(colours - smooth_colours(points)[:, [1, 0, 2]]).max() < 3


def test_vertex_colours_fill_what_no_view_saw_and_nothing_else() -> None:
    above = [view for view in photographed(ball()) if view.camera is not None and view.camera.centre[2] > 0.3]
    plain, coverage = bake(unwrapped_ball(), above, TEXTURE_PX)
    texture, same_coverage = bake(unwrapped_ball(), above, TEXTURE_PX, dense_colours())
    points, colours = texel_colours(unwrapped_ball(), texture)
    below, top = points[:, 2] < -0.12, points[:, 2] > 0.05
    assert coverage == same_coverage
    assert np.abs(colours[below] - smooth_colours(points[below])[:, [1, 0, 2]]).max() < 3
    assert np.abs(colours[top] - texel_colours(unwrapped_ball(), plain)[1][top]).max() == 0


def test_bake_from_vertex_colours_is_reproducible() -> None:
    first, second = (bake(unwrapped_ball(), (), TEXTURE_PX, dense_colours())[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_gaussians_fill_what_no_view_saw_and_vertex_colours_where_no_gaussian_is() -> None:
    above = [view for view in photographed(ball()) if view.camera is not None and view.camera.centre[2] > 0.3]
    plain, _ = bake(unwrapped_ball(), above, TEXTURE_PX)
    red = gaussians_on(ball(), 4000, lambda points: np.tile([1.0, 0.0, 0.0], (len(points), 1)))
    half = replace(red, opacities=np.where(red.centres[:, 0] > 0, red.opacities, 0).astype(np.float32))
    texture, _ = bake(unwrapped_ball(), above, TEXTURE_PX, dense_colours(), half)
    points, colours = texel_colours(unwrapped_ball(), texture)
    below, top, right, left = points[:, 2] < -0.12, points[:, 2] > 0.05, points[:, 0] > 0.02, points[:, 0] < -0.02
    assert np.abs(colours[top] - texel_colours(unwrapped_ball(), plain)[1][top]).max() == 0
    assert np.median(np.abs(colours[below & right] - [255, 0, 0])) < 1
    assert np.abs(colours[below & left] - smooth_colours(points[below & left])[:, [1, 0, 2]]).max() < 3


def test_bake_needs_something_to_paint_from() -> None:
    with pytest.raises(ValueError, match="views, gaussians or vertex colours"):
        bake(unwrapped_ball(), (), TEXTURE_PX)


def _painted_red(view: View, mesh: trimesh.Trimesh) -> NDArray[np.uint8]:
    """The view's image with the small ball, wherever it is seen, in red."""
    assert view.camera is not None
    hits = RayScene(mesh).view(view.camera)
    image = view.image.copy()
    image[~view.mask] = 0
    image.reshape(-1, 3)[hits.ray[hits.face >= len(ball().faces)]] = (200, 0, 0)
    return image
