"""Exposure and white balance of the views made to agree, and what a texture of such views looks like."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.geometry import texture
from tasks.geometry.exposure import solved_gains, to_linear, to_srgb
from tasks.geometry.render import RayScene, render, sample_texture
from tasks.geometry.texture import Unwrapped, bake, unwrap
from tests.synthetic import fibonacci_sphere, look_at

Floats = NDArray[np.float64]

VIEWS, POINTS = 8, 400
SIZE, TEXTURE_PX = 96, 256
GREY = 0.2  # linear light


def drifting(views: int = VIEWS) -> Floats:
    """Gains (views, 3) whose geometric mean is 1, up to a third from it."""
    gains = np.exp(np.random.default_rng(2).uniform(-0.35, 0.35, (views, 3)))
    return np.asarray(gains / np.exp(np.log(gains).mean(axis=0)))


def seen(gains: Floats, outliers: float = 0.0) -> tuple[Floats, Floats]:
    """Colours (n, v, 3) of surface points by views that need these gains, each seen by about half of them: weights."""
    rng = np.random.default_rng(3)
    light = rng.uniform(0.1, 0.5, (POINTS, 1, 3)) / gains
    colours = np.rint(to_srgb(light) + rng.normal(0, 1, light.shape)).clip(0, 255)
    astray = rng.random(colours.shape[:2]) < outliers
    colours[astray] = rng.uniform(0, 255, (astray.sum(), 3))
    return colours, (rng.random((POINTS, VIEWS)) < 0.5) * rng.uniform(0.2, 1, (POINTS, VIEWS))


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_gains_are_found(outliers: float) -> None:
    gains = drifting()
    found = solved_gains(*seen(gains, outliers))
    assert np.abs(found / gains - 1).max() < 0.01
    assert np.exp(np.log(found).mean(axis=0)) == pytest.approx(1)


def test_views_that_share_nothing_keep_their_exposure() -> None:
    colours, weights = seen(drifting())
    weights[:, 3] = 0
    others = np.delete(np.arange(VIEWS), 3)
    found = solved_gains(colours, weights)
    assert found[3] == pytest.approx(1, abs=0.02)
    relative = found[others] / drifting()[others]
    assert relative / relative.mean(axis=0) == pytest.approx(1, abs=0.01)
    assert solved_gains(colours, np.zeros_like(weights)) == pytest.approx(1)


def test_clipped_colours_do_not_count() -> None:
    """A view in which nearly everything is burnt out keeps the gain of what is not."""
    gains = drifting()
    colours, weights = seen(gains)
    colours[40:, 2] = 255
    assert solved_gains(colours, weights)[2] == pytest.approx(gains[2], rel=0.02)


def test_equal_exposures_stay() -> None:
    colours, weights = seen(np.ones((VIEWS, 3)))
    assert solved_gains(colours, weights) == pytest.approx(1, abs=0.003)


def test_linear_light_and_back() -> None:
    levels = np.arange(256.0)
    assert to_srgb(to_linear(levels)) == pytest.approx(levels, abs=1e-9)
    assert to_linear(np.array([0.0, 188.0, 255.0])) == pytest.approx([0, 0.5, 1], abs=0.005)
    assert to_srgb(np.array([-1.0, 2.0])) == pytest.approx([0, 255])


@lru_cache
def grey_sphere() -> tuple[Unwrapped, tuple[View, ...]]:
    """An unwrapped ball, and views of it in one grey."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.15)
    scene, views = RayScene(ball), []
    for index, direction in enumerate(fibonacci_sphere(12)):
        camera = Camera(SIZE, SIZE, 220.0, 220.0, SIZE / 2, SIZE / 2, look_at(direction, np.zeros(3)))
        depth = render(scene, camera)
        views.append(View(f"view_{index:03d}", depth.image, depth.mask, depth.depth, camera))
    return unwrap(ball.vertices, ball.faces, TEXTURE_PX), tuple(views)


def unevenness(gains: Floats) -> float:
    """Largest relative difference in the linear light of a grey sphere's texture from its mean."""
    unwrapped, views = grey_sphere()
    exposed = [
        replace(view, image=np.where(view.mask[..., None], np.rint(to_srgb(GREY * gain)), 0).astype(np.uint8))
        for view, gain in zip(views, gains, strict=True)
    ]
    painted, coverage = bake(unwrapped, exposed, TEXTURE_PX)
    assert coverage is not None and coverage > 0.99
    light = to_linear(sample_texture(painted.astype(np.float32), unwrapped.uv[unwrapped.faces].mean(axis=1)))
    return float(np.abs(light / light.mean(axis=0) - 1).max())


EXPOSURES = np.linspace(0.7, 1.4, 12)
SHUFFLED = np.random.default_rng(4).permutation(12)
WHITE_BALANCE = np.linspace(1.0, 0.9, 12)[:, None] ** np.array([1, 0, -1])


@pytest.mark.parametrize(
    "gains",
    [
        pytest.param(EXPOSURES[:, None] * np.ones(3), id="brighter from the top to the bottom"),
        pytest.param(EXPOSURES[SHUFFLED, None] * np.ones(3), id="up and down"),
        pytest.param(EXPOSURES[:, None] * WHITE_BALANCE, id="with white balance"),
    ],
)
def test_a_grey_sphere_under_drifting_exposure_is_uniform(gains: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unevenness(gains) < 0.02
    monkeypatch.setattr(texture, "_with_gains", lambda photos, _: list(photos))
    assert unevenness(gains) > 0.2  # the drift is there
