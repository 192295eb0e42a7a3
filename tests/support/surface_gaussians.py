"""3D gaussians that show the surface of a known mesh, as a model that makes gaussians leaves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation

from tasks.geometry import gaussians as geometry
from tasks.geometry.gaussians import Gaussians, SplatCompositor

HIDDEN_SHARE = 0.1  # of the gaussians: below the surface, where nothing has taught them a colour
HIDDEN_COLOUR = (1.0, 0.0, 1.0)
HIDDEN_DEPTH = (1.0, 2.0)
SPREAD = (0.5, 0.9)
"""Standard deviations along the surface."""
THICKNESS = 0.1
UNEVEN = 0.3
"""Standard deviation of the centres' distance from the surface. This, like the three above, in mean distances."""
OPACITY = (0.9, 1.0)
LOOKS = 4  # places that training looks at, for each gaussian
ALL_NEAREST = 32  # gaussians that training looks at for each place
ITERATIONS = 20


Colours = Callable[[NDArray[np.floating]], NDArray[np.floating]]


def gaussians_on(mesh: trimesh.Trimesh, count: int, colours_at: Colours) -> Gaussians:
    """Flat gaussians on the mesh; colours_at: its colours (n, 3) in 0..1 at points (n, 3)."""
    rng = np.random.default_rng(0)
    points, face = trimesh.sample.sample_surface(mesh, count, seed=0)
    normals = mesh.face_normals[face]
    hidden = np.arange(count) < HIDDEN_SHARE * count
    distance = np.sqrt(mesh.area / np.count_nonzero(~hidden))
    height = np.where(hidden, -rng.uniform(*HIDDEN_DEPTH, count), rng.normal(scale=UNEVEN, size=count)) * distance
    side = np.cross(normals, np.eye(3)[np.abs(normals).argmin(axis=1)])
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    axes = Rotation.from_matrix(np.stack([side, np.cross(normals, side), normals], axis=2))
    along = rng.uniform(*SPREAD, (count, 2))
    return Gaussians(
        centres=(points + height[:, None] * normals).astype(np.float32),
        scales=(np.column_stack([along, np.full(count, THICKNESS)]) * distance).astype(np.float32),
        rotations=axes.as_quat(scalar_first=True).astype(np.float32),
        opacities=rng.uniform(*OPACITY, count).astype(np.float32),
        colours=np.where(hidden[:, None], HIDDEN_COLOUR, colours_at(points)).astype(np.float32),
    )


def trained(gaussians: Gaussians, mesh: trimesh.Trimesh, colours_at: Colours) -> Gaussians:
    """The gaussians with colours that show the mesh's colours best once composited, as training leaves them.

    Simultaneous iterative reconstruction from places all over the mesh.
    """
    places, face = trimesh.sample.sample_surface(mesh, LOOKS * len(gaussians.centres), seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "NEAREST", ALL_NEAREST)
        index, weight = SplatCompositor(gaussians)._weights(
            places.astype(np.float32), mesh.face_normals[face].astype(np.float32)
        )
    shares = weight / weight.sum(axis=0)
    rows = np.broadcast_to(np.arange(len(places)), index.shape)
    shown = csr_array((shares.ravel(), (rows.ravel(), index.ravel())), shape=(len(places), len(gaussians.centres)))
    back = shown.T.tocsr()
    seen = np.maximum(back.sum(axis=1), np.finfo(np.float32).eps)[:, None]
    truth, colours = colours_at(places), gaussians.colours.astype(float)
    for _ in range(ITERATIONS):
        colours = (colours + back @ (truth - shown @ colours) / seen).clip(0, 1)
    return replace(gaussians, colours=colours.astype(np.float32))
