"""One camera after another, each where no view contradicts it. `finding` and `second_solutions` call it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.conflict import inverse
from tasks.cameras.joint_refinement import Refined, refine
from tasks.cameras.jury import Jury, Verdict, quality
from tasks.cameras.pairs import DIFFERENT, Hypothesis, turned
from tasks.cameras.surface_views import SurfaceView

Floats = NDArray[np.float64]

GROWING_SLACK, SETTLED_SLACK = 0.008, 0.006  # of the evidence, in sizes of the object
LEAST_SUPPORT = 0.15  # of a camera: agreement, less what has other colours
WITNESSES = 32  # posed views that judge a candidate, at most: time must not grow with their square
MANY_CANDIDATES, ROUGH_WITNESSES = 60, 8  # of so many candidates, fewer views judge first
SETTLING_VIEWS = 8  # that a candidate is refined against
SETTLING_READINGS, SETTLING_ITERATIONS, SETTLING_GATES = 250, 6, (0.025, 0.008)
JOINT_READINGS, JOINT_ITERATIONS, JOINT_GATES = 300, 5, (0.02, 0.008)
FIRST_JOINT, JOINT_GROWTH = 4, 1.6  # all cameras are refined at 4 views, and whenever there are 1.6 times as many
CANDIDATES = 12  # of a view, from its best pairs
SETTLED_CANDIDATES = 3  # of them that are refined
USABLE = 0.02  # quality of a pair, from which it proposes a camera


class Assembly:
    """Posed views of one object, in the axes of the first one."""

    def __init__(self, surfaces: Sequence[SurfaceView], zoom: float, limit: float, *, free_focal: bool) -> None:
        """limit: share of readings that may contradict a right camera."""
        self.surfaces = surfaces
        self.zoom = zoom
        self.limit = limit
        self.free_focal = free_focal
        self.posed: dict[int, Floats] = {}
        """Camera-to-world (4, 4) in pinhole axes, by the view's index"""
        self.jury = Jury(surfaces, zoom, GROWING_SLACK)
        self._distances = [float(np.median(surface.witness.depth)) for surface in surfaces]

    def grow(self, hypotheses: Sequence[Hypothesis], seed: int) -> None:
        """Pose all views that pairs link with the seed, the surest ones first."""
        proposals: dict[int, list[tuple[float, int, Floats]]] = {view: [] for view in range(len(self.surfaces))}
        for each in hypotheses:
            quality = pair_quality(each, self.limit)
            if quality > USABLE:
                proposals[each.one].append((quality, each.other, each.motion))
                proposals[each.other].append((quality, each.one, inverse(each.motion)))
        self.posed = {seed: np.eye(4)}
        rejected: set[int] = set()
        next_joint = float(FIRST_JOINT)
        while True:
            candidates = {
                view: sorted(((q, other, motion) for q, other, motion in each if other in self.posed), key=_quality)
                for view, each in proposals.items()
                if view not in self.posed and view not in rejected
            }
            open_views = [view for view, each in candidates.items() if each]
            if not open_views:
                return
            view = max(open_views, key=lambda view: candidates[view][0][0])
            poses = np.stack([self.posed[other] @ motion for _, other, motion in candidates[view][:CANDIDATES]])
            if not self.add(view, poses):
                rejected.add(view)
                continue
            rejected -= {other for other in rejected if any(linked == view for _, linked, _ in proposals[other])}
            if len(self.posed) >= next_joint:
                self.refine(JOINT_ITERATIONS, JOINT_READINGS, JOINT_GATES, GROWING_SLACK)
                next_joint = len(self.posed) * JOINT_GROWTH

    def add(self, view: int, candidates: Floats, tries: int = SETTLED_CANDIDATES) -> bool:
        """Pose a view by the best of some candidates (k, 4, 4) that no posed view contradicts; False without one."""
        best, pose = LEAST_SUPPORT, None
        quality = self.judge(view, candidates).rough_quality(self.limit)
        for candidate in _different(candidates[np.argsort(-quality, kind="stable")], tries):
            settled = self.settle(view, candidate)
            verdict = self.judge(view, settled[None])
            if verdict.conflict[0] <= self.limit and verdict.support[0] > best:
                best, pose = float(verdict.support[0]), settled
        if pose is not None:
            self.posed[view] = pose
        return pose is not None

    def judge(self, view: int, candidates: Floats) -> Verdict:
        """The verdict of the posed views about candidates (k, 4, 4) for another one."""
        if len(candidates) > MANY_CANDIDATES:
            others = _spread([other for other in self.posed if other != view], ROUGH_WITNESSES)
        else:
            others = self._witnesses(view, candidates[0])
        return self.jury.view(view, candidates, {other: self.posed[other] for other in others})

    def nearest(self, view: int, pose: Floats, count: int) -> list[int]:
        """The posed views that look at the same place from the most similar directions as a view at a pose."""
        others = [other for other in self.posed if other != view]
        poses, distances = np.stack([self.posed[other] for other in others]), [self._distances[k] for k in others]
        focus = poses[:, :3, 3] + poses[:, :3, 2] * np.array(distances)[:, None]
        here = pose[:3, 3] + pose[:3, 2] * self._distances[view]
        apart = np.linalg.norm(focus - here, axis=1) / self._distances[view] - poses[:, :3, 2] @ pose[:3, 2]
        return [others[k] for k in np.argsort(apart, kind="stable")[:count]]

    def _witnesses(self, view: int, pose: Floats) -> list[int]:
        """The posed views that judge a view at a pose: all, or of many those near it and some from everywhere."""
        others = [other for other in self.posed if other != view]
        if len(others) <= WITNESSES:
            return others
        return sorted({*self.nearest(view, pose, WITNESSES // 2), *_spread(others, WITNESSES // 2)})

    def settle(self, view: int, candidate: Floats) -> Floats:
        """A candidate (4, 4), refined against the posed views near it, which stay."""
        near = self.nearest(view, candidate, SETTLING_VIEWS)
        count = len(near)
        result = refine(
            [self.surfaces[other] for other in [*near, view]],
            np.stack([*(self.posed[other] for other in near), candidate]),
            self.zoom,
            fixed=range(count),
            pairs=[pair for k in range(count) for pair in ((k, count), (count, k))],
            iterations=SETTLING_ITERATIONS,
            readings=SETTLING_READINGS,
            gates=SETTLING_GATES,
        )
        return result.poses[count]

    def refine(self, iterations: int, readings: int, gates: tuple[float, float], slack: float) -> Refined:
        """All cameras together, and the focal length if it is free. slack: of the evidence from here on."""
        views = list(self.posed)
        result = refine(
            [self.surfaces[view] for view in views],
            np.stack([self.posed[view] for view in views]),
            self.zoom,
            free_focal=self.free_focal,
            iterations=iterations,
            readings=readings,
            gates=gates,
        )
        self.posed = dict(zip(views, result.poses, strict=True))
        self.zoom = result.zoom
        self.jury = Jury(self.surfaces, self.zoom, slack)
        return result

    def purge(self) -> list[int]:
        """Take out views until few contradict each other; returns them, the worst first."""
        views = list(self.posed)
        pairs = [(view, other) for view in views for other in self._witnesses(view, self.posed[view])]
        conflicts = self.jury.conflicts(self.posed, pairs)
        over = np.where(conflicts > self.limit, conflicts, 0.0)
        gone: list[int] = []
        # single pairs that contradict come from noise; a wrong view contradicts many
        while (left := len(views) - len(gone)) > 2:
            if (over > 0).sum(axis=1).max() <= max(1, min(left, WITNESSES) // 10):
                break
            worst = int(over.sum(axis=1).argmax())
            over[worst] = over[:, worst] = 0
            gone.append(views[worst])
        for view in gone:
            del self.posed[view]
        return gone

    def colour(self, view: int) -> float:
        """Difference of a posed view's colours from those of the median other view, 0..1."""
        return float(self.judge(view, self.posed[view][None]).colour[0])


def pair_quality(hypothesis: Hypothesis, limit: float) -> float:
    """One number to compare pairs by."""
    return float(quality(np.array(hypothesis.support), np.array(hypothesis.conflict), limit))


def _spread(views: list[int], most: int) -> list[int]:
    """Some of the views, evenly chosen."""
    return views[:: max(1, -(-len(views) // most))]


def _different(candidates: Floats, most: int) -> list[Floats]:
    """The first candidates (4, 4) of some that are not nearly the same."""
    kept: list[Floats] = []
    for candidate in candidates:
        if all(turned(candidate[:3, :3], other[:3, :3]) > DIFFERENT for other in kept):
            kept.append(candidate)
        if len(kept) == most:
            break
    return kept


def _quality(proposal: tuple[float, int, Floats]) -> float:
    return -proposal[0]
