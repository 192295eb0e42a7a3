"""Depth as sensors deliver it: enlarged depth maps, the foot of an object on a table, large unseen parts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from tasks.capture.camera import Camera
from tasks.capture.images import DecodedDepth, decode_depth
from tasks.capture.subject import Box, Subject
from tasks.capture.views import View
from tasks.geometry import hole_filling
from tasks.geometry.depth import cut_out
from tasks.geometry.mesh_repair import vertex_links
from tasks.inference.fusion.fuse import _contact, _cut_out
from tasks.inference.fusion.solid_morphology import without_pockets


def decoded(metres: NDArray[np.float32]) -> DecodedDepth:
    stream = io.BytesIO()
    np.save(stream, metres)
    return decode_depth("depth/a.npy", stream.getvalue(), 0.001, None, 1_000_000)


def ramp(height: int, width: int) -> NDArray[np.float32]:
    rows, columns = np.indices((height, width))
    return (1 + 0.01 * rows + 0.002 * columns).astype(np.float32)


@pytest.mark.parametrize("block", [2, 3, 4, 8])
def test_enlarged_depth_is_read_at_its_native_size(block: int) -> None:
    native = ramp(24, 32)
    native[:9] = 0  # rows without a reading do not differ from each other
    found = decoded(np.kron(native, np.ones((block, block), np.float32)))
    np.testing.assert_array_equal(found.metres, native)
    np.testing.assert_array_equal(found.read, native > 0)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("size", [(750, 1000), (720, 960), (450, 600), (500, 667)])
def test_depth_enlarged_by_a_fraction_is_read_at_its_native_size(size: tuple[int, int], offset: float) -> None:
    native = ramp(192, 256)
    native[:60] = native[:, 200:] = 0
    rows, columns = (
        ((np.arange(large) + offset) * small / large).astype(int)
        for large, small in zip(size, native.shape, strict=True)
    )
    np.testing.assert_array_equal(decoded(native[np.ix_(rows, columns)]).metres, native)


def test_depth_that_repeats_by_chance_keeps_its_size() -> None:
    wall = np.ones((64, 64), np.float32)
    box = wall.copy()
    box[16:48, 16:48] = 0.5  # all of its edges lie at multiples of 16
    steps = np.repeat(ramp(64, 16), 4, axis=1)  # along one side only
    sparse = np.zeros((250, 332), np.float32)  # a reading in each third pixel
    sparse[1::3, 1::3] = ramp(83, 111)
    for metres in (wall, box, steps, sparse, ramp(64, 64)):
        np.testing.assert_array_equal(decoded(metres).metres, metres)


def test_the_table_around_a_foot_shows_free_space() -> None:
    """Readings of the table beside the object carve, else what its silhouette hides there stays as a crust."""
    depth = np.full((60, 60), 1.0, np.float32)  # a table seen from 1 m above
    depth[20:40, 20:40] = 0.9
    pose = np.eye(4)
    pose[2, 3] = 1.0
    camera = Camera(60, 60, 100.0, 100.0, 30.0, 30.0, pose)
    view = View("a", np.zeros((60, 60, 3), np.uint8), np.ones((60, 60), bool), depth, camera)
    box = Box(centre=(0, 0, 0.06), half=(0.2, 0.2, 0.055), axes=((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    subject = Subject(kind="object", box=box, plane=(0, 0, 1, 0))
    assert _contact(subject) == pytest.approx(0.005)
    found, alone = _cut_out(view, subject, _contact(subject)), cut_out(view.of(subject))
    assert found is not None
    assert alone is not None
    np.testing.assert_array_equal(found.silhouette, alone.silhouette)  # the table is background as before
    np.testing.assert_allclose(np.unique(alone.depth), [0, 0.9])
    np.testing.assert_allclose(np.unique(found.depth), [0, 0.9, 1.0])


def test_a_large_patch_is_bent_in_steps_to_nearly_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), axis=-1)
    vertices, faces, _, _ = marching_cubes(np.linalg.norm(grid - 19.5, axis=-1) - 15, 0.0)
    links = vertex_links(faces, len(vertices))
    patch = vertices[:, 2] > 30
    dented = vertices.astype(np.float64)
    dented[patch, 2] = 30.0
    exact, _ = hole_filling._thin_plate(dented, links, patch)
    monkeypatch.setattr(hole_filling, "MOST_FACTORISED", 0)
    relaxed, _ = hole_filling._thin_plate(dented, links, patch)
    before = np.abs(dented[patch] - exact).max()
    assert before > 1
    assert np.abs(relaxed - exact).max() < 0.05 * before


def test_spots_of_free_space_are_closed_only_beside_what_no_view_saw() -> None:
    up, inside = np.array([0.0, 0, 1, 0]), np.s_[4:-4, 4:-4]  # of the slit's ends: space around a volume is free
    volume = np.full((24, 24, 24), -1.0, np.float32)
    volume[:, :, 11:14] = 1.0  # a slit of three voxels
    seen = volume > 0
    seen[:, :, 20] = True  # the upper side
    assert (without_pockets(volume, seen, 1.0, up, 1.0)[inside] < 0).all()
    np.testing.assert_array_equal(without_pockets(volume, np.ones_like(seen), 1.0, up, 1.0), volume)
    volume[:, :, 6:19] = 1.0  # wider than any spot
    np.testing.assert_array_equal(without_pockets(volume, volume > 0, 1.0, up, 1.0), volume)


@pytest.mark.parametrize("up", [np.array([0.0, 0, 1]), np.array([0.0, -0.6, 0.8])])
def test_the_hole_of_a_handle_stays_open(up: NDArray[np.float64]) -> None:
    height = np.stack(np.meshgrid(*[np.arange(40.0)] * 3, indexing="ij"), axis=-1) @ up
    middle = height[20, 20, 20]
    height -= middle
    volume = np.where(np.abs(height) < 2, 1.0, -1.0).astype(np.float32)  # a slit, between unseen space
    seen = volume > 0
    inside = np.s_[12:-12, 12:-12, 12:-12]
    plane, contact = np.append(up, 15.0 - middle), 1.0  # in voxels, far below the slit
    upper, lower = (height > 5) & (height < 7), (height < -5) & (height > -7)
    assert (without_pockets(volume, seen | upper, 1.0, plane, contact)[inside] < 0).all()  # an underside
    handle = without_pockets(volume, seen | upper | lower, 1.0, plane, contact)
    np.testing.assert_array_equal(handle[inside], volume[inside])
    on_the_plane = np.append(up, 6.0 - middle)  # what is seen below is what the object stands on
    assert (without_pockets(volume, seen | upper | lower, 1.0, on_the_plane, 2.0)[inside] < 0).all()
