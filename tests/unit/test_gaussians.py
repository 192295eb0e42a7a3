"""The colours that gaussians give to a surface, against a rasteriser's formula and against vertex colours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.geometry.gaussians import NEAREST, Gaussians, SplatCompositor
from tasks.geometry.render import sample_texture
from tasks.geometry.texture import Unwrapped, VertexColours, bake, unwrap
from tests.support.surface_gaussians import gaussians_on, trained
from tests.synthetic import OBJECT_CENTRE, OBJECT_HALF, field_mesh, pattern
from tests.synthetic.shapes import sphere

TEXTURE_PX = 256
CELLS = 48  # cubes along the object
VOXEL_CELLS, PER_VOXEL = 4, 32  # of TRELLIS: cubes along a voxel, and gaussians of a voxel


def some_gaussians(count: int) -> Gaussians:
    rng = np.random.default_rng(3)
    rotations = rng.normal(size=(count, 4))
    return Gaussians(
        centres=rng.normal(scale=0.3, size=(count, 3)).astype(np.float32),
        scales=rng.uniform(0.1, 0.5, (count, 3)).astype(np.float32),
        rotations=(rotations / np.linalg.norm(rotations, axis=1, keepdims=True)).astype(np.float32),
        opacities=rng.uniform(0.2, 1, count).astype(np.float32),
        colours=rng.random((count, 3)).astype(np.float32),
    )


def some_places(count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(4)
    normals = rng.normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return rng.normal(scale=0.3, size=(count, 3)).astype(np.float32), normals.astype(np.float32)


def rasterised(gaussians: Gaussians, place: NDArray[np.float32], normal: NDArray[np.float32]) -> NDArray[np.floating]:
    """Colour and opacity (4,) of a place, with the gaussians' covariances projected to the plane across the normal."""
    plane = np.linalg.svd(normal[None].astype(float))[2][1:]
    sums, passed = np.zeros(4), 1.0
    for index in np.argsort(-(gaussians.centres - place) @ normal):
        axes = Rotation.from_quat(gaussians.rotations[index], scalar_first=True).as_matrix() * gaussians.scales[index]
        covariance = plane @ axes @ axes.T @ plane.T
        offset = plane @ (gaussians.centres[index] - place)
        alpha = gaussians.opacities[index] * np.exp(-offset @ np.linalg.solve(covariance, offset) / 2)
        sums += passed * alpha * np.append(gaussians.colours[index], 1)
        passed *= 1 - alpha
    return np.append(sums[:3] / sums[3], sums[3])


def test_the_colours_are_those_of_a_rasteriser_that_looks_along_the_normal() -> None:
    gaussians, (places, normals) = some_gaussians(NEAREST), some_places(20)
    expected = np.array([rasterised(gaussians, *each) for each in zip(places, normals, strict=True)])
    colours, opacity = SplatCompositor(gaussians).colours(places, normals)
    np.testing.assert_allclose(colours, expected[:, :3], atol=1e-4)
    np.testing.assert_allclose(opacity, expected[:, 3], atol=1e-4)


def test_colours_do_not_depend_on_the_frame() -> None:
    gaussians, (places, normals) = some_gaussians(30), some_places(20)
    turn = Rotation.from_euler("xyz", [0.3, -1.0, 2.0]).as_matrix()
    similarity = np.eye(4)
    similarity[:3] = np.column_stack([3 * turn, [1, 2, 3]])
    moved = (places @ similarity[:3, :3].T + similarity[:3, 3]).astype(np.float32)
    colours, opacity = SplatCompositor(gaussians.moved(similarity)).colours(
        moved, (normals @ turn.T).astype(np.float32)
    )
    expected, expected_opacity = SplatCompositor(gaussians).colours(places, normals)
    np.testing.assert_allclose(colours, expected, atol=1e-3)
    np.testing.assert_allclose(opacity, expected_opacity, atol=1e-3)


def test_without_visible_gaussians_nothing_is_opaque() -> None:
    gaussians, (places, normals) = some_gaussians(5), some_places(3)
    assert not SplatCompositor(replace(gaussians, opacities=np.zeros(5, np.float32))).colours(places, normals)[1].any()


def colours_at(points: NDArray[np.floating]) -> NDArray[np.floating]:
    return pattern(points + OBJECT_CENTRE) / 255


def test_a_pattern_is_nearer_to_the_truth_than_with_the_colours_of_vertices() -> None:
    """A ball as dense as a model's cubes make it, and as many gaussians as its decoder gives to voxels that large."""
    dense = field_mesh(sphere, OBJECT_HALF, CELLS)
    voxels = np.unique(np.floor(dense.vertices / (VOXEL_CELLS * 2 * OBJECT_HALF / CELLS)), axis=0)
    gaussians = trained(gaussians_on(dense, PER_VOXEL * len(voxels), colours_at), dense, colours_at)
    unwrapped = unwrap(ball().vertices, ball().faces, TEXTURE_PX)
    vertices = VertexColours(dense.vertices.astype(np.float32), colours_at(dense.vertices).astype(np.float32))
    textures = [bake(unwrapped, (), TEXTURE_PX, vertices, each)[0] for each in (None, gaussians, gaussians)]
    errors = [error(unwrapped, texture) for texture in textures]
    assert errors[1] < 0.75 * errors[0], (len(dense.vertices), len(gaussians.centres))
    assert textures[1].tobytes() == textures[2].tobytes()


def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=4, radius=0.15)


def error(unwrapped: Unwrapped, texture: NDArray[np.uint8]) -> float:
    """Root mean square error of the texture's colours, of 255."""
    points = unwrapped.vertices[unwrapped.faces].mean(axis=1)
    shown = sample_texture(texture.astype(np.float32), unwrapped.uv[unwrapped.faces].mean(axis=1))
    return float(np.sqrt(np.mean((shown - 255 * colours_at(points)) ** 2)))
