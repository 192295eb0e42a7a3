"""Fewer faces, the same shape: a closed mesh of a budget's size, compared with the dense one. Called by the export.

Vertices are (n, 3) float32, faces (m, 3) int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import fast_simplification
import numpy as np
from numpy.typing import NDArray

from tasks.geometry.mesh_repair import Faces, Vertices
from tasks.geometry.solids import repair, without_loose_pieces
from tasks.geometry.surface_distance import SampledSurface, SurfaceDistance, surface_distance

# Quality over speed: the library's default of 7 doubles the largest error. Rough meshes do not reach the budget with
# the first of these
AGGRESSIONS = (3, 5, 7, 9)
# Where the budget cannot be met within the tolerance, the mesh gets this many times as many faces, one after the other
DENSER = (1.0, 1.5, 2.0)
# The 99.9th percentile of normally distributed errors, in standard deviations
TOLERANCE_SIGMAS = 3.3
# Tolerance where the sensor's noise is not known, as a share of the diagonal
TOLERANCE_SHARE = 0.002


@dataclass(frozen=True)
class Simplified:
    """A closed, manifold mesh, and how far it is from the dense one. `within`: within budget and tolerance."""

    vertices: Vertices
    faces: Faces
    error: SurfaceDistance
    within: bool


def simplify(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int, tolerance: float | None = None
) -> Simplified:
    """A closed mesh becomes one of at most `budget` faces, by quadric error (Garland and Heckbert 1997), mended where
    collapses made sheets touch, without crumbs and cavities. A smaller mesh keeps its faces.

    tolerance: the sensor's noise (one sigma, in the mesh's unit): 99.9 % of the surface stays within 3.3 times that.
    Where the budget does not allow it, the mesh is denser, up to twice the budget, and not `within`.
    Raises ValueError if nothing encloses a volume.
    """
    points, triangles = without_loose_pieces(vertices.astype(np.float32), faces.astype(np.int32))
    dense = SampledSurface(points, triangles)
    limit = TOLERANCE_SIGMAS * (TOLERANCE_SHARE * dense.diagonal if tolerance is None else tolerance)
    best: Simplified | None = None
    for times in DENSER:
        fewer = _mended(points, triangles, int(times * budget))
        error = surface_distance(dense, SampledSurface(*fewer))
        if best is None or error.p999_m < best.error.p999_m:
            best = Simplified(*fewer, error, within=len(fewer[1]) <= budget and error.p999_m <= limit)
        if best.error.p999_m <= limit or len(triangles) <= times * budget:
            break
    assert best is not None
    return best


def _mended(vertices: Vertices, faces: Faces, budget: int) -> tuple[Vertices, Faces]:
    """At most `budget` faces, closed and manifold; more only if the library finds nothing more to collapse."""
    for aggression in AGGRESSIONS:
        if len(faces) > budget:
            # starting again from what is left forgets the errors that defects have piled up
            vertices, faces = _collapsed(vertices, faces, budget, aggression)
        vertices, faces = repair(vertices, faces)
        if len(faces) <= budget:
            break
    return vertices, faces


def _collapsed(vertices: Vertices, faces: Faces, budget: int, aggression: int) -> tuple[Vertices, Faces]:
    # the error that it allows is absolute: a large object would keep too many faces, a small one lose detail
    middle, size = (vertices.min(axis=0) + vertices.max(axis=0)) / 2, np.ptp(vertices, axis=0).max()
    scaled = (vertices - middle) / size
    fewer, triangles = fast_simplification.simplify(scaled, faces, target_count=budget, agg=aggression)
    return (fewer * size + middle).astype(np.float32), triangles.astype(np.int32)
