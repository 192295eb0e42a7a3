"""Agreement of the views: how far apart they put the same surface, after smoothing; `fuse` takes tolerances from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.geometry.depth import DepthMap, Planes
from tasks.inference.fusion.seen_space import pixels_of

POINTS = 1500  # of a view, that are looked up in others
NEIGHBOURS = 4  # views that look most nearly in the same direction
SAME_SIDE = 0.7  # cosine of two normals: at more, the two views see the same side of something
SPREAD = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
FAR = 4.0  # medians: further apart, one of the views sees something else
ROUNDS = 5


def spread_between(maps: Sequence[DepthMap], planes: Sequence[Planes]) -> float:
    """Standard deviation of one view's surface from another's, metres: noise that is left, and errors of the cameras.

    0 if no two views see the same surface.
    """
    ahead = np.array([-one.camera.camera_to_world[:3, 2] for one in maps])
    nearest = np.argsort(-(ahead @ ahead.T), axis=1, kind="stable")
    found = []
    for number, one in enumerate(planes):
        good = np.flatnonzero(one.weight > 0)
        every = max(1, len(good) // POINTS)
        points, normals = one.points[::every], one.plane[good[::every], :3]
        for other in nearest[number, 1 : NEIGHBOURS + 1]:
            pixel, _, in_image = pixels_of(maps[other], points)
            plane = planes[other].plane.take(pixel, axis=0, mode="clip")
            same = in_image & ((plane[:, :3] * normals).sum(axis=1) > SAME_SIDE)
            found.append(np.abs((plane[:, :3] * points).sum(axis=1) + plane[:, 3])[same])
    apart = np.concatenate([*found, np.empty(0, np.float32)])
    if not len(apart):
        return 0.0
    middle = float(np.median(apart))
    for _ in range(ROUNDS):
        middle = float(np.median(apart[apart <= FAR * middle]))
    return SPREAD * middle / float(np.sqrt(2))
