"""Motions between two views: hypotheses from matched features, verified and refined by all of their depth.

`finding` and `focal` call it. Three lifted matches give a rigid motion: Fischler and Bolles, Random sample consensus
(CACM 1981); Arun, Huang and Blostein, Least-squares fitting of two 3-D point sets (PAMI 1987).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.features import Features
from tasks.cameras.joint_refinement import refine
from tasks.cameras.jury import Jury
from tasks.cameras.surface_views import SurfaceView, object_size

Floats = NDArray[np.float64]
Pair = tuple[int, int]

TRIES = 1500  # random triples of a pair
COUNTED = 400  # matches that a hypothesis is counted on
EXAMINED = 200  # triples, the best ones
SOLUTIONS = 4  # different ones of a pair: of features that repeat themselves, the second may be right
DIFFERENT = 0.15  # radians between two of them
INLIER = 0.015  # distance between two matched points, in sizes of the object, beside the noise
INLIER_SIGMAS = 3.0
LEAST_INLIERS = 4
COARSE_SLACK, FINE_SLACK = 0.012, 0.006  # of the evidence before and after a pair is refined, in sizes of the object
PLAUSIBLE = -0.15  # quality, with conflicts that count less, from which a hypothesis is refined
PLAUSIBLE_CONFLICT_WEIGHT = 2.0
REFINED = 24  # hypotheses a view, at most
# The limit of conflicts: of exact depth; as a multiple of what the best pairs have, which are those of similar views:
# others contradict more; and where it would allow anything
LEAST_LIMIT, LIMIT_FACTOR, LARGEST_LIMIT = 0.015, 20.0, 0.15
SURE_INLIERS = 30
RIGHT_SHARE = 0.25  # quantile of the best supported pairs: on shapes that repeat themselves, more than half are wrong
PAIR_READINGS, PAIR_ITERATIONS = 300, 8
PAIR_GATES = (0.025, 0.008)


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A motion between two views that their features propose."""

    one: int
    """Index of the first view"""
    other: int
    """Index of the second view"""
    motion: Floats
    """(4, 4) from the axes of `one` to those of `other`"""
    conflict: float
    """Share of readings that contradict"""
    support: float
    """Agreement, less what has other colours"""
    inliers: int
    """Matched features that fit"""


def pair_hypotheses(
    surfaces: Sequence[SurfaceView],
    found: Sequence[Features],
    matched: Mapping[Pair, NDArray[np.intp]],
    zoom: float,
    rng: np.random.Generator,
    *,
    tries: int = TRIES,
) -> list[Hypothesis]:
    """Verified motions between views; wrong ones among them have conflicts, or repeat a shape."""
    points = [each.points(surface, zoom) for each, surface in zip(found, surfaces, strict=True)]
    noise = float(np.median([surface.noise for surface in surfaces]))
    tolerance = INLIER * object_size(surfaces, zoom) + INLIER_SIGMAS * noise
    coarse = Jury(surfaces, zoom, COARSE_SLACK)
    proposed = []
    for (one, other), match in matched.items():
        solutions = rigid_motions(points[one][match[:, 0]], points[other][match[:, 1]], tolerance, rng, tries)
        if solutions:
            verdict = coarse.pair(one, other, np.stack([motion for _, motion in solutions]))
            quality = verdict.likeness - PLAUSIBLE_CONFLICT_WEIGHT * verdict.conflict
            proposed += [(quality[k], one, other, motion, count) for k, (count, motion) in enumerate(solutions)]
    proposed.sort(key=lambda each: -each[0])
    fine = Jury(surfaces, zoom, FINE_SLACK)
    verified = []
    for rough, one, other, motion, count in proposed[: REFINED * len(surfaces)]:
        if rough > PLAUSIBLE:
            motion = refined_pair(surfaces[one], surfaces[other], motion, zoom)
            verdict = fine.pair(one, other, motion[None])
            verified.append(
                Hypothesis(one, other, motion, float(verdict.conflict[0]), float(verdict.support[0]), count)
            )
    return verified


def conflict_limit(hypotheses: Sequence[Hypothesis], views: int) -> float:
    """Share of readings that may contradict a right camera: what the best supported pairs of a capture show."""
    best = sorted(hypotheses, key=lambda each: -each.support * min(each.inliers, SURE_INLIERS))[:views]
    typical = float(np.quantile([each.conflict for each in best], RIGHT_SHARE)) if best else 0.0
    return float(np.clip(LIMIT_FACTOR * typical, LEAST_LIMIT, LARGEST_LIMIT))


def refined_pair(one: SurfaceView, other: SurfaceView, motion: Floats, zoom: float) -> Floats:
    """The motion (4, 4) between two views, refined by them alone."""
    result = refine(
        [one, other],
        np.stack([motion, np.eye(4)]),
        zoom,
        fixed=[1],
        pairs=[(0, 1), (1, 0)],
        iterations=PAIR_ITERATIONS,
        readings=PAIR_READINGS,
        gates=PAIR_GATES,
    )
    return result.poses[0]


def rigid_motions(
    one: Floats, other: Floats, tolerance: float, rng: np.random.Generator, tries: int = TRIES
) -> list[tuple[int, Floats]]:
    """Different motions that map many points (k, 3) onto their matches (k, 3): inliers and (4, 4), best first."""
    count = len(one)
    if count < LEAST_INLIERS:
        return []
    chosen = rng.integers(0, count, (tries, 3))
    a, b = one[chosen], other[chosen]
    side_a, side_b = (np.linalg.norm(x - np.roll(x, 1, axis=1), axis=2) for x in (a, b))
    # a rigid motion keeps distances; points too close to each other say nothing about the turn
    good = (np.abs(side_a - side_b) < 2 * tolerance).all(axis=1) & (side_a.min(axis=1) > 3 * tolerance)
    if not good.any():
        return []
    turns, shifts = fitted_motions(a[good], b[good])
    counted = np.arange(count) if count <= COUNTED else rng.choice(count, COUNTED, replace=False)
    inliers = (_squared_distances(turns, shifts, one[counted], other[counted]) < tolerance**2).sum(axis=1)
    found: list[tuple[int, Floats]] = []
    for best in np.argsort(-inliers, kind="stable")[:EXAMINED]:
        if len(found) >= SOLUTIONS or inliers[best] < LEAST_INLIERS:
            break
        turn, shift = turns[best], shifts[best]
        if any(turned(turn, motion[:3, :3]) < DIFFERENT for _, motion in found):
            continue
        for _ in range(3):
            fit = np.linalg.norm(one @ turn.T + shift - other, axis=1) < tolerance
            if fit.sum() < 3:
                break
            turn, shift = (x[0] for x in fitted_motions(one[fit][None], other[fit][None]))
        if all(turned(turn, motion[:3, :3]) >= DIFFERENT for _, motion in found):
            found.append((int(fit.sum()), assembled(turn, shift)))
    return found


def _squared_distances(turns: Floats, shifts: Floats, one: Floats, other: Floats) -> Floats:
    """(h, k) of points (k, 3), moved in h ways, from others: |R p + t - q|^2, written as one matrix product."""
    middle = other.mean(axis=0)  # small numbers: squares of large ones would cancel
    shifts, other = shifts - middle, other - middle
    back = np.einsum("hij,hi->hj", turns, shifts)
    ways = np.hstack([-2 * turns.reshape(-1, 9), 2 * back, -2 * shifts, np.einsum("hi,hi->h", shifts, shifts)[:, None]])
    products = (other[:, :, None] * one[:, None, :]).reshape(-1, 9)
    places = np.hstack([products, one, other, np.ones((len(one), 1))])
    return ways @ places.T + np.einsum("kc,kc->k", one, one) + np.einsum("kc,kc->k", other, other)


def fitted_motions(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Rotations (h, 3, 3) and shifts (h, 3) that map points (h, k, 3) onto others best."""
    middle_a, middle_b = a.mean(axis=1, keepdims=True), b.mean(axis=1, keepdims=True)
    left, _, right = np.linalg.svd(np.swapaxes(b - middle_b, 1, 2) @ (a - middle_a))
    mirror = np.ones((len(a), 3))
    mirror[:, 2] = np.linalg.det(left @ right)
    turns = (left * mirror[:, None]) @ right
    return turns, (middle_b - middle_a @ np.swapaxes(turns, 1, 2))[:, 0]


def assembled(turn: Floats, shift: Floats) -> Floats:
    """The motion (4, 4) of a rotation (3, 3) and a shift (3,)."""
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = turn, shift
    return motion


def turned(one: Floats, other: Floats) -> float:
    """Angle between two rotations (3, 3), radians."""
    chord = float(np.linalg.norm(one - other)) / np.sqrt(8)
    return 2 * float(np.arcsin(min(chord, 1.0)))
