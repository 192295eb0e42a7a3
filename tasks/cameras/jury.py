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
# Grey levels of a texture that are the image's noise, blurred as the texture is: below, textures say nothing
TEXTURE_NOISE = 2.0
LEAST_COMMON = 30  # readings that agree, from which two views' textures are compared
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
    other_texture: Floats
    """Share of the texture of what agrees that is not the same, 0..1; 0 where there is no texture"""

    @property
    def likeness(self) -> Floats:
        """Agreement, less what has other colours: for poses that are not refined yet."""
        return self.agree * (1 - self.colour)

    @property
    def support(self) -> Floats:
        """Agreement, less what has other colours or another texture."""
        return self.likeness * (1 - self.other_texture)

    def rough_quality(self, limit: float) -> Floats:
        """One number to compare poses by that are not refined yet. limit: as of `quality`."""
        return quality(self.likeness, self.conflict, limit)

    def quality(self, limit: float) -> Floats:
        """One number to compare refined poses by. limit: the conflict that a right pose may have."""
        return quality(self.support, self.conflict, limit)


def quality(support: Floats, conflict: Floats, limit: float) -> Floats:
    """One number to compare poses by. limit: the conflict that a right pose may have."""
    return support - CONFLICT_COST * conflict / limit


class Jury:
    """The views of a capture as witnesses for and against cameras."""

    def __init__(self, surfaces: Sequence[SurfaceView], zoom: float, slack: float) -> None:
        """slack: distance that surfaces may lie apart beside the noise, in sizes of the object."""
        self._slack = slack * object_size(surfaces, zoom)
        self._witnesses: list[Witness] = []
        self._normals, self._maps = [], [surface.normals.reshape(-1, 3) for surface in surfaces]
        self._colours = [surface.witness_colours for surface in surfaces]
        self._levels = [surface.paint[0].levels.reshape(-1, 3) for surface in surfaces]
        self._texture = [surface.witness_texture for surface in surfaces]
        self._textures = [surface.texture.reshape(-1) for surface in surfaces]
        self._zoom = zoom
        for surface in surfaces:
            self._witnesses.append(surface.witness.with_camera(surface.zoomed_camera(zoom)))
            self._normals.append(zoomed_normals(surface.witness_normals, zoom))

    def pair(self, one: int, other: int, motions: Floats) -> Verdict:
        """The verdicts of two views about motions (k, 4, 4) from the axes of one to those of the other."""
        there = self._one_way(one, other, motions)
        back = self._one_way(other, one, inverse(motions))
        agree, conflict, colour, mine, seen = (np.concatenate(both, axis=1) for both in zip(there, back, strict=True))
        different = np.nan_to_num(_other_texture(agree, mine, seen))
        return Verdict(agree.mean(axis=1), conflict.mean(axis=1), _mean_colour(colour), different)

    def view(self, view: int, candidates: Floats, posed: Mapping[int, Floats]) -> Verdict:
        """The verdicts of all posed views about candidates (k, 4, 4) for the pose of another one.

        Colour and texture are those of the median view: a few that are wrong together must not vouch for each other.
        """
        agree = np.zeros((len(candidates), len(self._witnesses[view].depth)), bool)
        conflicts, colours, textures = [], [], []
        for other, pose in posed.items():
            motions = inverse(pose) @ candidates
            confirmed, contradicted, colour, mine, seen = self._one_way(view, other, motions)
            back = self._one_way(other, view, inverse(motions))[1]
            textures.append(_other_texture(confirmed, mine, seen))
            agree |= confirmed
            conflicts.append(np.maximum(contradicted.mean(axis=1), back.mean(axis=1)))
            colours.append(colour)
        conflict = np.quantile(np.stack(conflicts), MOST_CONFLICTS, axis=0, method="higher")
        different = np.nan_to_num(_median(np.stack(textures)))
        return Verdict(agree.mean(axis=1), conflict, _mean_colour(_median(np.stack(colours))), different)

    def conflicts(self, posed: Mapping[int, Floats], pairs: Sequence[tuple[int, int]]) -> Floats:
        """The conflict (n, n) of posed views, the larger one of both directions. pairs: those that are compared."""
        place = {view: k for k, view in enumerate(posed)}
        found = np.zeros((len(place), len(place)))
        for one, other in pairs:
            motion = (inverse(posed[other]) @ posed[one])[None]
            found[place[one], place[other]] = self._one_way(one, other, motion)[1].mean()
        return np.maximum(found, found.T)

    def _one_way(
        self, one: int, other: int, motions: Floats
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Floats, Floats, Floats]:
        """Readings (k, n) that agree, that contradict, colour differences in 0..1, NaN where nothing agrees, and the
        textures of the one and the other view there, 0 likewise."""
        compared = compare(self._witnesses[one], self._witnesses[other], motions, self._slack)
        at = np.maximum(compared.pixel, 0)
        normals = self._maps[other][at] * np.array([self._zoom, self._zoom, 1.0])
        length = np.maximum(np.linalg.norm(normals, axis=-1), 1e-9)
        turned = self._normals[one] @ np.swapaxes(motions[:, :3, :3], -1, -2)
        agree = compared.agree & (np.einsum("knc,knc->kn", normals, turned) > SAME_SIDE * length)
        difference = np.linalg.norm(self._levels[other][at] - self._colours[one], axis=-1) / OTHER_COLOUR
        colour = np.where(agree, np.minimum(difference, 1), np.nan)
        return agree, compared.conflict, colour, agree * self._texture[one], agree * self._textures[other][at]


def _other_texture(agree: NDArray[np.bool_], one: Floats, other: Floats) -> Floats:
    """Share of the texture that two views do not have in common (k,), of readings (k, n); NaN where few agree."""
    count = agree.sum(axis=1)
    strength = np.sqrt(np.square(one).sum(axis=1) * np.square(other).sum(axis=1))
    different = (strength - (one * other).sum(axis=1)) / (strength + np.maximum(count, 1) * TEXTURE_NOISE**2)
    return np.where(count >= LEAST_COMMON, different.clip(0, 1), np.nan)


def _median(values: Floats) -> Floats:
    """The lower median over the first axis of the values that are known; NaN without any."""
    ordered = np.sort(values, axis=0)  # NaN sorts last
    known = np.isfinite(ordered).sum(axis=0)
    middle: Floats = np.take_along_axis(ordered, np.maximum(known - 1, 0)[None] // 2, axis=0)[0]
    return middle


def _mean_colour(differences: Floats) -> Floats:
    known = np.isfinite(differences)
    total = np.where(known, differences, 0).sum(axis=1)
    mean: Floats = np.divide(total, known.sum(axis=1), out=np.ones(len(total)), where=known.any(axis=1))
    return mean
