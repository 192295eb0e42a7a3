"""A usual mistake in cameras or depth, as the views would be without it, with its remedy and the depth's factor.

`pose_explanations`, `depth_explanations` and `lens_explanations` make them; `mistakes` tries them all. The mistakes are
those of public reports: depth in another unit, axes of another library, matrices the other way round, depth that is not
the distance along the camera's axis, and depth maps that are not of the view's own camera.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.cameras.conflict import Floats, Witness, pinhole_poses
from tasks.capture.views import View
from tasks.geometry.depth_noise import measured_noise

FACTORS = np.geomspace(1e-3, 1e3, 467)  # of the depth, 3 % apart
LEAST_PARALLAX = 0.05  # of the way between two cameras, in distances of what they see
ONE = np.ones(1)
# Cameras and depth of calibrated devices differ in scale by less than this: no mistake, but a matter of refinement
SAME_SCALE = 0.03
# A factor that is so close to a round one is that one
ROUND = 0.01
ROUND_FACTORS = (*np.arange(11, 31) / 10, 4, 5, 6, 8, 10, 20, 25.4, 50, 100, 200, 254, 256, 500, 1000)
Told = tuple[str, str] | None


@dataclass(frozen=True)
class DepthFormat:
    """How a capture's depth maps are stored."""

    unit: float
    """Metres per step of 16-bit maps"""
    integer: bool
    """True for integers, False for floats in metres"""
    limits: tuple[float, float] | None
    """(near, far) of 8-bit maps, metres; None for others"""


@dataclass(frozen=True, eq=False)
class Explanation:
    """The views as they would be without a mistake."""

    poses: Floats
    """(k, 4, 4) camera-to-world in pinhole axes"""
    witnesses: tuple[Witness, ...]
    """(k,) the views' depth"""
    factors: Floats
    """(f,) factors of all depth that may come with it"""
    told: Callable[[float], Told]
    """Gives the mistake and its remedy, by the factor of the depth; None: nothing worth telling"""
    finer: Callable[[], tuple[Explanation, ...]] = tuple
    """Explanations close to this one"""


def as_given(views: Sequence[View]) -> Explanation:
    """No mistake. Every view has a camera and depth."""
    sensor = measured_noise([view.depth for view in views if view.depth is not None])
    witnesses = tuple(Witness.of(view, sensor) for view in views)
    return Explanation(pinhole_poses(witnesses), witnesses, ONE, lambda factor: None)


def with_parallax(given: Explanation, factors: Floats = FACTORS) -> Floats:
    """The factors with which the cameras are not all in one place, where any scale would do."""
    way = np.linalg.norm(np.diff(given.poses[:, :3, 3], axis=0), axis=1)
    depth = np.median(np.concatenate([witness.depth for witness in given.witnesses]))
    kept: Floats = factors[np.median(way) / depth / factors > LEAST_PARALLAX]
    return kept


def scaled(factor: float, stored: DepthFormat) -> Told:
    """The depth has to be multiplied by this factor to fit the cameras."""
    times = rounded(max(factor, 1 / factor))
    if times < 1 + SAME_SCALE:
        return None
    size = "large" if factor < 1 else "small"
    right = stored.unit * (times if factor > 1 else 1 / times)
    unit = f"depth_unit_scale_factor {right:.6g} instead of {stored.unit:g}"
    metres = f"depth in metres ({'multiply' if factor > 1 else 'divide'} it by {times:.3g})"
    way = f"{'divide' if factor > 1 else 'multiply'} the cameras' positions by {times:.3g}"
    return (
        f"the depth is {times:.3g} times too {size} for these cameras",
        f"{unit if stored.integer else metres}? Or the positions in transform_matrix are not in metres: {way}",
    )


def rounded(factor: float) -> float:
    """The factor, or the round number that it is close to."""
    nearest = min(ROUND_FACTORS, key=lambda each: abs(np.log(factor / each)))
    return float(nearest if abs(factor / nearest - 1) < ROUND else factor)


def always(what: str, todo: str) -> Callable[[float], Told]:
    """Tells a mistake that comes without another scale."""
    return lambda factor: (what, todo)


def without_scale(changed: Explanation, what: str, todo: str) -> Explanation:
    """The explanation, which comes with depth that is to scale."""
    return replace(changed, factors=with_parallax(changed, ONE), told=always(what, todo))


def with_factors(changed: Explanation, what: str, todo: str, stored: DepthFormat) -> Explanation:
    """The explanation with every factor of the depth."""
    return replace(changed, factors=with_parallax(changed), told=_with_scale(what, todo, stored))


def _with_scale(what: str, todo: str, stored: DepthFormat) -> Callable[[float], Told]:
    def told(factor: float) -> Told:
        scale = scaled(factor, stored)
        return (what, todo) if scale is None else (f"{what}, and {scale[0]}", f"{todo}; {scale[1]}")

    return told
