"""Views that a refinement lost, recognised again by their features among the other views. `refinement` calls it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.assembly import Assembly
from tasks.cameras.features import features, matches
from tasks.cameras.pairs import pair_hypotheses
from tasks.cameras.surface_views import SurfaceView
from tasks.capture.views import View

Floats = NDArray[np.float64]

COMPARED = 8  # views near a lost one that it is recognised in
MOST = 8  # lost views that are sought, each takes a second or two
LIMIT = 0.05  # share of a view's readings that others may contradict where it is placed again


def placed_again(
    views: Sequence[View], surfaces: Sequence[SurfaceView], poses: Floats, lost: NDArray[np.bool_]
) -> Floats:
    """The poses (n, 4, 4), camera-to-world in pinhole axes; of lost views (n,), those where no other contradicts."""
    assembly = Assembly(surfaces, 1.0, LIMIT, free_focal=False)
    assembly.posed = {int(view): poses[view] for view in np.flatnonzero(~lost)}
    rng = np.random.default_rng(0)
    for view in np.flatnonzero(lost)[:MOST].tolist():
        near = assembly.nearest(view, poses[view], COMPARED)
        some = [*near, view]
        found = [features(views[k], surfaces[k]) for k in some]
        matched = {(len(near), k): matches(found[-1], found[k]) for k in range(len(near))}
        hypotheses = pair_hypotheses([surfaces[k] for k in some], found, matched, 1.0, rng)
        candidates = [assembly.posed[some[each.other]] @ each.motion for each in hypotheses]
        if candidates:
            assembly.add(view, np.stack(candidates))
    return np.stack([assembly.posed.get(view, poses[view]) for view in range(len(poses))])
