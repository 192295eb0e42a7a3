"""Step and noise of a depth sensor, measured on depth maps of a known sensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.geometry.depth_noise import DepthNoise, measured_noise

ROUNDING = 1 / np.sqrt(12)  # standard deviation of a rounded number, in steps
CURVATURE = 6e-5  # metres: the second difference of the hills themselves
KINECT = 2.85e-3  # metres between two depth values at 1 m (Khoshelham and Elberink)


def hills(near: float, far: float, size: int = 160) -> NDArray[np.float64]:
    """Exact depth (size, size) of smooth hills, from `near` to `far` metres, in all slopes."""
    y, x = np.mgrid[:size, :size] / size
    return near + (far - near) * (2 + np.sin(7 * x + 2 * y) + np.cos(5 * y - 1.3 * x + 0.7)) / 4


def noisy(depth: NDArray[np.float64], sigma: NDArray[np.float64] | float) -> NDArray[np.float64]:
    return depth + sigma * np.random.default_rng(0).standard_normal(depth.shape)


def in_steps(depth: NDArray[np.float64], step: float) -> NDArray[np.float32]:
    return (np.rint(depth / step) * step).astype(np.float32)


def in_disparity_steps(depth: NDArray[np.float64]) -> NDArray[np.float32]:
    return (1 / (np.rint(1 / depth / KINECT) * KINECT)).astype(np.float32)


def test_whole_millimetres_have_the_noise_of_rounding() -> None:
    sensor = measured_noise([in_steps(hills(0.45, 0.62), 0.001)])
    assert sensor.step_at(0.5) == pytest.approx(0.001, rel=0.01)
    assert sensor.at(0.5) == pytest.approx(0.00029, rel=0.15)


def test_a_flat_staircase_has_noise() -> None:
    """Most second differences are exactly 0, as on a wall: their median alone would say that there is no noise."""
    depth = in_steps(hills(0.5, 0.51), 0.001)
    assert (np.diff(depth, 2, axis=1) == 0).mean() > 0.5
    assert measured_noise([depth]).at(0.5) == pytest.approx(0.00029, rel=0.15)


def test_enlarged_depth_has_noise() -> None:
    """Depth enlarged by nearest neighbour: runs of equal values in both directions."""
    small = in_steps(noisy(hills(0.5, 0.6, 64), 0.002), 0.001)
    sensor = measured_noise([np.kron(small, np.ones((4, 4), np.float32))])
    assert sensor.step_at(0.5) == pytest.approx(0.001, rel=0.01)
    assert sensor.at(0.5) > 0.00028


def test_disparity_steps_grow_with_the_square_of_the_distance() -> None:
    sensor = measured_noise([in_disparity_steps(hills(0.6, 4, 240))])
    assert sensor.step == pytest.approx((0, KINECT), abs=1e-5)
    for z in (0.8, 1.5, 3.0):
        assert sensor.step_at(z) == pytest.approx(KINECT * z**2, rel=0.02)
        assert sensor.at(z) == pytest.approx(KINECT * ROUNDING * z**2, rel=0.2)


def test_disparity_steps_and_noise_add_up() -> None:
    exact = hills(0.6, 4, 240)
    sensor = measured_noise([in_disparity_steps(noisy(exact, 0.002 * exact**2))])
    assert sensor.step_at(2.0) == pytest.approx(4 * KINECT, rel=0.02)
    assert sensor.at(2.0) == pytest.approx(4 * np.hypot(0.002, KINECT * ROUNDING), rel=0.05)


def test_float_depth_has_no_steps_to_speak_of() -> None:
    sensor = measured_noise([noisy(hills(0.6, 2, 240), 0.003).astype(np.float32)])
    assert sensor.step_at(1.0) < 5e-5
    assert sensor.random == pytest.approx((0.003, 0), rel=0.03, abs=1e-4)


def test_noise_that_grows_with_the_square_of_the_distance() -> None:
    exact = hills(0.6, 2, 240)
    maps = [noisy(part, 0.002 * part**2) for part in (exact[:120], exact[120:])]
    assert measured_noise(maps).random == pytest.approx((0, 0.002), rel=0.05, abs=1e-4)


def test_exact_depth_in_fine_steps_has_next_to_no_noise() -> None:
    sensor = measured_noise([in_steps(hills(0.45, 0.62), 0.00005)])
    assert sensor.step_at(0.5) == pytest.approx(0.00005, rel=0.01)
    assert sensor.at(0.5) < 0.00006


def test_missing_readings_and_outliers_do_not_count() -> None:
    rng = np.random.default_rng(1)
    depth = noisy(hills(0.6, 0.8), 0.002)
    astray = rng.random(depth.shape) < 0.01
    depth[astray] += rng.uniform(-0.1, 0.1, astray.sum())
    depth[rng.random(depth.shape) < 0.2] = 0
    assert measured_noise([depth]).at(0.7) == pytest.approx(0.002, rel=0.1)


@pytest.mark.parametrize("readings", [0, 50])
def test_too_few_readings_have_no_noise(readings: int) -> None:
    depth = np.zeros((40, 40), np.float32)
    depth.flat[:readings] = 0.5
    sensor = measured_noise([depth, np.zeros((40, 40), np.float32)])
    assert sensor == DepthNoise((0.0, 0.0), (0.0, 0.0))
    assert sensor.step_at(0.5) == 0 and not sensor.at(np.array([0.5, 2.0])).any()


@settings(max_examples=40, deadline=None)
@given(step=st.floats(0.00005, 0.005), sigma=st.floats(0, 0.004))
def test_any_step_is_found_with_any_noise(step: float, sigma: float) -> None:
    sensor = measured_noise([in_steps(noisy(hills(0.45, 0.62, 120), sigma), step)])
    assert sensor.step_at(0.53) == pytest.approx(step, rel=0.02)
    true = np.hypot(sigma, ROUNDING * step)
    assert 0.9 * true < sensor.at(0.53) < 1.25 * true + CURVATURE
