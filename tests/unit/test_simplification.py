"""Rough closed meshes keep their shape within the budget, stay closed, and are compared with the dense surface."""

from __future__ import annotations

import numpy as np
import point_cloud_utils as pcu
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import marching_cubes

from tasks.geometry.mesh_repair import Faces, Vertices, degenerate, is_closed, weld
from tasks.geometry.simplification import Simplified, simplify
from tasks.geometry.surface_distance import SampledSurface, surface_distance
from tests.synthetic import OBJECT_HALF, bowl, torus


def rough(seed: int, noise: float, smoothing: float = 1.0, cells: int = 60) -> tuple[Vertices, Faces]:
    """A bowl or a torus whose distances are noisy, with tunnels and bubbles: what a bad sensor's readings give."""
    axis = np.linspace(-OBJECT_HALF, OBJECT_HALF, cells)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    field = (bowl, torus)[seed % 2](points).reshape((cells,) * 3)
    noisy = field + ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(scale=noise, size=field.shape), smoothing
    )
    noisy = np.pad(np.where(np.abs(noisy) < 1e-6, 1e-6, noisy), 1, constant_values=OBJECT_HALF)
    vertices, faces, _, _ = marching_cubes(noisy, 0, gradient_direction="ascent")
    return (vertices * (axis[1] - axis[0])).astype(np.float32), faces[:, ::-1].astype(np.int32)


def assert_publishable(result: Simplified) -> None:
    mesh = trimesh.Trimesh(*weld(result.vertices, result.faces), process=False)
    assert is_closed(result.faces) and mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume > 0 and not degenerate(result.vertices, result.faces).any()
    assert len(mesh.faces) == len(result.faces)
    assert min(part.area for part in mesh.split(only_watertight=False)) > 0.01 * mesh.area


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(0, 0.06), share=st.floats(0.05, 0.5))
def test_rough_meshes_stay_closed_and_within_the_budget(seed: int, noise: float, share: float) -> None:
    vertices, faces = rough(seed, noise)
    budget = int(share * len(faces))
    result = simplify(vertices, faces, budget, noise=1.0)  # so large that no denser mesh is asked for
    assert_publishable(result)
    assert len(result.faces) <= budget
    assert result.error.mean_share < 0.01


def test_two_solids_stay_two() -> None:
    vertices, faces = rough(0, 0.01)
    both = np.concatenate([vertices, vertices + np.float32(1)])
    result = simplify(both, np.concatenate([faces, faces + len(vertices)]), 4000)
    assert_publishable(result)
    assert trimesh.Trimesh(result.vertices, result.faces, process=False).body_count == 2


def test_shape_that_the_budget_does_not_hold_gets_more_faces() -> None:
    vertices, faces = rough(0, 0.01)
    loose = simplify(vertices, faces, 300, noise=1.0)
    strict = simplify(vertices, faces, 300)
    assert len(loose.faces) <= 300 < len(strict.faces) <= 600
    assert strict.error.p999_m < loose.error.p999_m <= loose.limit
    assert strict.error.p999_m > strict.limit


def test_small_mesh_keeps_its_faces() -> None:
    box = trimesh.creation.box()
    result = simplify(box.vertices, box.faces, 100)
    assert len(result.faces) == 12 and result.error.p999_m < 1e-6


def test_crumbs_take_none_of_the_budget() -> None:
    vertices, faces = rough(0, 0.0)
    crumb = trimesh.creation.icosphere(subdivisions=4, radius=0.002)
    both = np.concatenate([vertices, crumb.vertices + 0.5])
    with_crumb = simplify(both, np.concatenate([faces, crumb.faces + len(vertices)]), 2000)
    assert with_crumb.faces.tobytes() == simplify(vertices, faces, 2000).faces.tobytes()


def test_what_encloses_nothing_is_refused() -> None:
    flat = np.array([[0, 1, 2], [0, 2, 1]])
    with pytest.raises(ValueError, match="encloses"):
        simplify(np.eye(3), flat, 100)


def test_distance_of_balls_is_the_difference_of_their_radii() -> None:
    inner, outer = (trimesh.creation.icosphere(subdivisions=5, radius=radius) for radius in (0.99, 1.0))
    one, other = (SampledSurface(ball.vertices.astype(np.float32), ball.faces) for ball in (inner, outer))
    distance = surface_distance(one, other)
    assert distance.mean_m == pytest.approx(0.01, rel=0.01) and distance.p999_m == pytest.approx(0.01, rel=0.05)
    assert distance.mean_share == pytest.approx(0.01 / (0.99 * 2 * 3**0.5), rel=0.02)
    assert surface_distance(one, one).p999_m < 1e-6


def test_distance_agrees_with_an_exact_one() -> None:
    dense = rough(1, 0.02)
    fewer = simplify(*dense, 1500)
    one, other = SampledSurface(*dense), SampledSurface(fewer.vertices, fewer.faces)
    exact, _, _ = pcu.closest_points_on_mesh(one.points.astype(np.float32), fewer.vertices, fewer.faces)
    ours = other.distances_of(one)
    assert (ours > exact - 1e-6).all()
    assert ours.mean() < 1.05 * exact.mean() and np.quantile(ours, 0.999) < 1.1 * np.quantile(exact, 0.999)


def test_result_has_the_same_bytes_again() -> None:
    dense = rough(3, 0.05)
    one, other = simplify(*dense, 2000), simplify(*dense, 2000)
    assert one.vertices.tobytes() == other.vertices.tobytes() and one.faces.tobytes() == other.faces.tobytes()
    assert one.error == other.error
