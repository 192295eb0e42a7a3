"""Masks, decoded views and their contact sheet."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tasks.capture import masks
from tasks.capture.contact_sheet import contact_sheet, thumbnail
from tasks.capture.images import DecodeError
from tasks.capture.subject import Box
from tasks.capture.views import View, decoded_views, load_views
from tests.support.tiny import RADIUS, SIZE, Content, ball_depth, edited, encoded, ring, steps, tiny_capture

GOOD = tiny_capture()


def views_of(content: Content, names: list[str] | None = None) -> list[View]:
    return load_views(content, content.__getitem__, names)


def with_depth(content: Content, index: int, depth: np.ndarray) -> Content:
    return content | {f"depth/view_{index:03d}.png": encoded(steps(depth))}


def test_views_have_everything() -> None:
    views = views_of(GOOD)
    assert [view.name for view in views] == ["view_000", "view_001", "view_002", "view_003"]
    view, camera = views[1], ring(4)[1]
    assert view.image.shape == (SIZE, SIZE, 3)
    assert view.depth is not None
    assert view.camera is not None
    np.testing.assert_array_equal(view.mask, ball_depth(camera) > 0)
    np.testing.assert_allclose(view.depth, ball_depth(camera), atol=1e-4)
    np.testing.assert_allclose(view.camera.camera_to_world, camera.camera_to_world)


def test_views_are_decoded_as_they_are_taken() -> None:
    content = tiny_capture(40)
    read: list[str] = []

    def reader(path: str) -> bytes:
        read.append(path)
        return content[path]

    views = decoded_views(content, reader)
    assert next(views).name == "view_000"
    assert len(read) < 40
    assert len([*views]) == 39


def test_depth_and_camera_give_the_surface() -> None:
    for view in views_of(GOOD):
        assert view.depth is not None
        assert view.camera is not None
        points = view.camera.centre + view.depth.reshape(-1, 1) * view.camera.rays()
        radii = np.linalg.norm(points[view.depth.ravel() > 0], axis=1)
        np.testing.assert_allclose(radii, RADIUS, atol=2e-4)


def test_named_views_only() -> None:
    assert [view.name for view in views_of(GOOD, ["view_002", "view_000"])] == ["view_000", "view_002"]


def test_without_anything_the_mask_is_full() -> None:
    image = tiny_capture(alpha=False)["views/view_000.png"]
    view = views_of({"views/view_000.png": image})[0]
    assert view.mask.all()
    assert view.depth is None
    assert view.camera is None


def test_the_mask_of_depth_is_filled_and_dilated() -> None:
    depth = ball_depth(ring(4)[0])
    pierced = depth.copy()
    pierced[30:34, 30:34] = 0
    view = views_of(with_depth(tiny_capture(alpha=False), 0, pierced))[0]
    assert view.mask[depth > 0].all()
    assert view.depth is not None
    assert not view.depth[30:34, 30:34].any()
    extra = view.mask.sum() / (depth > 0).sum() - 1
    assert 0.1 < extra < 0.35


def test_depth_outside_of_the_alpha_is_dropped() -> None:
    depth = ball_depth(ring(4)[0])
    view = views_of(with_depth(GOOD, 0, np.where(depth > 0, depth, np.float32(2))))[0]
    assert view.depth is not None
    np.testing.assert_allclose(view.depth, depth, atol=1e-4)


def test_bounds_cut_depth_and_background_seen_through_a_hole() -> None:
    depth = ball_depth(ring(4)[0])
    depth[28:36, 28:36] = 0
    scene = np.where(depth > 0, depth, np.float32(2.5))
    content = edited(tiny_capture(alpha=False), bounds=[[-0.4] * 3, [0.4] * 3])
    view = views_of(with_depth(content, 0, scene))[0]
    assert view.depth is not None
    np.testing.assert_allclose(view.depth, depth, atol=1e-4)
    assert not view.mask[31:33, 31:33].any()


def test_a_mask_from_a_depth_map_of_another_size() -> None:
    camera = ring(4)[0].resized(32, 32)
    view = views_of(with_depth(tiny_capture(alpha=False), 0, ball_depth(camera)))[0]
    assert view.mask.shape == (SIZE, SIZE)
    assert view.mask[ball_depth(ring(4)[0]) > 0].mean() > 0.99


def test_a_broken_view_is_named() -> None:
    with pytest.raises(DecodeError, match="views/view_001"):
        views_of(GOOD | {"views/view_001.png": b"x"})


def test_resampling_covers_the_same_field_of_view() -> None:
    mask = np.array([[True, False], [False, False]])
    np.testing.assert_array_equal(masks.resample(mask, 4, 4), np.kron(mask, np.ones((2, 2))) > 0)
    np.testing.assert_array_equal(masks.resample(masks.resample(mask, 6, 6), 2, 2), mask)


def test_within_bounds() -> None:
    camera = ring(4)[0]
    inside = masks.within(ball_depth(camera), camera, Box.between(np.array([[-1.0, -1, 0], [1, 1, 1]])))
    rows = np.flatnonzero(inside.any(axis=1))
    assert rows.max() < SIZE / 2
    assert inside[: SIZE // 2].sum() == (ball_depth(camera)[: SIZE // 2] > 0).sum()


def test_sharpness_is_of_the_inside_and_of_one_scale() -> None:
    rng = np.random.default_rng(0)
    noise = np.kron(rng.integers(0, 256, (128, 128)), np.ones((8, 8))).astype(np.uint8)
    image = np.repeat(noise[..., None], 3, axis=2)
    mask = np.zeros(image.shape[:2], bool)
    mask[256:768, 256:768] = True
    plain = np.where(mask[..., None], np.uint8(100), image)
    assert masks.sharpness(plain, mask) == 0
    assert masks.sharpness(image, np.zeros_like(mask)) == 0
    half = np.ascontiguousarray(image[::2, ::2])
    assert masks.sharpness(half, mask[::2, ::2]) == pytest.approx(masks.sharpness(image, mask), rel=0.1)


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_contact_sheet_is_small_even_of_noise(count: int) -> None:
    view = views_of(GOOD, ["view_000"])[0]
    small = thumbnail(view)
    sheet = contact_sheet([replace(small, name=f"view_{index:03d}") for index in range(count)])
    assert Image.open(io.BytesIO(sheet)).format == "JPEG"
    assert len(sheet) < 180_000


def test_the_contact_sheet_has_six_views_a_row() -> None:
    view = views_of(GOOD, ["view_000"])[0]
    plain = thumbnail(replace(view, image=np.full_like(view.image, 90)))
    width, height = Image.open(io.BytesIO(contact_sheet([plain] * 6))).size
    wide, high = Image.open(io.BytesIO(contact_sheet([plain] * 7))).size
    assert wide == width
    assert 1.9 < high / height < 2.0


def test_the_contact_sheet_shows_checkers_outside_of_the_mask() -> None:
    view = views_of(GOOD, ["view_000"])[0]
    red = replace(view, image=np.full_like(view.image, (200, 0, 0)))
    pixels = np.asarray(Image.open(io.BytesIO(contact_sheet([thumbnail(red)]))).convert("RGB")).astype(int)
    tile = pixels[6 + 80 - 32 : 6 + 80 + 32, 6 + 80 - 32 : 6 + 80 + 32]
    assert tile[32, 32, 0] - tile[32, 32, 1] > 150
    assert abs(tile[3, 3, 0] - tile[3, 3, 1]) < 20
