"""Noise of a depth sensor, measured on a capture's own depth maps; fusion, the checks and the report use it.

Sensors differ in three ways: the step between depth values (a unit such as 1 mm, or disparity steps that grow with the
square of the distance), the random noise along the axis, and how much of both is left once neighbours are averaged.
Khoshelham and Elberink, Accuracy and resolution of Kinect depth data for indoor mapping applications (Sensors 2012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 12  # of distance, each with as many readings
READINGS = 4_000_000  # pixels that the model is fitted to
MIN_READINGS = 200  # in a bin
# Normal distribution's factor of the median absolute deviation; (1, -2, 1) of independent noise has sqrt(6) times its
# standard deviation
SECOND_DIFFERENCE = 1.4826 / np.sqrt(6)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DepthNoise:
    """Noise along the camera's axis at a distance of z metres.

    step: (a, b), depth values lie a + b z^2 metres apart. random: (a, b), the standard deviation of the readings is
    a + b z^2 metres, what the steps add included.
    """

    step: tuple[float, float]
    random: tuple[float, float]

    def step_at(self, z: Floats | float) -> Floats:
        """Metres between two depth values at distance z."""
        return self.step[0] + self.step[1] * np.square(z)

    def at(self, z: Floats | float) -> Floats:
        """Standard deviation of a reading at distance z, metres."""
        return self.random[0] + self.random[1] * np.square(z)


def measured_noise(depths: Sequence[NDArray[np.floating]]) -> DepthNoise:
    """The noise of depth maps (h, w) in metres, 0 = no reading, all of one sensor.

    Quantised readings are dithered by half a step first: the second differences of a staircase are mostly exactly 0,
    and their median would say that there is no noise.
    """
    every = 1 + sum(depth.size for depth in depths) // READINGS
    depths = [np.asarray(depth[::every], np.float64) for depth in depths]  # rows: their neighbours count
    readings = np.concatenate([depth[depth > 0] for depth in depths])
    if len(readings) < MIN_READINGS:
        return DepthNoise((0.0, 0.0), (0.0, 0.0))
    step = _fitted(*_gaps(readings))
    rng = np.random.default_rng(0)
    distances, residuals = [], []
    for depth in depths:
        dithered = depth + (rng.random(depth.shape) - 0.5) * (step[0] + step[1] * depth**2)
        known = (depth[:, :-2] > 0) & (depth[:, 1:-1] > 0) & (depth[:, 2:] > 0)
        distances.append(depth[:, 1:-1][known])
        residuals.append(np.abs(dithered[:, :-2] - 2 * dithered[:, 1:-1] + dithered[:, 2:])[known])
    z, second = np.concatenate(distances), np.concatenate(residuals)
    at, spread = [], []
    for part in np.array_split(np.argsort(z, kind="stable"), BINS):
        if len(part) >= MIN_READINGS:
            middle = float(np.median(z[part]))
            dither = (step[0] + step[1] * middle**2) ** 2 / 12
            found = (SECOND_DIFFERENCE * float(np.median(second[part]))) ** 2
            at.append(middle)
            spread.append(np.sqrt(max(found - dither, dither)))
    if not at:
        return DepthNoise(step, (step[0] / np.sqrt(12), step[1] / np.sqrt(12)))
    return DepthNoise(step, _fitted(np.array(at), np.array(spread)))


def _gaps(readings: Floats) -> tuple[Floats, Floats]:
    """Distances, and the typical gap between neighbouring depth values there."""
    values = np.unique(readings)
    if len(values) < 2:
        return values, np.zeros(len(values))
    gaps, middles = np.diff(values), (values[1:] + values[:-1]) / 2
    # by readings, not by values: single readings between the steps must not count
    edges = np.unique(np.quantile(readings, np.linspace(0, 1, BINS + 1)))
    parts = np.digitize(middles, edges[1:-1])
    found = [(np.median(middles[parts == part]), np.median(gaps[parts == part])) for part in np.unique(parts)]
    at, gap = np.array(found).T
    return at, gap


def _fitted(z: Floats, values: Floats) -> tuple[float, float]:
    """(a, b) >= 0 of a + b z^2, by relative least squares."""
    weight = 1 / np.maximum(values, np.finfo(float).tiny) if (values > 0).all() else np.ones_like(values)
    from scipy.optimize import nnls  # its import is slow, and a run whose results are cached does not need it

    (a, b), _ = nnls(np.column_stack([np.ones_like(z), z**2]) * weight[:, None], values * weight)
    return float(a), float(b)
