"""Opening and closing of the solid in a volume of signed distances; `fuse` calls them before it takes the surface.

Serra, Image analysis and mathematical morphology (1982). Volumes are (x, y, z) metres, negative inside.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

POCKET_VOXELS = 3  # free space that is no wider than twice this, beside space that no view saw, is taken for noise


def without_thin_parts(volume: NDArray[np.float32], radius: int, voxel: float) -> NDArray[np.float32]:
    """The volume without solid parts that a ball of `radius` voxels does not fit in."""
    if not radius:
        return volume
    solid = np.pad(volume < 0, radius + 1)
    kept = _by_ball(ndimage.binary_dilation, _by_ball(ndimage.binary_erosion, solid, radius), radius + 1)
    return np.where((volume < 0) & ~_inner(kept, radius + 1), np.float32(voxel / 2), volume)


def without_pockets(volume: NDArray[np.float32], measured: NDArray[np.bool_], voxel: float) -> NDArray[np.float32]:
    """The volume without narrow free space beside what no view saw: there, single views see free space in spots.

    measured: (x, y, z), voxels that a view saw.
    """
    solid = np.pad(volume < 0, POCKET_VOXELS + 1)
    closed = _by_ball(ndimage.binary_erosion, _by_ball(ndimage.binary_dilation, solid, POCKET_VOXELS), POCKET_VOXELS)
    beside = ndimage.binary_dilation((volume < 0) & ~measured, iterations=POCKET_VOXELS)
    return np.where(_inner(closed, POCKET_VOXELS + 1) & beside & (volume > 0), np.float32(-voxel / 2), volume)


def _by_ball(operation: Callable[..., NDArray[np.bool_]], solid: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """The solid, dilated or eroded by nearly a ball of `radius` voxels."""
    for step in range(radius):
        solid = operation(solid, ndimage.generate_binary_structure(3, 1 + step % 2 * 2))
    return solid


def _inner(padded: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """The volume inside of a margin."""
    return padded[(slice(margin, -margin),) * 3]
