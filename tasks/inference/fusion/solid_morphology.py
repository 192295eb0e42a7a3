"""Opening and closing of the solid in a volume of signed distances; `fuse` calls them before it takes the surface.

Serra, Image analysis and mathematical morphology (1982). Volumes are (x, y, z) metres, negative inside.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

POCKET_VOXELS = 3  # free space that is no wider than twice this, beside space that no view saw, is taken for noise
SPOT_VOXELS = 2  # seen surface of this width is noise as well, in an underside that no view saw


def without_thin_parts(volume: NDArray[np.float32], radius: int, voxel: float) -> NDArray[np.float32]:
    """The volume without solid parts that a ball of `radius` voxels does not fit in."""
    if not radius:
        return volume
    solid = np.pad(volume < 0, radius + 1)
    kept = _by_ball(ndimage.binary_dilation, _by_ball(ndimage.binary_erosion, solid, radius), radius + 1)
    return np.where((volume < 0) & ~_inner(kept, radius + 1), np.float32(voxel / 2), volume)


def without_pockets(
    volume: NDArray[np.float32],
    measured: NDArray[np.bool_],
    voxel: float,
    plane: NDArray[np.float64],
    contact: float,
) -> NDArray[np.float32]:
    """The volume without narrow free space in undersides that no view saw: there, single views see it in spots.

    Space above a part of the seen surface stays as it is, for instance the hole of a handle. measured: (x, y, z),
    voxels that a view saw. plane: (4,), what the object stands on, in voxels; up to the height `contact` (voxels) above
    it, readings count as the plane's.
    """
    solid = volume < 0
    padded = np.pad(solid, POCKET_VOXELS + 1)
    closed = _by_ball(ndimage.binary_erosion, _by_ball(ndimage.binary_dilation, padded, POCKET_VOXELS), POCKET_VOXELS)
    beside = ndimage.binary_dilation(solid & ~measured, iterations=POCKET_VOXELS)
    pockets = np.argwhere(_inner(closed, POCKET_VOXELS + 1) & beside & ~solid)
    seen = np.argwhere(solid & measured)
    pockets = pockets[_under(pockets, seen[seen @ plane[:3] + plane[3] > contact], plane[:3])]
    filled = volume.copy()
    filled[tuple(pockets.T)] = -voxel / 2
    return filled


def _under(voxels: NDArray[np.intp], seen: NDArray[np.intp], up: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True, (n,), for the voxels (n, 3) that have seen ones (m, 3) above them and none below, but for spots."""
    across = np.linalg.svd(up[None])[2][1:]
    column = np.rint(np.concatenate([voxels, seen]) @ across.T / SPOT_VOXELS).astype(np.intp)
    column -= column.min(axis=0, initial=0)
    lowest = np.full(column.max(axis=0, initial=0) + 1, np.inf)
    np.minimum.at(lowest, tuple(column[len(voxels) :].T), seen @ up)
    lowest[np.isinf(lowest)] = -np.inf  # nothing above
    without_spots = ndimage.maximum_filter(lowest, 3)
    return np.asarray(voxels @ up < without_spots[tuple(column[: len(voxels)].T)])


def _by_ball(operation: Callable[..., NDArray[np.bool_]], solid: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """The solid, dilated or eroded by nearly a ball of `radius` voxels."""
    for step in range(radius):
        solid = operation(solid, ndimage.generate_binary_structure(3, 1 + step % 2 * 2))
    return solid


def _inner(padded: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """The volume inside of a margin."""
    return padded[(slice(margin, -margin),) * 3]
