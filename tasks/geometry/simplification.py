"""Fewer faces, the same shape: a closed mesh of a budget's size, compared with the dense one. Called by the export.

Vertices are (n, 3) float32, faces (m, 3) int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.geometry.collapse import collapsed
from tasks.geometry.mesh_repair import Faces, Vertices, compact, degenerate, weld
from tasks.geometry.solids import repair, without_loose_pieces
from tasks.geometry.surface_distance import SampledSurface, SurfaceDistance, surface_distance

# Of the collapses: rough meshes do not reach the budget with the first of these
AGGRESSIONS = (3, 5, 7, 9)
# Where the budget cannot be met within the tolerance, the mesh gets this many times as many faces, one after the other
DENSER = (1.5, 2.0)
# Denser meshes that leave more than this share of the error are not worth their faces
WORTH = 0.8
# The 99.9th percentile of normally distributed errors, in standard deviations
TOLERANCE_SIGMAS = 3.3
# Errors that nobody sees, as a share of the diagonal (one standard deviation)
TOLERANCE_SHARE = 0.002


@dataclass(frozen=True)
class Simplified:
    """A closed, manifold mesh, and how far it is from the dense one.

    limit: what the 99.9th percentile of the error should not exceed, in the mesh's unit.
    """

    vertices: Vertices
    faces: Faces
    error: SurfaceDistance
    limit: float


def simplify(vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int, noise: float = 0.0) -> Simplified:
    """A closed mesh becomes one of at most `budget` faces, by quadric error (Garland and Heckbert 1997), mended where
    collapses made sheets touch, without crumbs and cavities. A smaller mesh keeps its faces.

    noise: standard deviation of the dense surface, in the mesh's unit: 99.9 % of the surface stays within 3.3 times
    that, or 3.3 times 0.2 % of the diagonal if this is more.
    If the budget does not allow that, the result is denser as far as that helps, up to twice the budget.
    Raises ValueError if nothing encloses a volume.
    """
    points, triangles = without_loose_pieces(vertices.astype(np.float32), faces.astype(np.int32))
    dense = SampledSurface(points, triangles)
    limit = _limit(dense, noise)
    best = _compared(points, triangles, dense, budget, limit)
    for times in DENSER:
        if best.error.p999_m <= limit or len(triangles) <= budget:
            break
        denser = _compared(points, triangles, dense, int(times * budget), limit)
        if denser.error.p999_m > WORTH * best.error.p999_m:
            break
        best = denser
    return best


def simplify_open(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int, noise: float = 0.0
) -> Simplified:
    """The same for an open surface, which stays open: about `budget` faces at most, without degenerate ones."""
    points, triangles = weld(vertices, faces)
    dense = SampledSurface(points, triangles)
    for aggression in AGGRESSIONS:
        points, triangles = weld(*collapsed(points, triangles, budget, aggression))
        triangles = triangles[~degenerate(points, triangles)]
        if len(triangles) <= budget:
            break
    points, triangles = compact(points, triangles)
    return Simplified(
        points, triangles, surface_distance(dense, SampledSurface(points, triangles)), _limit(dense, noise)
    )


def _limit(dense: SampledSurface, noise: float) -> float:
    return TOLERANCE_SIGMAS * max(TOLERANCE_SHARE * dense.diagonal, noise)


def _compared(vertices: Vertices, faces: Faces, dense: SampledSurface, budget: int, limit: float) -> Simplified:
    fewer = _mended(vertices, faces, budget)
    error = surface_distance(dense, SampledSurface(*fewer))
    return Simplified(*fewer, error, limit)


def _mended(vertices: Vertices, faces: Faces, budget: int) -> tuple[Vertices, Faces]:
    """At most `budget` faces, closed and manifold; more only if the library finds nothing more to collapse."""
    for aggression in AGGRESSIONS:
        # each pass begins without the errors that defects have caused in the one before
        vertices, faces = repair(*collapsed(vertices, faces, budget, aggression))
        if len(faces) <= budget:
            break
    return vertices, faces
