"""Edge collapses by fast-simplification. Called by `simplification` and `solids`."""

from __future__ import annotations

import fast_simplification
import numpy as np

from tasks.geometry.mesh_repair import Faces, Vertices

# Quality over speed: the library's default of 7 doubles the largest error
GENTLE = 3


def collapsed(vertices: Vertices, faces: Faces, budget: int, aggression: int = GENTLE) -> tuple[Vertices, Faces]:
    """About `budget` faces by quadric error (Garland and Heckbert 1997); more if the aggression (3 to 9) does not
    allow the errors that it takes. A smaller mesh comes back as it is.

    A closed mesh stays a closed chain of faces, but sheets of it may meet in edges and vertices: see `parted`.
    """
    if len(faces) <= budget:
        return vertices, faces
    # the error that it allows is absolute: a large object would keep too many faces, a small one lose detail
    middle, size = (vertices.min(axis=0) + vertices.max(axis=0)) / 2, np.ptp(vertices, axis=0).max()
    scaled = (vertices - middle) / size
    fewer, triangles = fast_simplification.simplify(scaled, faces, target_count=budget, agg=aggression)
    return (fewer * size + middle).astype(np.float32), triangles.astype(np.int32)
