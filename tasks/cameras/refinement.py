"""Given cameras made to agree with the depth, as far as that is certain. The stage `find_cameras` calls it.

A refinement alone can lower its own residual and move cameras away from the truth: real sensors err in the same way in
all views, and planes slide. So movement is bounded, and every camera has to prove itself on readings that the equations
do not use: these may contradict other views less than before, and more of them have to agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.conflict import Floats, Witness, compare, inverse, pinhole_poses
from tasks.cameras.joint_refinement import refine
from tasks.cameras.lost_views import placed_again
from tasks.cameras.surface_views import surface_views
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise

# Given cameras come from calibrations, tracking and structure from motion: errors beyond these are mistakes
MOST_TURN = np.radians(3.0)
MOST_SHIFT = 0.06  # of the distance to the object
NEIGHBOURS = 12  # views that look in the most similar direction, that each is compared with
# From wide gates with few readings to narrow ones with many; gates are shares of the object's size
ROUGH: dict[str, Any] = {"gates": (0.05, 0.012), "readings": 250, "iterations": 8}
WIDE: dict[str, Any] = {"gates": (0.1, 0.012), "readings": 600, "iterations": 16}
EXACT: dict[str, Any] = {"gates": (0.012, 0.006), "readings": 600, "iterations": 8}
# A camera is astray if more of what its readings meet is in conflict than this, and so many medians of all. It is tried
# again, unless most are
ASTRAY, ASTRAY_MEDIANS, MOST_ASTRAY = 0.05, 3.0, 0.5
FAR_OFF = 0.5  # with more conflict before, surfaces are sought in a wide surrounding as well
GAIN = 1.02  # readings that agree after a refinement, in those before
# Conflict that may be left of the one before: real sensors err alike in all views, and then cameras move to less
# conflict, not to the truth
LEFT = 0.3


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well views agree on readings that no refinement uses."""

    agree: Floats
    """(n,) share of each view's readings that a neighbour confirms, mean over its neighbours"""
    conflict: Floats
    """(n,) share that a neighbour contradicts: it sees free space or background there"""
    residual_m: float
    """Median distance along the axis of agreeing readings from what the neighbour measured, metres"""

    @property
    def contradicted(self) -> float:
        """Share of the conflict in all that is confirmed or contradicted, 0 to 1; 0 if nothing is."""
        total = float(self.agree.sum() + self.conflict.sum())
        return float(self.conflict.sum()) / total if total else 0.0


def agreement(witnesses: Sequence[Witness], poses: Floats) -> Agreement:
    """Compare each view with its neighbours. poses: (n, 4, 4) camera-to-world in pinhole axes."""
    count = len(witnesses)
    agree, conflict, behind = np.zeros(count), np.zeros(count), [np.zeros(0)]
    for one, other in _neighbours(poses):
        seen = compare(witnesses[one], witnesses[other], inverse(poses[other]) @ poses[one])
        back = compare(witnesses[other], witnesses[one], inverse(poses[one]) @ poses[other])
        for view, found in ((one, seen), (one, back)):
            agree[view] += found.agree.mean()
            conflict[view] += found.conflict.mean()
        behind.append(np.abs(seen.behind[seen.agree]))
    pairs = 2 * np.maximum(np.bincount([one for one, _ in _neighbours(poses)], minlength=count), 1)
    apart = np.concatenate(behind)
    return Agreement(agree / pairs, conflict / pairs, float(np.median(apart)) if len(apart) else 0.0)


def _neighbours(poses: Floats) -> list[tuple[int, int]]:
    """Ordered pairs: of each view, with those that look in the most similar direction."""
    ahead = poses[:, :3, 2]
    nearest = np.argsort(-(ahead @ ahead.T), axis=1, kind="stable")
    return [(one, int(other)) for one in range(len(poses)) for other in nearest[one, 1 : NEIGHBOURS + 1]]


@dataclass(frozen=True, eq=False)
class Refinement:
    """Given cameras, moved."""

    poses: Floats
    """(n, 4, 4) camera-to-world in pinhole axes, metres"""
    moved: NDArray[np.bool_]
    """(n,) True for the cameras that were moved"""
    after: Agreement
    """With these cameras"""
    astray: NDArray[np.bool_]
    """(n,) True for the cameras that contradict the others even so"""


def refined(views: Sequence[View], witnesses: Sequence[Witness], sensor: DepthNoise) -> Refinement | None:
    """Refine the given cameras of views with depth; None if that is not certain to be better.

    A camera that moves too far, or whose held-back readings do not agree better, stays as given.
    """
    given = pinhole_poses(witnesses)
    before = agreement(witnesses, given)
    surfaces = surface_views(views, sensor)
    distance = float(np.median([np.median(witness.depth) for witness in witnesses]))

    def astray(poses: Floats) -> NDArray[np.bool_]:
        found = agreement(witnesses, poses)
        share = found.conflict / np.maximum(found.agree + found.conflict, np.finfo(float).tiny)
        return ~_within_bounds(poses, given, distance) | (share > ASTRAY + ASTRAY_MEDIANS * np.median(share))

    starts, ends = (ROUGH, WIDE) if before.contradicted > FAR_OFF else (ROUGH,), list[Floats]()
    for start in starts:
        ends.append(_onto(refine(surfaces, refine(surfaces, given, **start).poses, **EXACT).poses, given))
        if not astray(ends[-1]).any():
            break
    poses = min(ends, key=lambda each: int(astray(each).sum()))
    for rough in (ROUGH, WIDE, None):
        lost = astray(poses)
        if not lost.any() or lost.mean() > MOST_ASTRAY:
            break
        agreeing = np.flatnonzero(~lost).tolist()
        if agreement([witnesses[each] for each in agreeing], poses[agreeing]).contradicted > LEFT * before.contradicted:
            return None  # even the others agree too little: to try the lost ones again would not help
        # they start again from where they were given, among the others, which stay; at last, by what they show
        poses = np.where(lost[:, None, None], given, _onto(poses, given, ~lost))
        if rough is None:
            poses = placed_again(views, surfaces, poses, lost)
        else:
            poses = refine(surfaces, poses, fixed=agreeing, **rough).poses
        poses = refine(surfaces, poses, fixed=agreeing, **EXACT).poses
    poses = _onto(poses, given)
    kept = _within_bounds(poses, given, distance)
    for _ in range(2):
        tried = np.where(kept[:, None, None], poses, given)
        after = agreement(witnesses, tried)
        better = (after.conflict <= before.conflict) & (after.agree >= before.agree)
        if better[kept].all():
            break
        kept &= better
    if not kept.any() or after.contradicted > LEFT * before.contradicted:
        return None
    if after.agree.sum() < GAIN * before.agree.sum():
        return None
    return Refinement(tried, kept, after, astray(tried))


def _onto(poses: Floats, given: Floats, by: NDArray[np.bool_] | slice = slice(None)) -> Floats:
    """All poses moved together, rigidly, to where the given ones are: only relative motion is known.

    by: the ones that decide where that is.
    """
    left, _, right = np.linalg.svd(np.einsum("nij,nkj->ik", given[by, :3, :3], poses[by, :3, :3]))
    motion = np.eye(4)
    motion[:3, :3] = left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
    motion[:3, 3] = (given[by, :3, 3] - poses[by, :3, 3] @ motion[:3, :3].T).mean(axis=0)
    return motion @ poses


def turned_and_shifted(poses: Floats, given: Floats) -> tuple[Floats, Floats]:
    """Angles (n,) in radians and distances (n,) in metres between two sets of poses."""
    chords = np.linalg.norm(poses[:, :3, :3] - given[:, :3, :3], axis=(1, 2))
    turned = 2 * np.arcsin((chords / np.sqrt(8)).clip(0, 1))
    return turned, np.linalg.norm(poses[:, :3, 3] - given[:, :3, 3], axis=1)


def _within_bounds(poses: Floats, given: Floats, distance: float) -> NDArray[np.bool_]:
    turned, shifted = turned_and_shifted(poses, given)
    return (turned < MOST_TURN) & (shifted < MOST_SHIFT * distance)
