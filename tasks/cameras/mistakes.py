"""The mistake in a capture's cameras or depth: of the usual ones, the one without which the views agree.

The stage `find_cameras` asks for it where the given cameras contradict the depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.conflict import GL_TO_PINHOLE, Floats, compare, inverse
from tasks.cameras.depth_explanations import along_the_ray, of_depth
from tasks.cameras.explanations import DepthFormat, Explanation, Told, as_given, scaled, with_parallax, without_scale
from tasks.cameras.lens_explanations import of_another_focal_length, of_intrinsics
from tasks.cameras.pose_explanations import of_matrices
from tasks.capture.views import View

VIEWS = 12  # that are tried, evenly spread over the capture
NEIGHBOURS = 2  # in the views' order, to either side, that each is compared with


@dataclass(frozen=True)
class Look:
    """How closely views are compared."""

    points: int
    """Readings of a view"""
    slack: float
    """Allowed beside the noise, metres per metre of distance"""
    step: float
    """Between two factors of the depth"""


COARSE, FAIR, CLOSE = Look(20, 0.03, 0.03), Look(60, 0.01, 0.006), Look(150, 0.0, 0.0002)
LOOKS = (FAIR, Look(60, 0.003, 0.002), Look(60, 0.001, 0.0007), CLOSE)
STEPS = 8  # to either side of the best factor so far
PROMISING = 0.8  # of the best quality so far: such an explanation is looked at closely
CERTAIN = 0.02  # with so little conflict no other explanation is tried
# nor with this much, if there was so little agreement without it: it is not a matter of precision then
LIKELY, WITHOUT = 0.25, 0.02
ROUNDS = 7  # of a search close to an explanation
# Given cameras are suspect with less agreement than this, or with more conflict, as shares of what agrees or conflicts
SUSPECT_AGREEMENT = 0.1
SUSPECT_CONFLICT, SUSPECT_CONFLICT_CLOSE = 0.1, 0.3
# An explanation holds if so many readings agree, so many times more than as given, with so little of the conflict
MIN_AGREEMENT = 0.1
MOST_CONFLICT = 0.4
GAIN = 1.25
LEFT = 0.6
# A slight mistake holds if it leaves so little of the conflict, and most of the agreement
SLIGHT_LEFT, SLIGHT_AGREEMENT = 0.25, 0.9


@dataclass(frozen=True, eq=False)
class Judged:
    """How well the views agree under an explanation, with one factor of the depth."""

    explanation: Explanation
    """The explanation"""
    factor: float
    """Of all depth"""
    agree: float
    """Share of the readings that another view confirms, mean over pairs of views"""
    conflict: float
    """Share that another view contradicts"""

    @property
    def quality(self) -> float:
        """Higher is better."""
        return self.agree - self.conflict

    @property
    def contradicted(self) -> float:
        """Share of the conflict in all that is confirmed or contradicted; 1 if nothing is."""
        return self.conflict / (self.agree + self.conflict) if self.agree + self.conflict else 1.0


@dataclass(frozen=True, eq=False)
class Found:
    """An explanation with the factor of the depth that suits it best."""

    close: Judged
    """Within the sensor's noise"""
    fair: Judged
    """With some slack: real cameras and sensors are not exact"""

    @property
    def quality(self) -> float:
        """Higher is better."""
        return self.close.quality + self.fair.quality


def find_mistake(views: Sequence[View], stored: DepthFormat) -> Told:
    """Find the mistake and its remedy; None if the views agree as they are, or no usual mistake explains it.

    Every view has a camera and depth.
    """
    indices = np.array(_spread(len(views)))
    chosen = [views[index] for index in indices]
    if len(chosen) < 2:
        return None
    given = as_given(chosen)
    now = _found(judged(given, given.factors, CLOSE))
    if now.fair.agree > SUSPECT_AGREEMENT and (
        now.fair.contradicted < SUSPECT_CONFLICT and now.close.contradicted < SUSPECT_CONFLICT_CLOSE
    ):
        return None if now.close.contradicted < CERTAIN else _slight(now)
    gross = now.fair.agree < WITHOUT

    def holds(found: Found) -> bool:
        better = found.close.agree >= GAIN * now.close.agree
        better &= gross or found.close.contradicted <= LEFT * now.close.contradicted
        return better and found.fair.agree >= MIN_AGREEMENT and found.fair.contradicted <= MOST_CONFLICT

    best, promising = now, MIN_AGREEMENT
    for explanation in _explanations(views, indices, given, stored):
        if not len(explanation.factors):
            continue  # it puts all cameras in one place, which no two views can contradict
        first = judged(explanation, explanation.factors, COARSE)
        if first.quality < promising and not explanation.finer():
            continue
        promising = max(promising, PROMISING * first.quality)
        found = _closer(first)
        better = found.quality > best.quality
        likely = gross and better and found.close.contradicted < LIKELY
        if holds(found) and (likely or found.close.contradicted < CERTAIN):
            best = found
            break
        best = found if better else best
    return best.close.explanation.told(best.close.factor) if holds(best) else None


def _explanations(
    views: Sequence[View], indices: NDArray[np.intp], given: Explanation, stored: DepthFormat
) -> Iterator[Explanation]:
    """Every mistake that is tried, the simplest first. given: `as_given` of the views with these indices."""
    yield replace(given, factors=with_parallax(given), told=lambda factor: scaled(factor, stored))
    yield from of_matrices(given, stored)
    poses = np.stack([view.camera.camera_to_world for view in views if view.camera is not None]) @ GL_TO_PINHOLE
    for order, reordered in (
        ("each has that of the view before", poses[(indices + 1) % len(poses)]),
        ("each has that of the next view", poses[indices - 1]),
        ("they are in the opposite order", poses[::-1][indices]),
    ):
        what, todo = f"the cameras belong to other views: {order}", "check which frame names which view"
        yield without_scale(replace(given, poses=reordered), what, todo)
    yield from of_depth([views[index] for index in indices], given, stored)
    yield from of_intrinsics(given)


def _slight(now: Found) -> Told:
    """Tell a mistake that bends the depth too little to make views suspect; refined cameras would hide it."""
    for explanation in (along_the_ray(now.close.explanation), of_another_focal_length(now.close.explanation)):
        found = _closer(judged(explanation, explanation.factors, CLOSE)).close
        if (
            found.contradicted <= SLIGHT_LEFT * now.close.contradicted
            and found.agree >= SLIGHT_AGREEMENT * now.close.agree
            and (told := found.explanation.told(found.factor)) is not None
        ):
            return told
    return None


def judged(explanation: Explanation, factors: Floats, look: Look) -> Judged:
    """The best of several factors of the depth.

    To scale all depth is the same as to scale the way between the cameras back.
    """
    agree, conflict = np.zeros(len(factors)), np.zeros(len(factors))
    witnesses, poses = explanation.witnesses, explanation.poses
    pairs = _pairs(len(witnesses))
    for one, other in pairs:
        motions = np.repeat((inverse(poses[other]) @ poses[one])[None], len(factors), axis=0)
        motions[:, :3, 3] /= factors[:, None]
        some = witnesses[one].thinned(look.points)
        seen = compare(some, witnesses[other], motions, look.slack * some.depth)
        agree += seen.agree.mean(axis=1) / len(pairs)
        conflict += seen.conflict.mean(axis=1) / len(pairs)
    best = _middle_of_best(agree - conflict)
    return Judged(explanation, float(factors[best]), float(agree[best]), float(conflict[best]))


def _found(close: Judged) -> Found:
    return Found(close, judged(close.explanation, np.array([close.factor]), FAIR))


def _closer(found: Judged) -> Found:
    """The same explanation, or one close to it, with its factor found exactly."""
    for number in range(ROUNDS):
        look = LOOKS[number * len(LOOKS) // ROUNDS]
        near = [judged(each, each.factors, look) for each in found.explanation.finer()]
        found = max(near, key=lambda each: each.quality, default=found)
    for look in LOOKS:
        reach = STEPS if len(found.explanation.factors) > 1 else 0
        steps = np.arange(-reach, reach + 1, dtype=np.float64)
        found = judged(found.explanation, found.factor * (1 + look.step) ** steps, look)
    return _found(found)


def _middle_of_best(quality: Floats) -> int:
    """Index in the middle of the run of values about as good as the best one."""
    best = int(np.argmax(quality))
    good = quality >= quality[best] - 0.01 * abs(quality[best])
    first, last = best, best
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(good) and good[last + 1]:
        last += 1
    return (first + last) // 2


def _pairs(count: int) -> list[tuple[int, int]]:
    steps = [step for step in range(-NEIGHBOURS, NEIGHBOURS + 1) if step]
    return sorted({(one, (one + step) % count) for one in range(count) for step in steps if step % count})


def _spread(count: int) -> list[int]:
    indices: list[int] = np.unique(np.linspace(0, count - 1, min(count, VIEWS)).round().astype(int)).tolist()
    return indices
