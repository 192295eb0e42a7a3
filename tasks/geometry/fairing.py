"""Takes noise out of a dense mesh, as far as that leaves its shape; fusion calls it.

Each place is averaged over the widest area that is free of a systematic error: Lepski, On a problem of adaptive
estimation in Gaussian white noise (Theory of Probability and its Applications 1991). Averages over curved areas lie on
the inner side, so the smoothing is applied twice to find out how far, and that is taken back: Tukey's twicing
(Exploratory data analysis, 1977).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from tasks.geometry.mesh_repair import Faces, Vertices, face_normals, unit_sums, vertex_links

STEPS = (4, 8, 16, 32, 64)  # of smoothing: each of them widens the area by a ring, and half of that
SYSTEMATIC = 0.1  # of the noise: so large an error of all of an area is allowed
LEAST_SHARE = 0.02  # of the vertices: for fewer, a wider area is not tried


def without_noise(vertices: NDArray[np.floating], faces: Faces, noise: float) -> Vertices:
    """The vertices (n, 3), moved along their normals. noise: their standard deviation at most, in their unit."""
    if not noise:
        return vertices.astype(np.float32)
    links = vertex_links(faces, len(vertices))
    umbrella = diags_array(1 / np.maximum(links.sum(axis=1), 1)) @ links
    given = vertices.astype(np.float64)
    once = _smooth(given, umbrella, STEPS[0])
    normals = unit_sums(face_normals(once, faces), faces, len(once))
    along = np.zeros(len(given))
    allowed = np.ones(len(given))
    for steps in STEPS:
        twice = _smooth(once, umbrella, steps)
        thrice = _smooth(twice, umbrella, steps)
        left = _dot(once - 2 * twice + thrice, normals)  # of the systematic error, after twicing
        size = np.sqrt(_smooth(np.square(left), umbrella, steps))
        fits = np.clip(2 - size / (SYSTEMATIC * noise), 0, 1)
        allowed = np.minimum(allowed, _smooth(fits, umbrella, STEPS[0]))
        if allowed.mean() < LEAST_SHARE:
            break
        along += allowed * (_dot(2 * once - twice - given, normals) - along)
        once = twice
    return np.asarray(given + along[:, None] * normals, np.float32)


def _smooth(values: NDArray[np.float64], umbrella: csr_array, steps: int) -> NDArray[np.float64]:
    """Values of the vertices, (n,) or (n, c), each moved half of the way to the mean of its neighbours in each step."""
    for _ in range(steps):
        values = 0.5 * (values + umbrella @ values)
    return values


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((a * b).sum(axis=1))
