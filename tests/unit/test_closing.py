"""Meshes with holes, turned faces and touching sheets become closed and manifold; degenerate faces are mended."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.geometry.closing import closed, oriented
from tasks.geometry.manifold import parted, sheets_apart, without_degenerate, without_opposites
from tasks.geometry.mesh_repair import Faces, Vertices, degenerate, is_closed, volume, weld
from tasks.geometry.solids import repair, without_loose_pieces


def ball(subdivisions: int = 3) -> tuple[Vertices, Faces]:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions)
    return mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32)


def welded(vertices: Vertices, faces: Faces) -> trimesh.Trimesh:
    return trimesh.Trimesh(*weld(vertices, faces), process=False)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), missing=st.floats(0, 0.3), turned=st.floats(0, 0.2), doubled=st.floats(0, 0.1))
def test_a_damaged_ball_becomes_closed_and_outward(seed: int, missing: float, turned: float, doubled: float) -> None:
    vertices, faces = ball()
    rng = np.random.default_rng(seed)
    faces = faces[rng.random(len(faces)) >= missing]
    faces = np.concatenate([faces, faces[rng.random(len(faces)) < doubled]])
    turn = rng.random(len(faces)) < turned
    faces[turn] = faces[turn][:, ::-1]
    result = repair(vertices, faces)
    mesh = welded(*result)
    assert is_closed(result[1]) and mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume > 0 and not degenerate(*result).any()


def test_a_large_hole_is_closed_in_the_shape_around_it() -> None:
    vertices, faces = ball(4)
    open_faces = faces[vertices[faces].mean(axis=1)[:, 2] < 0.8]  # a cap of 37 degrees is missing
    patched, result = closed(vertices, open_faces)
    assert is_closed(result)
    fresh = patched[len(np.unique(open_faces)) :]
    radius = np.linalg.norm(fresh, axis=1)
    assert len(radius) > 20 and radius.min() > 0.89 and radius.max() < 1.01  # a flat lid: 0.8


@pytest.mark.parametrize("edges", [3, 4, 5, 7, 8, 9, 15, 16, 17, 40, 101])
def test_holes_of_every_size_are_closed(edges: int) -> None:
    around = 2 * np.pi * np.arange(edges) / edges
    ring = np.column_stack([np.cos(around), np.sin(around), np.zeros(edges)])
    cone = np.concatenate([ring, [[0, 0, -1]]]).astype(np.float32)
    index = np.arange(edges)
    faces = np.column_stack([(index + 1) % edges, index, np.full(edges, edges)])
    vertices, result = closed(cone, faces.astype(np.int32))
    assert is_closed(result)
    mesh = trimesh.Trimesh(vertices, result, process=False)
    assert mesh.euler_number == 2 and volume(vertices, result) > 0


def test_a_one_sided_sheet_becomes_closed() -> None:
    """A Moebius strip cannot be oriented: it parts where it meets itself."""
    steps, width = 40, 3
    turn = 2 * np.pi * np.arange(steps) / steps
    across = np.linspace(-0.3, 0.3, width)
    radius = 1 + across * np.cos(turn / 2)[:, None]
    grid = np.stack(
        [radius * np.cos(turn)[:, None], radius * np.sin(turn)[:, None], across * np.sin(turn / 2)[:, None]]
    )
    vertices = np.moveaxis(grid, 0, -1).reshape(-1, 3).astype(np.float32)
    faces = []
    for step in range(steps):
        for lane in range(width - 1):
            onward = (step + 1) % steps
            a, b = step * width + lane, step * width + lane + 1
            flip = onward == 0
            c, d = (onward * width + (width - 1 - k if flip else k) for k in (lane, lane + 1))
            faces += [[a, b, c], [b, d, c]]
    vertices, result = closed(vertices, np.array(faces, np.int32))
    assert is_closed(result)


def test_solids_that_share_an_edge_are_parted() -> None:
    box = trimesh.creation.box()
    both = np.concatenate([box.vertices, box.vertices + np.array([1, 1, 0])]).astype(np.float32)
    vertices, faces = weld(both, np.concatenate([box.faces, box.faces + 8]))
    assert not is_closed(faces)
    vertices, faces = sheets_apart(*parted(vertices, faces))
    mesh = welded(vertices, faces)
    assert is_closed(faces) and mesh.is_watertight and mesh.body_count == 2
    assert mesh.volume == pytest.approx(2, rel=1e-3)


def test_faces_back_to_back_go_and_other_doubles_stay() -> None:
    faces = np.array([[0, 1, 2], [1, 2, 3], [2, 1, 0], [5, 6, 7], [6, 7, 5]], np.int32)
    assert without_opposites(faces).tolist() == [[1, 2, 3], [5, 6, 7], [6, 7, 5]]


def test_turned_faces_are_turned_back() -> None:
    vertices, faces = ball(2)
    some = faces.copy()
    some[::7] = some[::7, ::-1]
    result = oriented(some)
    assert is_closed(result) and abs(volume(vertices, result)) == pytest.approx(volume(vertices, faces))


@pytest.mark.parametrize("place", [0.5, 1e-8])  # a cap: the vertex on the edge's middle; a needle: at its end
def test_degenerate_faces_are_mended(place: float) -> None:
    vertices, faces = ball(2)
    a, b, c = faces[0]
    between = ((1 - place) * vertices[a] + place * vertices[b]).astype(np.float32)
    new = len(vertices)
    vertices = np.concatenate([vertices, [between]])
    faces = np.concatenate([faces[1:], [[a, b, new], [b, c, new], [c, a, new]]]).astype(np.int32)
    assert is_closed(faces) and degenerate(vertices, faces).any()
    mended, result = without_degenerate(vertices, faces)
    assert is_closed(result) and not degenerate(mended, result).any()
    assert volume(mended, result) == pytest.approx(volume(vertices, faces), rel=1e-3)


def test_crumbs_and_cavities_go_and_solids_stay() -> None:
    vertices, faces = ball(2)
    parts = [(1.0, 0, 1), (0.5, 3, 1), (0.05, 6, 1), (0.5, 0, -1)]  # radius, place, outward or inward
    points = np.concatenate([radius * vertices + [place, 0, 0] for radius, place, _ in parts]).astype(np.float32)
    all_faces = np.concatenate([faces[:, ::way] + k * len(vertices) for k, (_, _, way) in enumerate(parts)])
    kept = without_loose_pieces(points, all_faces.astype(np.int32))
    mesh = welded(*kept)
    assert mesh.body_count == 2 and mesh.is_watertight
    assert kept[0].min() > -1.1 and kept[0].max() == pytest.approx(3.5, abs=0.01)
