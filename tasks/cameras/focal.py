"""The focal length of a capture without cameras: the one under which pairs of views fit. `finding` calls it.

A wrong focal length bends every surface, so that a view turned against another one contradicts it; views from the same
direction fit under any.
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
    Pair,
    refined_pair,
    rigid_motions,
    turned,
)
from tasks.cameras.surface_views import SurfaceView, object_size

# Fields of view across the image, degrees: from a long lens to a wide one
NARROWEST, WIDEST = 13.0, 90.0
COARSE_STEPS, FINE_STEPS = 16, 7
MOST_PAIRS = 40  # those with most matches
TRIES = 400
LEAST_TURN = np.radians(20.0)
LIMIT = 0.015  # conflict of a right pair, at which its support counts little


def found_zoom(
    surfaces: Sequence[SurfaceView],
    found: Sequence[Features],
    matched: Mapping[Pair, NDArray[np.intp]],
    rng: np.random.Generator,
) -> float:
    """The factor of the surfaces' focal length under which turned pairs support each other most."""
    camera = surfaces[0].camera
    fields = np.radians(np.geomspace(NARROWEST, WIDEST, COARSE_STEPS))
    zooms = camera.width / 2 / np.tan(fields / 2) / camera.fl_x
    pairs = sorted(matched, key=lambda pair: -len(matched[pair]))[:MOST_PAIRS]

    def value(zoom: float) -> float:
        return sum(_pair_value(surfaces, found, matched, pair, zoom, evidence, rng) for pair in pairs)

    values = []
    for zoom in zooms:
        evidence = Jury(surfaces, zoom, FINE_SLACK)
        values.append(value(zoom))
    best = int(np.argmax(values))
    around = np.geomspace(zooms[min(best + 1, len(zooms) - 1)], zooms[max(best - 1, 0)], FINE_STEPS + 2)[1:-1]
    fine = []
    for zoom in around:
        evidence = Jury(surfaces, zoom, FINE_SLACK)
        fine.append(value(zoom))
    return float(around[int(np.argmax(fine))])


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
    for _, motion in rigid_motions(a[match[:, 0]], b[match[:, 1]], tolerance, rng, TRIES):
        if turned(motion[:3, :3], np.eye(3)) > LEAST_TURN:
            refined = refined_pair(surfaces[one], surfaces[other], motion, zoom)
            best = max(best, float(evidence.pair(one, other, refined[None]).quality(LIMIT)[0]))
    return best
