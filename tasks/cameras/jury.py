"""Judgement of a camera by other views: how much of a view agrees with others, contradicts them, and has their colours.

`pairs`, `finding`, `second_solutions` and `focal` judge by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.conflict import Witness, compare, inverse
from tasks.cameras.surface_views import SurfaceView, object_size, zoomed_normals

Floats = NDArray[np.float64]

SAME_SIDE = 0.6  # cosine between the normals of one surface in two views
OTHER_COLOUR = 60.0  # sRGB levels, as a distance: colours that differ by more are just different
CONFLICT_COST = 0.12  # share of agreeing readings that a conflict at its limit counts as much as
MOST_CONFLICTS = 0.9  # quantile of a view's conflicts with others: single ones come from noise at silhouettes


@dataclass(frozen=True, eq=False)
class Verdict:
    """Evidence for some poses, (k,) each."""

    agree: Floats
    """Share of the readings that another view measured too"""
    conflict: Floats
    """Share that lies where another view sees free space or background"""
    colour: Floats
    """Difference of the colours of what agrees, 0..1; 1 if nothing agrees"""

    @property
    def support(self) -> Floats:
        """Agreement, less what has other colours."""
        return self.agree * (1 - self.colour)

    def quality(self, limit: float) -> Floats:
        """One number to compare poses by. limit: the conflict that a right pose may have."""
        return self.support - CONFLICT_COST * self.conflict / limit


class Jury:
    """The views of a capture as witnesses for and against cameras."""

    def __init__(self, surfaces: Sequence[SurfaceView], zoom: float, slack: float) -> None:
        """slack: distance that surfaces may lie apart beside the noise, in sizes of the object."""
        self._slack = slack * object_size(surfaces, zoom)
        self._witnesses: list[Witness] = []
        self._normals, self._maps = [], [surface.normals.reshape(-1, 3) for surface in surfaces]
        self._colours = [surface.witness_colours for surface in surfaces]
        self._levels = [surface.paint[0].levels.reshape(-1, 3) for surface in surfaces]
        self._zoom = zoom
        for surface in surfaces:
            self._witnesses.append(surface.witness.with_camera(surface.zoomed_camera(zoom)))
            self._normals.append(zoomed_normals(surface.witness_normals, zoom))

    def pair(self, one: int, other: int, motions: Floats) -> Verdict:
        """The verdicts of two views about motions (k, 4, 4) from the axes of one to those of the other."""
        there = self._one_way(one, other, motions)
        back = self._one_way(other, one, inverse(motions))
        agree, conflict, colour = (np.concatenate(both, axis=1) for both in zip(there, back, strict=True))
        return Verdict(agree.mean(axis=1), conflict.mean(axis=1), _mean_colour(colour))

    def view(self, view: int, candidates: Floats, posed: Mapping[int, Floats]) -> Verdict:
        """The verdicts of all posed views about candidates (k, 4, 4) for the pose of another one.

        The colour is that of the median view: a few that are wrong together must not vouch for each other.
        """
        agree = np.zeros((len(candidates), len(self._witnesses[view].depth)), bool)
        conflicts, colours = [], []
        for other, pose in posed.items():
            motions = inverse(pose) @ candidates
            confirmed, contradicted, colour = self._one_way(view, other, motions)
            _, back, _ = self._one_way(other, view, inverse(motions))
            agree |= confirmed
            conflicts.append(np.maximum(contradicted.mean(axis=1), back.mean(axis=1)))
            colours.append(colour)
        stacked = np.sort(np.stack(colours), axis=0)  # NaN sorts last
        known = np.isfinite(stacked).sum(axis=0)
        median = np.take_along_axis(stacked, np.maximum(known - 1, 0)[None] // 2, axis=0)[0]
        conflict = np.quantile(np.stack(conflicts), MOST_CONFLICTS, axis=0, method="higher")
        return Verdict(agree.mean(axis=1), conflict, _mean_colour(median))

    def conflicts(self, posed: Mapping[int, Floats], pairs: Sequence[tuple[int, int]]) -> Floats:
        """The conflict (n, n) of posed views, the larger one of both directions. pairs: those that are compared."""
        place = {view: k for k, view in enumerate(posed)}
        found = np.zeros((len(place), len(place)))
        for one, other in pairs:
            motion = (inverse(posed[other]) @ posed[one])[None]
            found[place[one], place[other]] = self._one_way(one, other, motion)[1].mean()
        return np.maximum(found, found.T)

    def _one_way(self, one: int, other: int, motions: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Floats]:
        """Readings (k, n) that agree, that contradict, and colour differences in 0..1, NaN where nothing agrees."""
        compared = compare(self._witnesses[one], self._witnesses[other], motions, self._slack)
        at = np.maximum(compared.pixel, 0)
        normals = self._maps[other][at] * np.array([self._zoom, self._zoom, 1.0])
        length = np.maximum(np.linalg.norm(normals, axis=-1), 1e-9)
        turned = self._normals[one] @ np.swapaxes(motions[:, :3, :3], -1, -2)
        agree = compared.agree & (np.einsum("knc,knc->kn", normals, turned) > SAME_SIDE * length)
        difference = np.linalg.norm(self._levels[other][at] - self._colours[one], axis=-1) / OTHER_COLOUR
        return agree, compared.conflict, np.where(agree, np.minimum(difference, 1), np.nan)


def _mean_colour(differences: Floats) -> Floats:
    known = np.isfinite(differences)
    total = np.where(known, differences, 0).sum(axis=1)
    mean: Floats = np.divide(total, known.sum(axis=1), out=np.ones(len(total)), where=known.any(axis=1))
    return mean
