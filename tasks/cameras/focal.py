"""The focal length of a capture without cameras, from matched features and their depth. `finding` calls it.

Two views see the same distance between two points. Depth is known, so what the image shows of it has to be as wide as
the focal length makes it: each pair of matches gives one linear equation for the inverse square of the focal length.
Both sides of it have errors, which are weighed as in Deming's regression. Views from the same direction say little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.features import Features
from tasks.cameras.jury import Jury
from tasks.cameras.pairs import (
    FINE_SLACK,
    INLIER,
    INLIER_SIGMAS,
    LEAST_INLIERS,
    SURE_INLIERS,
    Pair,
    fitted_motions,
    refined_pair,
    rigid_motions,
    turned,
)
from tasks.cameras.surface_views import SurfaceView, object_size

Floats = NDArray[np.float64]

# Fields of view across the image, degrees: from a long lens to a wide one
NARROWEST, WIDEST = 13.0, 90.0
MOST_PAIRS = 80  # those with most matches
TRIES, COUNTED = 1500, 200  # triples of a pair, and matches that each is counted on
EDGES = 400  # pairs of matches that a pair of views votes by
POSITION_PX = 0.7  # a feature's standard deviation, pixels of the depth map
GRID = 400  # zooms that are voted for
PEAKS = 3  # that are verified
AROUND = np.exp([-0.04, -0.02, 0.0, 0.02, 0.04])  # of the best one: features alone are biased by their own noise
VERIFIED_PAIRS, VERIFIED_TRIES = 12, 400
LEAST_TURN = np.radians(20.0)  # views turned by less fit under any focal length
TINY = 1e-18  # metres^4, of two matches of one point
LIMIT = 0.015  # conflict of a right pair, at which its support counts little


def found_zoom(
    surfaces: Sequence[SurfaceView],
    found: Sequence[Features],
    matched: Mapping[Pair, NDArray[np.intp]],
    rng: np.random.Generator,
) -> float:
    """The factor of the surfaces' focal length under which views see the same distances."""
    camera = surfaces[0].camera
    lowest, highest = camera.width / 2 / np.tan(np.radians([WIDEST, NARROWEST]) / 2) / camera.fl_x
    zooms = np.geomspace(lowest, highest, GRID)
    pairs = sorted(matched, key=lambda pair: -len(matched[pair]))[:MOST_PAIRS]
    votes = np.zeros(GRID)
    for one, other in pairs:
        match = matched[one, other]
        a, b = (
            found[one].points(surfaces[one], 1.0)[match[:, 0]],
            found[other].points(surfaces[other], 1.0)[match[:, 1]],
        )
        spread = POSITION_PX * max(surfaces[one].footprint, surfaces[other].footprint)
        # a surface that is seen at an angle turns an error across into one along the axis
        along = float(np.hypot(max(surfaces[one].noise, surfaces[other].noise), spread))
        tolerance = INLIER * object_size([surfaces[one], surfaces[other]]) + INLIER_SIGMAS * along
        fit = _fitting(a, b, (along, spread), tolerance, (lowest, highest), rng)
        votes += _votes(a[fit], b[fit], (along, spread), zooms, rng)
    verified = pairs[:: max(1, -(-len(pairs) // VERIFIED_PAIRS))]

    def value(zoom: float) -> float:
        evidence = Jury(surfaces, zoom, FINE_SLACK)
        return sum(_pair_value(surfaces, found, matched, pair, zoom, evidence, rng) for pair in verified)

    best = max(_peaks(votes, zooms), key=value)
    return max((float(best * factor) for factor in AROUND), key=value)


def _peaks(votes: Floats, zooms: Floats) -> list[float]:
    """The zooms with most votes, the best first; 1 without any."""
    inner = votes[1:-1]
    peaks = 1 + np.flatnonzero((inner > votes[:-2]) & (inner >= votes[2:]))
    return [float(zooms[peak]) for peak in peaks[np.argsort(-votes[peaks])][:PEAKS]] or [1.0]


def _votes(one: Floats, other: Floats, sigmas: tuple[float, float], zooms: Floats, rng: np.random.Generator) -> Floats:
    """How well distances between matched points (k, 3) are the same under zooms (z,): a robust likelihood (z,)."""
    if len(one) < LEAST_INLIERS:
        return np.zeros(len(zooms))
    start, end = rng.integers(0, len(one), (2, EDGES))
    growth, deficit, of_growth, of_deficit = _equations(one, other, start, end, sigmas)
    inverse_square = (zooms**-2)[:, None]
    squares = np.square(growth * inverse_square - deficit) / (of_deficit + of_growth * inverse_square**2)
    # as many distances as points are independent
    return -np.log1p(squares).mean(axis=1) * min(len(one), SURE_INLIERS)


def _fitting(
    one: Floats,
    other: Floats,
    sigmas: tuple[float, float],
    tolerance: float,
    bounds: tuple[float, float],
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """The matches (k,) of points (n, 3) that one motion and zoom maps onto each other."""
    if len(one) < LEAST_INLIERS:
        return np.zeros(0, np.intp)
    chosen = rng.integers(0, len(one), (TRIES, 3))
    growth, deficit, of_growth, of_deficit = _equations(one, other, chosen, np.roll(chosen, 1, axis=1), sigmas)
    weight = 1 / (of_growth + of_deficit)
    inverse_square = (weight * growth * deficit).sum(axis=1) / ((weight * growth**2).sum(axis=1) + TINY)
    usable = (inverse_square > bounds[1] ** -2) & (inverse_square < bounds[0] ** -2)
    chosen, across = chosen[usable], np.sqrt(inverse_square[usable])
    stretch = np.column_stack([across, across, np.ones_like(across)])[:, None]
    a, b = one[chosen] * stretch, other[chosen] * stretch
    side_a, side_b = (np.linalg.norm(x - np.roll(x, 1, axis=1), axis=2) for x in (a, b))
    # a rigid motion keeps distances; points too close to each other say nothing about the turn
    good = (np.abs(side_a - side_b) < 2 * tolerance).all(axis=1) & (side_a.min(axis=1) > 3 * tolerance)
    if not good.any():
        return np.zeros(0, np.intp)
    turns, shifts = fitted_motions(a[good], b[good])
    stretch = stretch[good]
    counted = rng.permutation(len(one))[:COUNTED]
    moved = np.einsum("hij,hkj->hki", turns, one[counted] * stretch) + shifts[:, None]
    near = np.linalg.norm(moved - other[counted] * stretch, axis=2) < tolerance
    best = int(near.sum(axis=1).argmax())
    apart = (one * stretch[best]) @ turns[best].T + shifts[best] - other * stretch[best]
    return np.flatnonzero(np.linalg.norm(apart, axis=1) < tolerance)


def _equations(
    one: Floats, other: Floats, start: NDArray[np.intp], end: NDArray[np.intp], sigmas: tuple[float, float]
) -> tuple[Floats, Floats, Floats, Floats]:
    """growth * (inverse square of the zoom) = deficit, and both variances, for edges between matched points.

    sigmas: of a point along the axis and across, metres.
    """
    edge_a, edge_b = (points[start] - points[end] for points in (one, other))
    across_a, across_b = (np.square(edge[..., :2]).sum(axis=-1) for edge in (edge_a, edge_b))
    along_a, along_b = np.square(edge_a[..., 2]), np.square(edge_b[..., 2])
    # of a squared length: (2 length)^2 times the variance of its two ends
    of_growth, of_deficit = 8 * sigmas[1] ** 2 * (across_a + across_b), 8 * sigmas[0] ** 2 * (along_a + along_b)
    return across_a - across_b, along_b - along_a, of_growth + TINY, of_deficit + TINY


def _pair_value(
    surfaces: Sequence[SurfaceView],
    found: Sequence[Features],
    matched: Mapping[Pair, NDArray[np.intp]],
    pair: Pair,
    zoom: float,
    evidence: Jury,
    rng: np.random.Generator,
) -> float:
    """Quality of a pair's best motion with a turn; 0 without one."""
    one, other = pair
    match = matched[pair]
    tolerance = INLIER * object_size([surfaces[one], surfaces[other]], zoom) + INLIER_SIGMAS * surfaces[one].noise
    a, b = found[one].points(surfaces[one], zoom), found[other].points(surfaces[other], zoom)
    best = 0.0
    for _, motion in rigid_motions(a[match[:, 0]], b[match[:, 1]], tolerance, rng, VERIFIED_TRIES):
        if turned(motion[:3, :3], np.eye(3)) > LEAST_TURN:
            refined = refined_pair(surfaces[one], surfaces[other], motion, zoom)
            best = max(best, float(evidence.pair(one, other, refined[None]).quality(LIMIT)[0]))
    return best
