"""The measurements of a mesh, and the checks that make it a warning or a failure."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import trimesh
from trimesh.visual.color import ColorVisuals

from tasks.capture.subject import Subject
from tasks.capture.views import load_views
from tasks.geometry.texture import unwrap
from tasks.inference.engine import SurfaceFacts
from tasks.mesh.convert import load_glb
from tasks.mesh.export import CAPTURE_TO_GLTF, Mesh, glb_of
from tasks.mesh.validate import MOST_NEAR, captured_points, checks_of, measure, near_distance
from tasks.report import Check, status_of
from tasks.settings import Limits
from tests.support.tiny import RADIUS, tiny_capture

NO_POINTS = np.empty((0, 3), np.float32)
LIMITS = Limits(min_vertices=100)


def glb(mesh: trimesh.Trimesh) -> bytes:
    return glb_of(unwrap(mesh.vertices, mesh.faces, 64), np.full((64, 64, 3), 128, np.uint8))


def checked(
    data: bytes,
    coverage: float = 1.0,
    points: np.ndarray = NO_POINTS,
    limits: Limits = LIMITS,
    surface: SurfaceFacts | None = None,
) -> dict[str, Check]:
    asset = Mesh(
        exporter="native",
        decimated_by="fast-simplification",
        texture_px=64,
        texture_coverage=coverage,
        metric=True,
        surface=surface,
    )
    loaded, summary = measure(data, asset)
    return {check.name: check for check in checks_of(loaded, summary, points, limits, surface)}


def measured(kind: Literal["object", "surface"] = "object", invented_share: float = 0.0) -> SurfaceFacts:
    """Facts of a capture with 1 mm of noise, 2 mm voxels."""
    return SurfaceFacts(
        subject=Subject(kind=kind),
        depth_step_m=0.001,
        noise_m=0.0008,
        noise_m_at_1m=0.001,
        spread_m=0.0006,
        voxel_m=0.002,
        invented_share=invented_share,
    )


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


def ball(radius: float = 0.1) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=3, radius=radius)


def test_a_good_mesh_passes_and_is_measured_in_the_capture_frame() -> None:
    mesh = ball()
    mesh.apply_scale([1, 2, 3])
    asset = Mesh(
        exporter="native", decimated_by="fast-simplification", texture_px=64, texture_coverage=1.0, metric=True
    )
    loaded, summary = measure(glb(mesh), asset)
    assert summary.extent_m == pytest.approx((0.2, 0.4, 0.6), abs=0.01)
    assert (summary.watertight, summary.components, summary.degenerate_faces) == (True, 1, 0)
    assert summary.faces == len(mesh.faces)
    checks = checks_of(loaded, summary, NO_POINTS, LIMITS)
    assert status_of(checks) == "normal"
    assert "captured_share" not in {check.name for check in checks}


def test_a_box_is_a_placeholder() -> None:
    checks = checked(glb(trimesh.creation.box()), limits=Limits(min_vertices=1))
    assert failed(checks) == {"not_a_placeholder"}
    assert status_of(tuple(checks.values())) == "failure"


def test_few_vertices_are_a_failure() -> None:
    checks = checked(glb(ball()), limits=Limits(min_vertices=10_000))
    assert failed(checks) == {"vertices"}
    assert status_of(tuple(checks.values())) == "failure"


def test_no_appearance_is_a_failure() -> None:
    plain = ball()
    plain.visual = ColorVisuals(plain)
    data = trimesh.Scene(plain).export(file_type="glb")
    assert "appearance" in failed(checked(data))


def test_vertices_that_are_not_finite_are_a_failure() -> None:
    broken = ball()
    data = bytearray(glb(broken))
    position = data.find(load_glb(bytes(data)).vertices[7].astype("<f4").tobytes())
    assert position > 0
    data[position : position + 4] = np.float32("nan").tobytes()
    checks = checked(bytes(data))
    assert {"finite", "extent"} <= failed(checks)
    assert status_of(tuple(checks.values())) == "failure"


def test_an_open_mesh_in_two_pieces_seen_in_part_is_a_warning() -> None:
    two = trimesh.util.concatenate([ball(), ball(0.05).apply_translation([0.5, 0, 0])])
    two.update_faces(np.arange(len(two.faces)) > 3)
    checks = checked(glb(two), coverage=0.5)
    assert failed(checks) == {"watertight", "components", "texture_coverage"}
    assert status_of(tuple(checks.values())) == "warning"


def test_a_mesh_far_from_the_captured_points_is_a_failure() -> None:
    mesh = ball()
    surface = (mesh.vertices @ CAPTURE_TO_GLTF.T).astype(np.float32)
    assert failed(checked(glb(mesh), points=surface)) == set()
    assert failed(checked(glb(mesh), points=surface + np.float32(0.1))) == {"captured_share"}


def test_a_mesh_without_its_lower_third_is_a_failure_by_the_sensors_noise() -> None:
    whole = ball()
    points = (trimesh.sample.sample_surface(whole, 3000, seed=1)[0] @ CAPTURE_TO_GLTF.T).astype(np.float32)
    noisy = points + np.random.default_rng(0).normal(0, 0.001, points.shape).astype(np.float32)
    assert failed(checked(glb(whole), points=noisy, surface=measured())) == set()
    cut = trimesh.Trimesh(whole.vertices.clip([-1, -1, -0.1 / 3]), whole.faces, process=False)  # closed flat
    checks = checked(glb(cut), points=noisy, surface=measured())
    assert failed(checks) == {"captured_share"} and checks["captured_share"].value == pytest.approx(0.69, abs=0.03)
    assert status_of(tuple(checks.values())) == "failure"


@pytest.mark.parametrize(
    ("coverage", "names", "status"),
    [
        (0.95, set(), "normal"),
        (0.31, {"texture_coverage"}, "warning"),
        (0.29, {"texture_floor", "texture_coverage"}, "failure"),
    ],
)
def test_texture_that_hardly_any_view_saw_is_a_failure(coverage: float, names: set[str], status: str) -> None:
    checks = checked(glb(ball()), coverage=coverage)
    assert failed(checks) == names
    assert status_of(tuple(checks.values())) == status


def test_a_small_part_that_is_missing_is_seen_by_the_sensors_noise_and_not_by_a_share_of_the_diagonal() -> None:
    whole = ball()
    points = (trimesh.sample.sample_surface(whole, 3000, seed=1)[0] @ CAPTURE_TO_GLTF.T).astype(np.float32)
    cut = trimesh.Trimesh(whole.vertices.clip([-1, -1, -0.07]), whole.faces, process=False)
    assert "captured_share" in failed(checked(glb(cut), points=points, surface=measured()))
    assert "captured_share" not in failed(checked(glb(cut), points=points))


def test_an_open_surface_is_not_asked_to_be_closed_or_in_one_piece() -> None:
    two = trimesh.util.concatenate([ball(), ball(0.05).apply_translation([0.5, 0, 0])])
    two.update_faces(np.arange(len(two.faces)) > 3)
    checks = checked(glb(two), surface=measured("surface"))
    assert failed(checks) == set() and not {"watertight", "components"} & set(checks)
    assert failed(checked(glb(two), surface=measured("object"))) == {"watertight", "components"}


@pytest.mark.parametrize(("share", "status"), [(0.14, "normal"), (0.16, "warning")])
def test_much_surface_that_no_view_saw_is_a_warning(share: float, status: str) -> None:
    checks = checked(glb(ball()), surface=measured(invented_share=share))
    assert (checks["invented_share"].value, checks["invented_share"].limit) == (share, 0.15)
    assert status_of(tuple(checks.values())) == status
    assert "invented_share" not in checked(glb(ball()))


@pytest.mark.parametrize(
    ("noise", "spread", "limits", "expected"),
    [
        (0.0, 0.0, LIMITS, 0.002),
        (0.0003, 0.0004, LIMITS, 0.0035),
        (0.0001, 0.02, LIMITS, MOST_NEAR),
        (0.0003, 0.0004, Limits(captured_distance=0.2), 0.2),
    ],
    ids=["voxels", "noise and voxels", "contradictions", "given"],
)
def test_near_follows_from_the_noise_but_contradictions_do_not_pass_as_noise(
    noise: float, spread: float, limits: Limits, expected: float
) -> None:
    facts = SurfaceFacts(
        subject=Subject(kind="object", reason=""),
        depth_step_m=0.0,
        noise_m=noise,
        noise_m_at_1m=noise,
        spread_m=spread,
        voxel_m=0.001,
        invented_share=0.0,
    )
    assert near_distance(facts, 1.0, limits) == pytest.approx(expected)
    assert near_distance(None, 1.0, LIMITS) == MOST_NEAR


def test_captured_points_lie_on_the_captured_ball() -> None:
    content = tiny_capture()
    points = captured_points(load_views(content, content.__getitem__))
    assert len(points) > 500
    assert np.abs(np.linalg.norm(points, axis=1) - RADIUS).max() < 0.05 * RADIUS
