"""Dense meshes with the defects of a model's output become solids; small ones show each defect by itself."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from tasks.geometry.mesh_repair import Faces, Vertices, sheets, volume, weld, winding_number, without_crumbs
from tasks.geometry.simplification import simplify
from tasks.geometry.solids import solidify
from tests.benchmarks.native_export import Dense, dense_mesh
from tests.synthetic import chamfer

CELLS = 90  # 79k faces
FACES = 5000


@lru_cache
def dense() -> Dense:
    return dense_mesh(CELLS)


@lru_cache
def solid() -> tuple[Vertices, Faces]:
    return within(dense().vertices, dense().faces, FACES)


def within(vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int) -> tuple[Vertices, Faces]:
    simplified = simplify(*solidify(vertices, faces, budget), budget)
    return simplified.vertices, simplified.faces


def as_mesh(vertices: Vertices, faces: Faces) -> trimesh.Trimesh:
    """Welded by position, as the published mesh is measured."""
    return trimesh.Trimesh(*weld(vertices, faces), process=False)


def ball(radius: float, subdivisions: int = 4) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)


def solidified(*parts: trimesh.Trimesh, budget: int = 2000) -> trimesh.Trimesh:
    soup = trimesh.util.concatenate(parts)
    return as_mesh(*within(soup.vertices, soup.faces, budget))


def test_defective_mesh_becomes_one_closed_outward_piece() -> None:
    before = as_mesh(dense().vertices, dense().faces)
    assert not before.is_watertight and before.body_count > 20
    mesh = as_mesh(*solid())
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1
    assert 0.9 * FACES < len(mesh.faces) <= FACES
    assert mesh.volume == pytest.approx(dense().whole.volume, rel=0.03)


def test_shape_is_kept_and_the_bowl_stays_open() -> None:
    """A sheet within the wall that got a lid would lie across the bowl: ten times as far from the truth."""
    diagonal = np.linalg.norm(dense().whole.extents)
    assert chamfer(as_mesh(*solid()), dense().whole, 5000) < 0.001 * diagonal
    assert winding_number(np.zeros(3), *solid()) == pytest.approx(0, abs=1e-3)


def test_an_inner_side_of_more_area_than_the_outer_one_goes() -> None:
    """As TRELLIS meshes have it: rough, just beneath the outer side, and of more faces."""
    outer, inner = ball(1.0), ball(0.95, subdivisions=5)
    inner.vertices *= np.random.default_rng(0).uniform(0.94, 1.0, (len(inner.vertices), 1))
    assert inner.area > outer.area
    mesh = solidified(inner, outer)
    assert mesh.is_watertight and mesh.body_count == 1
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.99


def test_result_has_the_same_bytes_again() -> None:
    again = within(dense().vertices, dense().faces, FACES)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(solid(), again, strict=True))
    assert again[0].dtype == np.float32 and again[1].dtype == np.int32


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_result_does_not_depend_on_the_unit(scale: float) -> None:
    mesh = as_mesh(*within(dense().vertices * np.float32(scale), dense().faces, FACES))
    mesh.apply_scale(1 / scale)
    assert mesh.is_watertight and mesh.body_count == 1 and len(mesh.faces) <= FACES
    assert chamfer(mesh, dense().whole, 5000) < 0.001 * np.linalg.norm(dense().whole.extents)


def test_inside_out_mesh_is_turned() -> None:
    mesh = ball(1.0)
    mesh.invert()
    assert solidified(mesh).volume == pytest.approx(4 / 3 * np.pi, rel=0.01)


def test_two_solids_stay_and_what_lies_inside_of_one_goes() -> None:
    other, cavity, core = ball(0.5), ball(0.6), ball(0.3)
    other.apply_translation((3, 0, 0))
    cavity.invert()
    mesh = solidified(ball(1.0), other, cavity, core)
    assert mesh.is_watertight and mesh.body_count == 2
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * (1 + 0.5**3), rel=0.01)


def test_small_closed_mesh_keeps_its_faces() -> None:
    box = trimesh.creation.box()
    assert len(solidified(box).faces) == len(box.faces)


@pytest.mark.parametrize("corners", [[[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 0, 0]] * 4])
def test_what_encloses_nothing_is_refused(corners: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="encloses"):
        solidify(np.array(corners, np.float32), np.array([[0, 1, 2], [0, 2, 3]]), 100)


def test_edges_of_three_faces_part_sheets() -> None:
    faces = np.array([[0, 1, 2], [1, 0, 3], [1, 0, 4], [1, 4, 5]])
    labels = sheets(faces)
    assert labels[2] == labels[3]
    assert len(set(labels.tolist())) == 3


def test_winding_number_tells_inside_from_outside() -> None:
    mesh = ball(1.0, 2)
    for place, expected in ((0.0, 1), (0.9, 1), (1.1, 0), (50.0, 0)):
        assert winding_number(np.array([place, 0, 0]), mesh.vertices, mesh.faces) == pytest.approx(expected, abs=1e-6)


def test_without_crumbs_refuses_what_encloses_nothing() -> None:
    inside_out = ball(1.0, 1)
    inside_out.invert()
    for faces in (inside_out.faces, np.zeros((0, 3), np.int32)):
        with pytest.raises(ValueError, match="encloses"):
            without_crumbs(inside_out.vertices, faces, 0.02)
    assert volume(inside_out.vertices, inside_out.faces) < 0
